"""The accuracy on the training batches of an epoch, counted without waiting for the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_pipeline._core.finite import has_softmax
from kd_pipeline.batch import KDBatch
from kd_pipeline.losses.distillation import Distillation

__all__ = ["TrainAccuracy"]


class TrainAccuracy:
    """Counts for `train/top1`, or for `train/pixel_accuracy` at the size of the logits."""

    def __init__(self) -> None:
        self._name = "top1"
        self._counts: Tensor | None = None
        """`[2]`, correct and valid rows, or pixels of them, of the epoch so far."""

    def start_epoch(self) -> None:
        """Count from 0 again."""
        self._counts = None

    def add(self, outputs: Mapping[str, Tensor], batch: KDBatch, distillation: Distillation) -> None:
        """Count a batch, if the student has logits and the batch labels or masks for them."""
        logits = outputs.get("logits")
        if logits is None or logits.ndim not in (2, 4):
            return
        if logits.ndim == 4 and batch.masks is not None:
            labels, counts = distillation.pixels(batch.masks).at((logits.shape[2], logits.shape[3]))
            valid, self._name = counts & batch.valid[:, None, None], "pixel_accuracy"
        elif logits.ndim == 2 and batch.labels is not None:
            labels = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
            valid = batch.valid
        else:
            return
        # The top class of a row with NaN is arbitrary.
        is_correct = logits.argmax(1).eq(labels) & has_softmax(logits)
        sums = torch.stack([(is_correct & valid).sum(), valid.sum()])
        self._counts = sums if self._counts is None else self._counts + sums

    def of_epoch(self, trainer: Any) -> dict[str, Tensor]:
        """The metric of all ranks by its name in logs; nothing if nothing was counted."""
        if self._counts is None:
            return {}
        correct, valid = trainer.strategy.reduce(self._counts.float(), reduce_op="sum")
        return {f"train/{self._name}": correct / valid.clamp(min=1)}
