"""The rows of the comparison with other programs: what each runs, on the same images and with the same teacher.

Pair A is a ResNet-50 that teaches a ResNet-18, by timm's `train.py` and by `kd-pipeline train`. Pair B is a ViT-S/16
whose embeddings and patches teach a ResNet-18 without labels, by lightly-train, by `kd-pipeline train` and by a loop of
one's own.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.optional import require
from kd_pipeline.bench.photographs import make_photographs
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.loader.loader import KDDataLoader

__all__ = [
    "LIGHTLY",
    "NAMES",
    "OURS",
    "TIMM",
    "Materials",
    "Row",
    "make_materials",
    "make_rows",
    "versions",
    "why_missing",
]

TIMM, LIGHTLY, OURS = "timm", "lightly-train", "kd_pipeline"
SIZE = 224
"""Height and width of the images that all models see."""

_NUM_CLASSES = 10
"""Class folders of `make_photographs`."""
_NUM_VAL = 64
_BRANCH = 0.2
"""Scale of the residual branches of the teacher; with 1, bf16 changes its logits by 5 %, and with 0.2 by 0.2 %."""
_NUM_FITTED = 32
"""Images from which the teacher's last layer is made."""
_ROOT = Path(__file__).parents[1]

_BF16 = ("train.precision=bf16-mixed",)
_BEST = ("train.compile=true", "teacher.precision=bf16")
"""What else may be faster: all other settings are chosen by themselves, as is bf16 for a teacher if its student has it.
timm's script has one precision for both."""
_INT8 = ("teacher.precision=int8",)
_STUDENT = ("stage=baseline",)
_TIMM_BF16 = ("--amp", "--amp-dtype", "bfloat16")
_TIMM_BEST = ("--torchcompile", "--channels-last")
_RECORDED = "teacher={backend: recorded, path: RECORDING}"

_OURS: Mapping[str, tuple[str, ...]] = {
    "ours-fp32": (),
    "ours-bf16": _BF16,
    "ours-best-fp32": _BEST,
    "ours-best-bf16": _BF16 + _BEST,
    "ours-int8": _BF16 + _INT8,
    "recorded-fp32": (_RECORDED,),
    "recorded-bf16": (*_BF16, _RECORDED),
    "student-fp32": _STUDENT,
    "student-bf16": _BF16 + _STUDENT,
}
"""Overrides of `kd-pipeline train`."""
_TEACHER: Mapping[str, tuple[str, ...]] = {"teacher-fp32": (), "teacher-bf16": _BF16, "teacher-int8": _BF16 + _INT8}
"""Overrides of `benchmarks.peers_teacher`: the teacher alone, opened as the row of ours opens it."""
_TIMM: Mapping[str, tuple[str, ...]] = {
    "timm-fp32": (),
    "timm-bf16": _TIMM_BF16,
    "timm-best-fp32": _TIMM_BEST,
    "timm-best-bf16": _TIMM_BF16 + _TIMM_BEST,
}
_LIGHTLY = {"lightly-fp32": "32-true", "lightly-bf16": "bf16-mixed"}
_BACKBONE: Mapping[str, tuple[str, ...]] = {"fp32": (), "bf16": (*_BF16, "teacher.precision=bf16")}
"""Overrides by precision; lightly-train has one for both networks. In float32, `auto` keeps the teacher in float32."""
_DISTILL = {f"distill-{precision}": options for precision, options in _BACKBONE.items()}
"""Overrides of `kd-pipeline train`."""
_LOOP = {f"loop-{precision}": options for precision, options in _BACKBONE.items()}
"""Overrides of `benchmarks.peers_backbone`."""

NAMES = (*_TIMM, *_OURS, *_TEACHER, *_LIGHTLY, *_DISTILL, *_LOOP)
"""Of all rows."""

