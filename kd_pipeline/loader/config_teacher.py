"""The teacher of a config, opened for the images of one of its splits, and these images."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.device import resolve_device
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Source
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.batch_stream import BatchStream
from kd_pipeline.loader.calibration import at_largest, first_images, images_key, images_of_views
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE, open_split, split_arguments
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording, open_recording
from kd_pipeline.teachers.settings import AnyTeacherSettings, StudentPrecision, is_recording, members_of

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["open_config_teacher", "recorded_view", "sample_images"]


def open_config_teacher(
    config: "Config",
    classes: Sequence[str] | None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    split: str = "train",
    source: Source | None = None,
    student_precision: StudentPrecision | None = None,
) -> Teacher | Recording:
    """Open the teacher of `config` for the images of a split.

    Args:
        config: with the split and `teacher`.
        classes: those of the data, whose order the logits get. Logits that the loss does not use and that do not match
            them are left out.
        batch_size: images in a call; defaults to the config's.
        device: of the images; defaults to the config's.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        split: whose transform and views make the images.
        source: the open source of the split, to save the time of listing it, and to know how many images there are.
        student_precision: in which the student trains, if the teacher is to follow it.

    Raises:
        ConfigError: the config has no teacher that can be opened.
        TeacherError: the teacher is not what the config says, or has different classes.
    """
    if config.teacher is None:
        raise ConfigError("there is no teacher to open: set teacher")
    if is_recording(config.teacher):
        recording = open_recording(config.teacher)
        recording.check_classes(classes)
        return recording
    settings = config.data.split(split)
    batch_size = batch_size or config.data.batch_size
    training = source if split == "train" else None
    shuffle = split_arguments(config, split, {})["shuffle"]
    for member in members_of(config.teacher):
        config.data.view(split, member.view)

    def first(view: str) -> Tensor:
        return sample_images(config, split, training=training, plugins=plugins, view=view)

    def key(view: str) -> str | None:
        if source is None:
            return None
        transform, views = settings.transform, settings.views
        return images_key(source, transform, seed=config.seed, shuffle=shuffle, views=views, view=view)

    teacher = open_teacher(
        config.teacher,
        device=resolve_device(device or config.data.device),
        batch_size=batch_size,
        student_precision=student_precision,
        num_images=None if source is None else _num_images(config, split, source, batch_size),
        plugins=plugins,
        trust_engines=trust_engines,
        views=images_of_views(settings.transform, settings.views, first=first, key=key),
        strict=config.probe is not None and config.probe.strict,
    )
    try:
        return match_classes(teacher, classes, used=config.used_outputs(teacher.outputs))
    except BaseException:
        teacher.close()
        raise


def sample_images(
    config: "Config",
    split: str = "train",
    *,
    num_images: int = 64,
    training: Source | None = None,
    plugins: Collection[str] = (),
    view: str = IMAGES,
) -> Tensor:
    """The first images of a view of a split, but unmixed: `[num_images, 3, H, W]` float32 on the CPU.

    There are fewer if the split has fewer. They depend on seed and dataset only. `training` is the open source of the
    split `train`, to save the time of listing it, and `plugins` are the modules that sources may come from.

    Raises:
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    arguments = split_arguments(config, split, EACH_IMAGE_ONCE)
    arguments["batch_size"] = min(config.data.batch_size, num_images)  # reads no more than needed
    config.data.view(split, view)
    source = open_split(config, split, training=training, plugins=plugins)
    settings = config.data.split(split)
    arguments |= {"views": at_largest(settings.views), "shown_views": (view,)}
    transform = settings.transform.at_size()
    with BatchStream(source, transform, shard=Shard(), plugins=plugins, **arguments) as stream:
        return first_images(stream, num_images, view)


def recorded_view(teacher: AnyTeacherSettings) -> str | None:
    """The view that the settings of a recording say it is of; None if they leave that to the recording."""
    return teacher.view if is_recording(teacher) and "view" in teacher.model_fields_set else None


def _num_images(config: "Config", split: str, source: Source, batch_size: int) -> int:
    """How many images of the split a teacher will get: in a whole training, or in one pass."""
    num_images = len(source) * config.data.split(split).repeats
    if split != "train":
        return num_images
    limit = config.train.limit_train_batches
    return config.train.epochs * (num_images if limit is None else min(num_images, limit * batch_size))
