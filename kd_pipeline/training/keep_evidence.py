"""The callback that writes a run's evidence while it trains."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.training.evidence import FIRST_STEPS, StartLine, describe_batch, describe_weights, is_kept
from kd_pipeline.training.sharding import is_sharded

__all__ = ["KeepEvidence"]

_callbacks = require("lightning.pytorch.callbacks", extra="train")


class KeepEvidence(_callbacks.Callback):  # type: ignore[misc, name-defined]
    """Appends a line for each start, for a few batches, and for the weights after the first steps and each epoch.

    Only rank zero has it. It comes before the callbacks that save, so a checkpoint is never ahead of its evidence, and
    changes nothing: neither weights nor a random state.
    """

    def __init__(self, append: Callable[[str], None], *, seed: int, start: Callable[[int], StartLine]) -> None:
        """Keep the evidence of a run.

        Args:
            append: adds a line to the file.
            seed: of the run.
            start: the line of a start after so many steps.
        """
        self._append, self._seed, self._start = append, seed, start
        self._written_step = -1
        """Of the last line about weights."""

    @property
    def state_key(self) -> str:
        """A name for checkpoints, in which it keeps nothing."""
        return "KeepEvidence"

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Write how the run starts."""
        self._write(self._start(trainer.global_step))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: KDBatch, batch_idx: int) -> None:
        """Write what a batch held and led to, if it is one of those."""
        epoch, step = trainer.current_epoch, trainer.global_step
        if is_kept(self._seed, epoch, batch_idx, trainer.num_training_batches):
            terms: Mapping[str, Tensor] = module.last_terms
            self._write(describe_batch(batch, epoch=epoch, number=batch_idx, step=step, terms=terms))
        if step == FIRST_STEPS:
            self._write_weights(trainer, module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the weights that the checkpoints of this epoch hold."""
        self._write_weights(trainer, module)

    def _write_weights(self, trainer: Any, module: Any) -> None:
        step = trainer.global_step
        if step == self._written_step or is_sharded(module.student):
            return
        self._written_step = step
        parts = {"student": module.network.state_dict(), "loss": module.distillation.state_dict()}
        if module.ema is not None:
            parts["ema"] = module.ema.student.state_dict()
        self._write(describe_weights(parts, epoch=trainer.current_epoch, step=step))

    def _write(self, line: Settings) -> None:
        self._append(line.model_dump_json())
