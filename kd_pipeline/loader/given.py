"""What the user may give a loader as source and teacher, and how it is opened."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.paths import Url
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import Shuffle
from kd_pipeline.data.plan import Shard, check_whole
from kd_pipeline.data.sources import Arrays, FileList, HuggingFace, ImageFolder, Parquet, Source, Tar, open_source
from kd_pipeline.data.sources.base import AnySourceSettings
from kd_pipeline.data.sources.containers import user_location
from kd_pipeline.data.sources.custom import check_source
from kd_pipeline.data.sources.files.paths import FileSource
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import ViewSettings
from kd_pipeline.errors import ConfigError, shown
from kd_pipeline.loader.batch_stream import BatchStream
from kd_pipeline.loader.calibration import at_largest, first_images, images_key, images_of_views
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording, open_recording
from kd_pipeline.teachers.settings import AnyTeacherSettings, TeacherSettings, is_recording

__all__ = ["check_arguments", "check_transform", "open_given_source", "open_given_teacher"]

_LISTS = (".csv", ".jsonl", ".tsv", ".txt")
_ARRAYS = (".npy", ".npz")
_NUM_CALIBRATED = 64


def open_given_source(source: Any, plugins: Collection[str] = ()) -> Source:
    """The source that a loader reads.

    Args:
        source: a source, its settings, or a path or URL: a folder of class folders, a list, arrays, or tar
            shards or Parquet files, also as a pattern.
        plugins: modules that the factory of a `custom` source may come from.

    Raises:
        ConfigError: it is nothing of this kind.
        DataError: the data is missing or malformed, or a source of the user's own is wrong.
    """
    match source:
        case FileSource() | Arrays() | HuggingFace() | Parquet() | Tar():
            return source
        case str() | os.PathLike():
            return _open_path(user_location(source))
        case _ if isinstance(source, get_args(AnySourceSettings)):
            return open_source(source, plugins=plugins)
        case _ if not hasattr(type(source), "read"):
            raise ConfigError(
                f"source is {_described(source)}; give a path (a folder of class folders, a list or arrays), a source "
                "such as ImageFolder(path) or one of your own (a BaseSource), or settings of one. Batches of your own, "
                "as of a torch DataLoader, are taken by BatchLoader"
            )
    return check_source(source, f"the source {type(source).__name__}")


def _open_path(path: Path | Url) -> Source:
    suffix = PurePosixPath(shown(path)).suffix.lower()
    if suffix in _LISTS:
        return FileList(path)
    if suffix in _ARRAYS:
        return Arrays(path)
    if suffix == ".tar":
        return Tar(path)
    if suffix == ".parquet":
        return Parquet(path)
    if isinstance(path, Path) and path.is_file():
        raise ConfigError(
            f"source is the file {path}; a list ends in {', '.join(_LISTS)}, arrays in {' or '.join(_ARRAYS)}, and "
            "shards in .tar or .parquet; name it so, or give a folder of class folders"
        )
    return ImageFolder(path)


def check_transform(transform: object) -> None:
    """Refuse what is no transform of ours.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(transform, TrainTransform | EvalTransform):
        raise ConfigError(
            f"transform is {_described(transform)}; give TrainTransform(size=224) or EvalTransform(size=224). Changes "
            "of your own are made by the argument prepare, on whole batches"
        )


def check_arguments(
    *, batch_size: object, seed: object, repeats: object, shard: object, mix: object, prepare: object, views: object
) -> None:
    """Refuse values of other types, before a teacher is opened for them.

    Raises:
        ConfigError: there is one, or a number is too small.
    """
    for name, value, low in (("batch_size", batch_size, 1), ("seed", seed, 0), ("repeats", repeats, 1)):
        check_whole(name, value, low)
    kinds: list[tuple[str, object, type, str]] = [
        ("shard", shard, Shard, "Shard(rank, world_size)"),
        ("mix", mix, MixSettings, "MixSettings(mixup=0.2)"),
        ("prepare", prepare, Callable, "a function that takes a batch and returns one"),  # type: ignore[list-item]
        ("views", views, Mapping, "a mapping of settings by name, such as {'small': EvalView(size=96)}"),
    ]
    for name, value, kind, advice in kinds:
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} is {_described(value)}; give {advice}, or None")


def open_given_teacher(
    teacher: Any,
    source: Source,
    transform: TrainTransform | EvalTransform,
    views: Mapping[str, ViewSettings],
    view: str | None,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    shuffle: Shuffle,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
) -> Teacher | Recording:
    """Open the teacher of a loader for its images, with logits in the order of the source's classes.

    Args:
        teacher: a module, or settings.
        source: the samples.
        transform: makes the images.
        views: of the loader.
        view: that the teacher sees, of a module; its settings say it themselves.
        device: of the images.
        batch_size: images in a call.
        seed: of the loader.
        shuffle: of the loader.
        plugins: modules that a model's factory may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.

    Raises:
        ConfigError: it is neither.
        TeacherError: it cannot be opened, or has other classes.
    """
    module = teacher if isinstance(teacher, nn.Module) else None
    settings = TeacherSettings(view=view or IMAGES) if module is not None else teacher
    if not isinstance(settings, get_args(AnyTeacherSettings)):
        raise ConfigError(
            f"teacher is {_described(teacher)}; give an nn.Module, settings such as "
            'TeacherSettings(onnx="teacher.onnx"), an open teacher of open_teacher(...), a Recording, or None'
        )
    if module is None and view is not None:
        raise ConfigError(f"teacher_view is {view!r} and the teacher is settings; set their own view to it instead")
    if is_recording(settings):
        return open_recording(settings)

    def first(view: str) -> Tensor:
        stream = BatchStream(
            source,
            transform.at_size(),
            views=at_largest(views),
            shown_views=(view,),
            batch_size=min(batch_size, _NUM_CALIBRATED),
            seed=seed,
            shuffle=shuffle,
            shard=Shard(),
            last_batch="keep",
            device=device,
            plugins=plugins,
        )
        with stream:
            return first_images(stream, _NUM_CALIBRATED, view)

    def key(view: str) -> str:
        return images_key(source, transform, seed=seed, shuffle=shuffle, views=views, view=view)

    opened = open_teacher(
        settings,
        module=module,
        device=device,
        batch_size=batch_size,
        plugins=plugins,
        trust_engines=trust_engines,
        views=images_of_views(transform, views, first=first, key=key),
    )
    try:
        return match_classes(opened, source.classes)
    except BaseException:
        opened.close()
        raise


def _described(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return f"an object of type {type(value).__name__}"
