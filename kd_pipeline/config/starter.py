"""A config with comments for a folder of images or tar shards: `kd-pipeline init`."""

import io
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kd_pipeline.config.yaml import read_plain
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.base import Source
from kd_pipeline.data.sources.files.image_folder import ImageFolder
from kd_pipeline.data.sources.tar.source import Tar
from kd_pipeline.errors import DataError

__all__ = ["starter_config"]

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "dev", "test", "testing")
_SIZES = (32, 64, 96, 128, 160, 224)
_MAX_BATCH = 64
_NUM_LOOKED_AT = 64
"""Images whose sizes are read."""
_PLAIN = re.compile(r"[A-Za-z0-9_./~-]*[A-Za-z_/][A-Za-z0-9_./~-]*")
"""Paths that may need no quotes."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What is in a folder."""

    train: str
    """The source, as YAML."""
    val: str | None
    num_train: int | None
    num_classes: int | None
    """None without labels."""
    is_labeled: bool
    size: int


def starter_config(folder: Path | None, *, name: str) -> str:
    """The text of a config that trains on the images in `folder`.

    Args:
        folder: of class folders, of `train` and `val` with class folders, or of images at any depth without labels;
            or of tar shards, also `train*.tar` and `val*.tar`, or one shard; None for a config with paths to fill in.
        name: of the run folder, below `runs`.

    Raises:
        DataError: the folder cannot be read or has no images.
    """
    found = _Found(_folder("images/train"), _folder("images/val"), None, None, is_labeled=True, size=224)
    if folder is not None:
        try:
            found = _look_at(folder)
        except DataError:
            in_shards = _look_at_shards(folder)
            if in_shards is None:
                raise
            found = in_shards
    seen = "" if found.num_train is None else f"{found.num_train:,} images"
    if found.num_classes is not None:
        seen += f" of {found.num_classes} classes"
    head = (
        "# A first config for kd-pipeline. Look at what it does, then change it:\n"
        "#   kd-pipeline check -c FILE     reads some images, opens both networks, and says what is wrong\n"
        "#   kd-pipeline train -c FILE     trains; the same command resumes after an interruption\n"
        "#   kd-pipeline config -c FILE    prints every setting with its default\n"
        "# Any setting can also be given in the command, such as train.epochs=5.\n\n"
    )
    run = f"seed: 0\nrun_dir: {_written(f'runs/{name}')} # checkpoints, logs and the exported student go here\n\n"
    return head + run + _data(found, seen) + (_labeled() if found.is_labeled else _unlabeled()) + _train(found)


def _look_at(folder: Path) -> _Found:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    splits = {each.lower(): each for each in names}
    train = next((splits[each] for each in _TRAIN if each in splits), None)
    val = None if train is None else next((splits[each] for each in _VAL if each in splits), None)
    root = folder if train is None else folder / train
    is_labeled = not root.is_dir() or any(
        entry.is_dir() and not entry.name.startswith((".", "_")) for entry in root.iterdir()
    )
    source = ImageFolder(root, labeled=is_labeled)
    num_classes = source.num_classes if is_labeled else None
    return _Found(
        _folder(str(root), is_labeled=is_labeled),
        None if val is None else _folder(str(folder / val), is_labeled=is_labeled),
        len(source),
        num_classes,
        is_labeled=is_labeled,
        size=_size(root, source),
    )


def _look_at_shards(folder: Path) -> _Found | None:
    """What is in tar shards; None if there are none here."""
    if folder.suffix == ".tar":
        train, val = str(folder), None
    else:
        splits = {
            split: str(folder / pattern)
            for split in (*_TRAIN, *_VAL, "")
            for pattern in ((f"{split}*.tar", f"{split}/*.tar") if split else ("*.tar",))
            if any(folder.glob(pattern))
        }
        train_split = next((split for split in (*_TRAIN, "") if split in splits), None)
        if train_split is None:
            return None
        train = splits[train_split]
        val = next((splits[split] for split in _VAL if split in splits), None) if train_split else None
    source = Tar(train)
    is_labeled = source.labels is not None
    num_classes = source.num_classes if is_labeled else None
    shown = [None if path is None else f"{{kind: tar, path: {_written(path)}}}" for path in (train, val)]
    size = _size(folder, source)
    return _Found(str(shown[0]), shown[1], len(source), num_classes, is_labeled=is_labeled, size=size)


def _folder(root: str, *, is_labeled: bool = True) -> str:
    """The source of a folder of images, as YAML."""
    return f"{{kind: image_folder, root: {_written(root)}{'' if is_labeled else ', labeled: false'}}}"


