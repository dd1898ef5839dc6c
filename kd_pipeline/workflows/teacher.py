"""The teacher of a run: what its config names, with the weights that `stage: teacher` has left in the run's folder."""

import logging
from collections.abc import Collection
from pathlib import Path

import torch

from kd_pipeline._core.device import resolve_device
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import sample_images
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.exported import ABOUT, ONNX, WEIGHTS, read_exported

__all__ = ["begins_without_teacher", "open_run_teacher", "refuse_adapter", "with_trained_weights"]

_logger = logging.getLogger("kd_pipeline")


def begins_without_teacher(config: Config) -> bool:
    """Whether the stage of `config` trains a teacher first, or the student alone."""
    if config.stage == "all":
        return config.run_dir is None or not _is_trained(config.run_dir)
    return config.stage != "distill"


def open_run_teacher(config: Config, *, plugins: Collection[str] = ()) -> Teacher:
    """Open the teacher of `config` for its training images; whoever asks closes it.

    Args:
        config: the whole run, with `data.train`.
        plugins: modules that factories in the config may come from.

    Raises:
        ConfigError: the config has no teacher, or one without weights.
        TeacherError: the teacher is not what the config says.
    """
    teacher = config.teacher
    if teacher is None:
        raise ConfigError("stage: distill needs a teacher: set teacher, or take stage: baseline")
    if isinstance(teacher, TeacherSettings):
        teacher = with_trained_weights(config, teacher)
    images = config.data.split("train").transform
    return open_teacher(
        teacher,
        image_shape=(3, images.size, images.size),
        device=resolve_device(config.data.device),
        dtype=getattr(torch, images.dtype),
        normalization=Normalization(images.mean, images.std),
        batch_size=config.data.batch_size,
        samples=lambda: sample_images(config),
        plugins=plugins,
    )


def with_trained_weights(config: Config, teacher: TeacherSettings) -> TeacherSettings:
    """A teacher by `model` with the weights that `stage: teacher` of this run has left, else with its own.

    Raises:
        ConfigError: there are neither, or the trained one would get other images.
    """
    model = teacher.model
    if model is None or config.run_dir is None:
        return teacher
    exported = _exported(config.run_dir)
    weights = exported / WEIGHTS
    if not _is_trained(config.run_dir):
        if model.pretrained or (model.checkpoint is not None and not model.reset):
            return teacher
        raise ConfigError(
            "teacher.model has no weights: set its checkpoint or pretrained, or train it first with stage=teacher, "
            f"which leaves them in {weights}"
        )
    refuse_adapter(teacher)
    found = read_exported(exported)
    assert found is not None
    _logger.info("the teacher is the one that this run has trained, in %s", exported)
    runs_modules = teacher.backend == "pytorch" or teacher.features or config.student_from_teacher
    if not runs_modules and (exported / ONNX).is_file() and resolve_device(config.data.device).type == "cpu":
        return teacher.model_copy(update={"model": None, "onnx": exported / ONNX})
    return teacher.model_copy(update={"model": found[1].model.model_copy(update={"checkpoint": weights})})


def refuse_adapter(teacher: TeacherSettings) -> None:
    """See that a teacher that is trained in a run gets the images of that run.

    Raises:
        ConfigError: it would get others.
    """
    if teacher.input_adapter is not None:
        raise ConfigError(
            "teacher.input_adapter is for a teacher that was trained on other images, and stage: teacher trains it on "
            "those of this run; remove it, or take a run_dir without a trained teacher"
        )


def _exported(run_dir: Path) -> Path:
    """Where `stage: teacher` leaves the teacher."""
    return RunFolder(run_dir / "teacher").exported


def _is_trained(run_dir: Path) -> bool:
    return (_exported(run_dir) / ABOUT).is_file()
