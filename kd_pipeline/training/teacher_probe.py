"""Judge the teacher by the first batches of a training, at no cost."""

from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.batch import KDBatch
from kd_pipeline.evaluation.probe import FirstBatches

__all__ = ["ProbeTeacher"]

_callbacks = require("lightning.pytorch.callbacks", extra="train")


class ProbeTeacher(_callbacks.Callback):  # type: ignore[misc, name-defined]
    """Shows the first batches of rank zero to a probe; it only warns, so the other ranks need not know."""

    def __init__(self, probe: FirstBatches) -> None:
        self._probe = probe

    def on_train_batch_start(self, trainer: Any, module: Any, batch: KDBatch, batch_idx: int) -> None:
        """Look at a batch until the probe has seen enough."""
        if trainer.is_global_zero and not self._probe.is_done:
            self._probe.add(batch)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Judge by what there was; an epoch may be short."""
        if trainer.is_global_zero:
            self._probe.finish()
