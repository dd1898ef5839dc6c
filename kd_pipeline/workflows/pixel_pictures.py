"""A picture of what a network for segmentation predicts on the first images of a split."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._logits import logits_of, run_on_view
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.models.modules import eval_mode
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
    *,
    view: str,
) -> None:
    """Write `predictions_<split>.png` for each split with masks: images, masks, and the classes of both models.

    They are those of the view that the student sees. A picture that cannot be written is a warning.
    """
    for split, evaluation in evaluations.items():
        if evaluation.miou is None:
            continue
        loader = open_loader(split)
        batch = loader.peek()
        with eval_mode(student):
            output, rows = run_on_view(student, batch, view)
        if "images" not in rows.inputs or rows.images.ndim != 4 or rows.images.shape[1] != 3:
            continue
        if teacher is not None:
            rows = teacher.with_outputs(batch).of_view(view)
        try:
            save_grid(
                rows,
                folder / f"predictions_{split}.png",
                transform=getattr(loader, "transform", None),
                classes=loader.classes,
                student=logits_of(output),
                ignore_index=loader.ignore_index,
            )
        except ConfigError as exc:
            _logger.warning("no predictions were drawn: %s", exc)
