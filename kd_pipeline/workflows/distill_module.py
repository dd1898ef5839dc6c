"""The student of a config with its loss, ready to be trained on the batches of a loader."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.training.memory_format import use_channels_last
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows.stage import loss_settings, num_classes_of

__all__ = ["build_distillation", "build_module"]

Module = TypeVar("Module", bound=DistillModule)


def build_module(
    kind: type[Module],
    config: Config,
    student: nn.Module,
    loader: KDDataLoader,
    teacher: Teacher | Recording | None,
    *,
    plugins: Collection[str],
    identity: Mapping[str, Any],
    validate: Callable[[nn.Module], Mapping[str, Evaluation]],
) -> Module:
    """Wrap `student`, whose weights are put into the memory order that `train.channels_last` asks for.

    Args:
        kind: `DistillModule`, or a class that measures it.
        config: of the run.
        student: maps images `[N, 3, H, W]` to logits `[N, K]`.
        loader: of the training images.
        teacher: whose outputs the batches have.
        plugins: modules that losses and optimizers may come from.
        identity: what identifies the run, to save in its checkpoints.
        validate: evaluates a model on every validation set, by name.

    Raises:
        ConfigError: student, teacher and loss do not go together.
    """
    train = config.train
    distillation = build_distillation(config, student, loader, teacher, plugins=plugins)
    if train.strategy != "fsdp":  # which shards dense weights in the usual order only
        use_channels_last(
            student,
            train.channels_last,
            example=loader.example(),
            device=loader.device,
            is_half=train.precision != "32-true",
        )
    num_batches = min(len(loader), train.limit_train_batches or len(loader))
    return kind(
        student,
        distillation,
        train,
        steps_per_epoch=math.ceil(num_batches / train.accumulate),
        teacher=teacher,
        identity=identity,
        validate=validate,
        plugins=plugins,
    )


def build_distillation(
    config: Config,
    student: nn.Module,
    loader: KDDataLoader,
    teacher: Teacher | Recording | None,
    *,
    plugins: Collection[str],
) -> Distillation:
    """The loss of a run, with new projectors; the arguments and errors are those of `build_module`."""
    return Distillation(
        loss_settings(config, "teacher" if config.stage == "teacher" else "distill"),
        student=student,
        teacher_outputs=None if teacher is None else teacher.outputs,
        example=loader.example(),
        num_classes=num_classes_of(loader.source, teacher),
        labels_are_soft=loader.mix is not None,
        plugins=plugins,
    )