def _size(root: Path, source: Source) -> int:
    """The largest of the usual sizes that most images have without being enlarged."""
    sides = []
    for index in range(0, len(source), max(1, len(source) // _NUM_LOOKED_AT)):
        try:
            with Image.open(_file(source, index)) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # `kd-pipeline check` names unreadable images
    if not sides:
        raise DataError(f"{root}: none of the first images can be opened; are these images?")
    return max([size for size in _SIZES if size <= statistics.median(sides)], default=_SIZES[0])


def _file(source: Source, index: int) -> str | io.BytesIO:
    """What Pillow opens."""
    if source.stores == "files":
        return source.name(index)
    (content,) = source.read(np.array([index]))
    return io.BytesIO(b"" if isinstance(content, UnreadableFileError) else content)


def _data(found: _Found, seen: str) -> str:
    batch_size = _MAX_BATCH
    while found.num_train is not None and batch_size > max(1, found.num_train // 4):
        batch_size //= 2
    resize = round(found.size * 256 / 224) if found.size > 64 else found.size
    val = (
        f"""\
  val: # images to judge the student by after each epoch; they are not trained on
    source: {found.val}
    transform: {{preset: eval, size: {found.size}, resize: {resize}}}
"""
        if found.val is not None
        else f"""\
  # There is no validation set, so nothing says how good the student is. Move a tenth of the images to another folder
  # of the same layout, and name it here:
  # val:
  #   source: {_folder("images/val", is_labeled=found.is_labeled)}
  #   transform: {{preset: eval, size: {found.size}, resize: {resize}}}
"""
    )
    return f"""\
data:
  batch_size: {batch_size} # as many as fit into memory; scale train.optimizer.lr along with it
  # num_threads: 8 # CPU threads that decode images; all cores without it. `kd-pipeline tune -c FILE` measures it
  train:{f" # {seen}" if seen else ""}
    # kind: file_list reads a CSV file of paths and labels, tar the shards of WebDataset, parquet tables of images, and
    # arrays a NumPy file; cifar10 and cifar100 are known. docs/data.md has all of them.
    source: {found.train}
    # Random crops and flips to size pixels, of at least a quarter of the image. Larger sizes take longer and see more.
    # Set flip: 0.0 if a mirrored image is a different thing, as with letters.
    transform: {{preset: train, size: {found.size}, area: [0.25, 1.0], flip: 0.5}}
{val}
"""


def _labeled() -> str:
    return """\
# The teacher is trained first, on the same images, and then the student learns from it. stage: distill does only the
# second, with a teacher that is trained already; stage: baseline trains the student alone, to compare with.
stage: all

# A small network that needs no download. Better teachers start from weights that others have trained:
#   teacher: {model: {timm: resnet50, pretrained: true}}           downloads ImageNet's weights; timm has 1000 more
#   teacher: {model: {timm: resnet50, checkpoint: teacher.pth}}    your own weights; then set stage: distill
#   teacher: {onnx: teacher.onnx}                                  a network from any framework; then set stage: distill
teacher: {model: {builtin: small_resnet, kwargs: {width: 32}}}

# What will be exported. Others: {timm: mobilenetv3_small_100, pretrained: true}, {torchvision: resnet18}, or your own
# function {factory: package.module:function}, which --plugin package.module allows.
student: {builtin: small_resnet, kwargs: {width: 16}}

# Also dkd, dist, cosine and others, each with a temperature and weights of its own.
distill: {loss: soft_target}

"""


def _unlabeled() -> str:
    return """\
# The images have no labels, so the student learns the features of a pretrained network. Its weights are downloaded;
# checkpoint: FILE in place of pretrained: true reads them from a file. num_classes: 0 means no head.
teacher: {model: {timm: vit_small_patch16_dinov3, num_classes: 0, pretrained: true}, input_adapter: auto}

# What will be exported. pretrained: true would start from ImageNet's weights.
student: {timm: resnet18, num_classes: 0}

# Labeled images, if you have some, say how good the features are: see docs/backbone.md for feature_probe.

"""


def _train(found: _Found) -> str:
    return f"""\
train:
  epochs: 30 # more usually helps; start with 2 to see that all works
  optimizer: {{name: adamw, lr: 1.0e-3, weight_decay: 0.05}} # or sgd with lr: 0.1 and momentum: 0.9
  schedule: {{kind: cosine, warmup_fraction: 0.05}}
  # precision: bf16-mixed # about twice as fast on recent GPUs
{"  # ema: {decay: 0.999} # export a moving average of the weights" if found.is_labeled else "  clip: 3.0"}
"""


def _written(path: str) -> str:
    is_plain = _PLAIN.fullmatch(path) and read_plain(path) == path  # null, true and 1e5 are no texts
    return path if is_plain else json.dumps(path, ensure_ascii=False)