_CONFIG = """\
run_dir: run
data:
  batch_size: {batch_size}
  train:
    source: {{kind: image_folder, root: {train}}}
    transform: {{preset: train, size: {size}, brightness: 0.4, contrast: 0.4, saturation: 0.4}}
  val:
    source: {{kind: image_folder, root: {val}}}
    transform: {{preset: eval, size: {size}}}
teacher: {{model: {{timm: resnet50, checkpoint: {checkpoint}}}}}
student: {{timm: resnet18}}
train:
  epochs: 1
  optimizer: {{name: sgd, lr: 0.0125, momentum: 0.9, weight_decay: 2.0e-5}}
"""
"""Augmentation and optimizer are what timm's script does without options."""
_BACKBONE_CONFIG = """\
run_dir: run
data:
  batch_size: {batch_size}
  train:
    source: {{kind: image_folder, root: {train}, labeled: false}}
    transform:
      preset: train
      size: {size}
      area: [0.14, 1.0]
      brightness: 0.4
      contrast: 0.4
      saturation: 0.2
      hue: 0.1
      grayscale: 0.2
      blur: 1.0
      blur_sigma: [0.01, 0.1]
teacher: {{model: {{timm: {teacher}, num_classes: 0, checkpoint: {backbone}}}}}
student: {{timm: resnet18, num_classes: 0}}
train:
  epochs: 1
  optimizer: {{name: adamw, lr: 1.0e-4}}
"""
"""Augmentation is close to the defaults of lightly-train. It has other losses, on the same outputs of the teacher."""
_BACKBONE_TEACHER = "vit_small_patch16_224"


@dataclass(frozen=True, slots=True)
class Row:
    """A program with its arguments."""

    name: str
    program: str
    """`TIMM`, `LIGHTLY` or `OURS`."""
    options: str
    """Its options besides those that all rows of the program have, to be shown."""
    command: tuple[str, ...]
    """Path of a Python, then a script or `-m` and a module, and their arguments."""
    variables: Mapping[str, str]
    """Environment variables of its own."""

    @property
    def needs_recording(self) -> bool:
        """Whether it replays what `record_row` records."""
        return _RECORDED in self.options


@dataclass(frozen=True, slots=True)
class Materials:
    """What all programs read."""

    images: Path
    """`train` and `val` below it have photographs in class folders."""
    teacher: Path
    """Folder of a ResNet-50, as timm's `local-dir:` takes it; kd_pipeline reads the `model.safetensors` in it."""
    config: Path
    """Of `kd-pipeline train`."""
    backbone: Path
    """Weights of a ViT-S/16 without a head."""
    backbone_config: Path
    """Of `kd-pipeline train` without labels."""
    recording: Path
    """Where the outputs of the teacher will be."""
    batch_size: int


def make_materials(folder: Path, *, batch_size: int, num_steps: int) -> Materials:
    """Write images for `num_steps` batches, the teacher and the config into an empty `folder`.

    Raises:
        MissingPackageError: scikit-learn, which has the photographs, or timm is not installed.
    """
    images = folder / "images"
    make_photographs(images / "train", num_files=batch_size * num_steps)
    make_photographs(images / "val", num_files=_NUM_VAL, seed=1)
    materials = Materials(
        images=images,
        teacher=folder / "teacher",
        config=folder / "config.yaml",
        backbone=folder / "backbone.pt",
        backbone_config=folder / "backbone.yaml",
        recording=folder / "recording",
        batch_size=batch_size,
    )
    _write_teacher(materials)
    _write_backbone(materials)
    texts = {
        "train": json.dumps(str(images / "train")),
        "val": json.dumps(str(images / "val")),
        "checkpoint": json.dumps(str(materials.teacher / "model.safetensors")),
        "teacher": _BACKBONE_TEACHER,
        "backbone": json.dumps(str(materials.backbone)),
    }
    for path, text in ((materials.config, _CONFIG), (materials.backbone_config, _BACKBONE_CONFIG)):
        path.write_text(text.format(batch_size=batch_size, size=SIZE, **texts))
    return materials


