"""A picture of the first training batch, as the student sees it: wrong labels and colors show at once."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError
from kd_pipeline.report.grid import save_grid

__all__ = ["DrawFirstBatch"]

_logger = logging.getLogger("kd_pipeline")
_callbacks = require("lightning.pytorch.callbacks", extra="train")


class DrawFirstBatch(_callbacks.Callback):  # type: ignore[misc, name-defined]
    """Writes `first_batch.png` when a run starts from the beginning, on rank zero."""

    def __init__(self, path: Path, *, view: str, transform: Any, classes: Sequence[str] | None) -> None:
        """Draw `view` of the batch, which `transform` makes, into the file `path`."""
        self._path, self._view, self._transform, self._classes = path, view, transform, classes

    def on_train_batch_start(self, trainer: Any, module: Any, batch: KDBatch, batch_idx: int) -> None:
        """Draw the batch that is trained on first, if it has images; a file that cannot be written is a warning."""
        if trainer.global_step or batch_idx or not trainer.is_global_zero:
            return
        rows = batch.of_view(self._view) if self._view in (*batch.inputs, *batch.views) else batch
        images = rows.inputs.get("images")
        if images is None or images.ndim != 4 or images.shape[1] != 3:
            return
        try:
            save_grid(rows, self._path, transform=self._transform, classes=self._classes)
        except ConfigError as exc:
            _logger.warning("the first batch was not drawn: %s", exc)
