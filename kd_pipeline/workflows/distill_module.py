"""The student of a config with its loss, ready to be trained on the batches of a loader."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.own_loss import OwnLoss
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.training.memory_format import use_channels_last
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.own_optimizer import OwnOptimizer
from kd_pipeline.workflows.parts import Loss
from kd_pipeline.workflows.stage import check_sizes, loss_settings, num_classes_of, view_of

__all__ = ["build_distillation", "build_module"]

Module = TypeVar("Module", bound=DistillModule)


def build_module(
    kind: type[Module],
    config: Config,
    student: nn.Module,
    loader: AnyLoader,
    teacher: Teacher | Recording | None,
    *,
    plugins: Collection[str],
    identity: Mapping[str, Any],
    validate: Callable[[nn.Module], Mapping[str, Evaluation]],
    loss: Loss | None = None,
    optimizer: OwnOptimizer | None = None,
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
        loss: of the user's own, instead of that of the config.
        optimizer: of the user's own, instead of that of the config and its schedule.

    Raises:
        ConfigError: student, teacher and loss do not go together, or the loader has no length.
    """
    train, view = config.train, view_of(config, config.stage)
    distillation = build_distillation(config, student, loader, teacher, plugins=plugins, loss=loss)
    if train.strategy != "fsdp":  # which shards dense weights in the usual order only
        use_channels_last(
            student,
            train.channels_last,
            example=loader.example(view),
            device=loader.device,
            is_half=train.precision != "32-true",
        )
    num_batches = _epoch_length(loader, train.limit_train_batches)
    return kind(
        student,
        distillation,
        train,
        steps_per_epoch=math.ceil(num_batches / train.accumulate),
        teacher=teacher,
        identity=identity,
        validate=validate,
        plugins=plugins,
        optimizer=optimizer,
        view=view,
    )


def build_distillation(
    config: Config,
    student: nn.Module,
    loader: AnyLoader,
    teacher: Teacher | Recording | None,
    *,
    plugins: Collection[str],
    loss: Loss | None = None,
) -> Distillation:
    """The loss of a run, with new projectors; the arguments and errors are those of `build_module`."""
    if isinstance(loss, Distillation):
        return loss
    if loss is not None:
        return OwnLoss(loss, config.distill, ignore_index=loader.ignore_index)
    view = view_of(config, config.stage)
    if (views := getattr(loader, "all_views", None)) is not None:  # not of the user's own batches
        check_sizes(student, views[view])
    return Distillation(
        loss_settings(config, "teacher" if config.stage == "teacher" else "distill"),
        student=student,
        teacher_outputs=None if teacher is None else teacher.outputs,
        example=loader.example(view),
        num_classes=num_classes_of(loader, teacher),
        labels_are_soft=loader.labels_are_soft,
        ignore_index=loader.ignore_index,
        plugins=plugins,
    )


def _epoch_length(loader: AnyLoader, limit: int | None) -> int:
    """Batches of an epoch.

    Raises:
        ConfigError: the loader has no length, and there is no limit.
    """
    try:
        return min(len(loader), limit or len(loader))
    except TypeError:
        if limit is not None:
            return limit
    raise ConfigError(
        "train_batches has no length, and the schedule needs the number of batches of an epoch: set "
        "train.limit_train_batches to it, or give the object a __len__"
    )
