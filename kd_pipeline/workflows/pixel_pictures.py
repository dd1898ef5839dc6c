"""A picture of what a network for segmentation predicts on the first images of a split."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._logits import inputs_for, logits_of
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.models.modules import call_network, eval_mode
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.base import Teacher

__all__ = ["draw_predictions"]

_logger = logging.getLogger("kd_pipeline")


@torch.no_grad()
def draw_predictions(
    folder: Path,
    student: nn.Module,
    teacher: Teacher | None,
    open_loader: Callable[[str], AnyLoader],
    evaluations: Mapping[str, Evaluation],
) -> None:
    """Write `predictions_<split>.png` for each split with masks: images, masks, and the classes of both models.

    A picture that cannot be written is a warning.
    """
    for split, evaluation in evaluations.items():
        if evaluation.miou is None:
            continue
        loader = open_loader(split)
        batch = loader.peek()
        if "images" not in batch.inputs or batch.images.ndim != 4 or batch.images.shape[1] != 3:
            continue
        with eval_mode(student):
            logits = logits_of(call_network(student, inputs_for(student, batch.input)))
        if teacher is not None:
            batch = batch.replace(teacher=teacher(batch.input))
        try:
            save_grid(
                batch,
                folder / f"predictions_{split}.png",
                transform=getattr(loader, "transform", None),
                classes=loader.classes,
                student=logits,
                ignore_index=loader.ignore_index,
            )
        except ConfigError as exc:
            _logger.warning("no predictions were drawn: %s", exc)
