"""The callback that ends a training after some of its steps, to do no more of it again than is wanted."""

from pathlib import Path
from typing import Any, NoReturn

from kd_pipeline._core.optional import require

__all__ = ["StepsDone", "StopAfter"]

_callbacks = require("lightning.pytorch.callbacks", extra="train")


class StepsDone(Exception):  # no error
    """Ends a training that has taken all steps that were wanted."""


class StopAfter(_callbacks.Callback):  # type: ignore[misc, name-defined]
    """Ends the training after an optimizer step by `StepsDone`; at the end of an epoch before it is validated."""

    def __init__(self, step: int, save_to: Path) -> None:
        """End after `step`, and save there what a run continues from."""
        self._step, self._save_to = step, save_to

    @property
    def state_key(self) -> str:
        """A name for checkpoints, in which it keeps nothing."""
        return "StopAfter"

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it within an epoch."""
        if trainer.global_step >= self._step and not trainer.is_last_batch:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """End it after an epoch."""
        if trainer.global_step >= self._step:
            self._end(trainer)

    def _end(self, trainer: Any) -> NoReturn:
        trainer.save_checkpoint(self._save_to)
        raise StepsDone
