"""What a stage says about itself: what learns from what, how much of it, and where; and what its results lack."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kd_pipeline._core.ranks import world_size
from kd_pipeline._core.secret_values import hide_in_settings
from kd_pipeline._core.terminal_log import log_line
from kd_pipeline._core.text import counted
from kd_pipeline.batch import rows_name
from kd_pipeline.config.config import Config
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.stage import Stage

__all__ = ["no_row_of", "tell_start"]


def tell_start(
    stage: Stage,
    config: Config,
    module: DistillModule,
    loader: Any,
    validation: Mapping[str, Any],
    *,
    folder: RunFolder,
    resumed: str = "",
) -> None:
    """Log lines, each with its title; call it on one rank.

    Args:
        stage: what is trained.
        config: of the run.
        module: the student and its loss.
        loader: of the training.
        validation: the other loaders by split.
        folder: of the stage.
        resumed: where from, if it is.
    """
    teacher = loader.teacher
    parts = {
        "stage": stage,
        "teacher": "" if teacher is None else _teacher_text(config, teacher),
        "teacher" if stage == "teacher" else "student": _student_text(stage, config, module.student),
        rows_name(loader.example()): _rows_text(loader, validation),
        "epochs": _epochs_text(config, loader),
        "device": _device_text(config, loader.device),
        "folder": f"{folder.path}, run {folder.run_id}",
        "resumed": resumed,
    }
    for title, text in parts.items():
        if text:
            log_line(f"{title:<9}{text}")


def no_row_of(recording: Recording, splits: Iterable[str]) -> str:
    """Why a table of results has no row of the teacher, and how to see one."""
    teacher = recording.manifest.teacher
    return (
        f"no row of the teacher ({teacher.backend}, {teacher.precision}): {recording.path} has its outputs for the "
        f"training images alone; kd-pipeline eval -c CONFIG with the teacher itself evaluates it on {', '.join(splits)}"
    )


def _teacher_text(config: Config, teacher: Teacher | Recording) -> str:
    if isinstance(teacher, Recording):
        return f"recorded in {teacher.path}"
    settings = config.teacher
    name = "" if not isinstance(settings, TeacherSettings) else _source_name(settings)
    parts = [name, _parameters_text(teacher.num_parameters), " and ".join(dict.fromkeys(teacher.runtimes))]
    return ", ".join(filter(None, parts))


def _source_name(settings: TeacherSettings) -> str:
    if settings.model is not None:
        return _model_name(settings.model)
    file = settings.onnx or settings.engine
    return "" if file is None else file.name


def _student_text(stage: Stage, config: Config, student: nn.Module) -> str:
    settings = config.student
    if stage == "teacher":
        settings = config.teacher.model if isinstance(config.teacher, TeacherSettings) else None
    parameters = [*student.parameters()]
    count = sum(each.numel() for each in parameters)
    frozen = sum(each.numel() for each in parameters if not each.requires_grad)
    name = type(student).__name__ if settings is None else _model_name(settings)
    return ", ".join(filter(None, [name, _parameters_text(count), f"{frozen:,} of them frozen" if frozen else ""]))


def _model_name(settings: ModelSettings) -> str:
    """The name that it is built by, with the arguments that tell it from others, but for secrets."""
    name = settings.timm or settings.torchvision or settings.builtin or settings.factory or ""
    name = name if settings.head is None else f"{name} with a head for {settings.head}"
    arguments = ", ".join(f"{key}={value}" for key, value in hide_in_settings(settings.kwargs).items())
    return f"{name}({arguments})" if arguments else name


def _parameters_text(number: int | None) -> str:
    return "" if number is None else f"{number:,} parameters"


def _rows_text(loader: Any, validation: Mapping[str, Any]) -> str:
    """How many rows each split has, as far as its loader knows, and the classes."""
    counts = {"train": loader, **validation}
    parts = [f"{split} {number:,}" for split, each in counts.items() if (number := _num_rows(each)) is not None]
    if loader.num_classes is not None:
        lacks = "" if loader.has_labels or loader.has_masks else ", no labels for training"
        parts.append(f"{counted(loader.num_classes, 'class')}{' of pixels' if loader.has_masks else ''}{lacks}")
    elif not loader.has_labels and not loader.has_masks:
        parts.append("no labels")
    return ", ".join(parts)


def _num_rows(loader: Any) -> int | None:
    """The rows of a split; a user's own loader may not know them."""
    for attribute in ("source", "dataset"):
        try:
            return len(getattr(loader, attribute))
        except (AttributeError, TypeError):
            continue
    return None


def _epochs_text(config: Config, loader: Any) -> str:
    settings = config.train
    try:
        num_batches: int | None = len(loader)
    except TypeError:
        num_batches = None
    if settings.limit_train_batches is not None:
        num_batches = min(settings.limit_train_batches, num_batches or settings.limit_train_batches)
    num_steps = None if num_batches is None else -(-num_batches // settings.accumulate)
    steps = "" if num_steps is None else f" ({counted(num_steps, 'step')} each)"
    batch = "" if loader.batch_size is None else f", batch size {loader.batch_size:,}"
    if world_size() > 1:
        batch += f" on each of {world_size()} processes"
    if settings.accumulate > 1:
        batch += f", {settings.accumulate} batches per step"
    return f"{settings.epochs:,}{steps}{batch}"


def _device_text(config: Config, device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    compiled = ", compiled" if config.train.compile else ""
    return f"{device}{name}, {config.train.precision}{compiled}"