def make_rows(materials: Materials, names: Sequence[str], *, timm: Path | None, lightly: Path | None) -> list[Row]:
    """The rows with these names, except those whose program is None.

    Args:
        materials: what the programs read.
        names: some of `NAMES`.
        timm: timm's `train.py`.
        lightly: the Python of an environment with lightly-train.
    """
    rows = {}
    for name, options in _OURS.items():
        command = ("-m", "kd_pipeline", "train", "-c", str(materials.config), *_filled(options, materials))
        rows[name] = _own_row(name, command, shown=" ".join(options))
    for name, options in _TEACHER.items():
        command = ("-m", "benchmarks.peers_teacher", "-c", str(materials.config), *options)
        rows[name] = _own_row(name, command, shown=" ".join(("no student", *options)))
    backbone = ("-c", str(materials.backbone_config))
    for name, options in _DISTILL.items():
        shown = " ".join(("student without a head", *options))
        rows[name] = _own_row(name, ("-m", "kd_pipeline", "train", *backbone, *options), shown=shown)
    for name, options in _LOOP.items():
        shown = " ".join(("benchmarks/peers_backbone.py", *options))
        rows[name] = _own_row(name, ("-m", "benchmarks.peers_backbone", *backbone, *options), shown=shown)
    if timm is not None:
        for name, options in _TIMM.items():
            rows[name] = Row(name, TIMM, " ".join(options), (*_timm_command(timm, materials), *options), {})
    if lightly is not None:
        for name, precision in _LIGHTLY.items():
            command = (*_lightly_command(lightly, materials), f"precision={precision}")
            rows[name] = Row(name, LIGHTLY, f"precision={precision}", command, {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1"})
    return [rows[name] for name in NAMES if name in names and name in rows]


def record_row(materials: Materials) -> Row:
    """The command that writes `materials.recording`."""
    command = ("-m", "kd_pipeline", "record", "-c", str(materials.config), "--out", str(materials.recording))
    return _own_row("record", command, shown="")


def why_missing(names: Sequence[str], *, timm: Path | None, lightly: Path | None) -> dict[str, str]:
    """Programs of the rows with these names that cannot run here, with what to do."""
    missing = {}
    if not set(_TIMM) & set(names):
        pass
    elif timm is None:
        missing[TIMM] = "give --timm-script with the train.py of github.com/huggingface/pytorch-image-models"
    elif not timm.is_file():
        missing[TIMM] = f"--timm-script: there is no file {timm}; give that of the train.py of pytorch-image-models"
    if not set(_LIGHTLY) & set(names):
        pass
    elif lightly is None:
        missing[LIGHTLY] = "pip install lightly-train timm in an environment of its own, and give --lightly-python"
    elif not _lightly_script(lightly).is_file():
        missing[LIGHTLY] = (
            f"--lightly-python: there is no lightly-train beside {lightly}; give the bin/python of an environment "
            "in which you ran pip install lightly-train timm"
        )
    return missing


def versions(*, timm: Path | None, lightly: Path | None) -> dict[str, str]:
    """What identifies the programs of others."""
    found = {}
    if timm is not None:
        found["timm train.py, sha256"] = sha256(timm.read_bytes()).hexdigest()
    if lightly is not None:
        folders = [str(path) for path in lightly.parent.parent.glob("lib/python*/site-packages")]
        for package in ("lightly-train", "torch", "timm"):
            for distribution in metadata.distributions(name=package, path=folders):
                found[package if package == LIGHTLY else f"{package} of {LIGHTLY}"] = distribution.version
    return found


def environment_of(row: Row, cache: Path) -> dict[str, str]:
    """All variables of a row's process: caches and temporary files in `cache`, no GPU, no network, no buffering."""
    left_out = ("PYTHONPATH", "PYTHONSAFEPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    folders = {"XDG_CACHE_HOME": "user", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
    for folder in folders.values():
        (cache / folder).mkdir(parents=True, exist_ok=True)
    own = {name: str(cache / folder) for name, folder in folders.items()}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**inherited, **own, **fixed, **row.variables}


def _own_row(name: str, command: tuple[str, ...], *, shown: str) -> Row:
    return Row(name, OURS, shown, (sys.executable, *command), {"PYTHONPATH": str(_ROOT)})


def _filled(options: Sequence[str], materials: Materials) -> list[str]:
    return [option.replace("RECORDING", json.dumps(str(materials.recording))) for option in options]


def _timm_command(script: Path, materials: Materials) -> list[str]:
    return [
        sys.executable,
        str(script),
        *("--data-dir", str(materials.images), "--val-split", "val", "--model", "resnet18"),
        *("--num-classes", str(_NUM_CLASSES), "--kd-model-name", f"local-dir:{materials.teacher}"),
        *("--device", "cpu", "-b", str(materials.batch_size), "-j", str(num_cores()), "--epochs", "1"),
    ]


def _lightly_script(python: Path) -> Path:
    return python.parent / "lightly-train"


def _lightly_command(python: Path, materials: Materials) -> list[str]:
    return [
        str(python),
        str(_lightly_script(python)),
        "pretrain",
        "out=out",
        f"data={materials.images / 'train'}",
        "model=timm/resnet18",
        "method=distillation",
        f"method_args.teacher=timm/{_BACKBONE_TEACHER}",
        f"batch_size={materials.batch_size}",
        "epochs=1",
        f"num_workers={num_cores()}",
    ]


def _write_teacher(materials: Materials) -> None:
    """Write a ResNet-50 with random weights that tells the two photographs from each other, and weak residual branches.

    A random classifier decides by differences that no other precision keeps, and branches as strong as what they are
    added to, which no training leaves, add up their rounding errors: every runtime would be refused by the comparison
    with float32 that a run makes. The speed does not depend on the weights.
    """
    timm, torch_files = require("timm", extra="timm"), require("safetensors.torch", extra="timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet50", num_classes=_NUM_CLASSES, zero_init_last=False)
    images, is_second = _two_photographs(materials.images / "val")
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of these images, instead of a moving average
            if name.endswith(".bn3"):
                nn.init.constant_(module.weight, _BRANCH)
        network.train()(images)
        features = network.eval().forward_head(network.forward_features(images), pre_logits=True)
        _fit_classifier(network.get_classifier(), features, is_second)
    materials.teacher.mkdir()
    torch_files.save_file(network.state_dict(), str(materials.teacher / "model.safetensors"))
    described = {
        "architecture": "resnet50",
        "num_classes": _NUM_CLASSES,
        "pretrained_cfg": {
            "num_classes": _NUM_CLASSES,
            "input_size": [3, SIZE, SIZE],
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    (materials.teacher / "config.json").write_text(json.dumps(described))


def _write_backbone(materials: Materials) -> None:
    """Write the weights of a random ViT-S/16; lightly-train draws its own, which are as fast."""
    torch.manual_seed(0)
    network = require("timm", extra="timm").create_model(_BACKBONE_TEACHER, num_classes=0)
    torch.save(network.state_dict(), materials.backbone)


def _two_photographs(root: Path) -> tuple[Tensor, Tensor]:
    """Crops `[N, 3, H, W]` of two photographs, and which of them are of the second, `[N]` bool."""
    source = ImageFolder(root, labeled=False)
    transform = EvalTransform(size=SIZE)
    with KDDataLoader(source, transform, batch_size=_NUM_FITTED, shuffle=False, device="cpu") as loader:
        batch = next(iter(loader))
        numbers = [int(Path(source.name(index)).stem) for index in batch.index.tolist()]
        return batch.images.clone(), torch.tensor(numbers) % 2 == 1


def _fit_classifier(classifier: nn.Linear, features: Tensor, is_second: Tensor) -> None:
    """Let the classifier put the two groups of `features` `[N, D]` into classes 0 and 1, with logits around ±5."""
    direction = features[is_second].mean(0) - features[~is_second].mean(0)
    direction *= 10 / direction.square().sum()
    nn.init.zeros_(classifier.weight)
    nn.init.constant_(classifier.bias, -10.0)
    classifier.weight[0], classifier.weight[1] = -direction, direction
    middle = direction @ features.mean(0)
    classifier.bias[0], classifier.bias[1] = middle, -middle
