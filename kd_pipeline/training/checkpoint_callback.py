"""When a Lightning training writes its checkpoints, and how."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline.errors import ConfigError, NonFiniteError
from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kd_pipeline.training.nonfinite import check_weights
from kd_pipeline.training.rng import capture_rng, restore_rng
from kd_pipeline.training.top_students import TopStudents

__all__ = ["AtomicCheckpointIO", "SaveLastAndBest", "is_resumable_after"]

_logger = logging.getLogger(__name__)
_callbacks = require("lightning.pytorch.callbacks", extra="train")
_plugins = require("lightning.fabric.plugins", extra="train")


class AtomicCheckpointIO(_plugins.CheckpointIO):  # type: ignore[misc, name-defined]
    """Lightning's file access by `save_checkpoint` and `load_checkpoint`, for `Trainer(plugins=...)`.

    Lightning itself writes to TMPDIR and moves the file. If that is on a different disk, the move is a copy: a kill
    truncates it, and a full disk loses the previous file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file atomically."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file without running code, whatever `weights_only` says."""
        return load_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file if it exists."""
        Path(path).unlink(missing_ok=True)


class SaveLastAndBest(_callbacks.Checkpoint):  # type: ignore[misc, name-defined]
    """Keeps `last.ckpt`, `best.ckpt` and the best student alone as `best_student.pt`; weights with NaN or inf never.

    With `average_best`, `best_student.pt` is the mean of several, which are kept in the folder `top`.

    Lightning calls a `Checkpoint` after all other callbacks, so their changes are in the file. Hooks of the
    `LightningModule` at the end of a batch run later still.

    Lightning's `ModelCheckpoint` does not fit. With `every_n_train_steps` it also saves after the last batch of an
    epoch, counts that as the epoch's save, and a run that resumes from it never catches up. It saves per step or per
    epoch, not both, accepts NaN as a score, and forgets the best score if the folder was moved.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        student: Callable[[], dict[str, Tensor]],
        monitor: str | None,
        mode: Literal["max", "min"] = "max",
        defaults: Mapping[str, Literal["max", "min"]] | None = None,
        every_n_steps: int | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
        validate_every_n_steps: int | None = None,
        is_measured: Callable[[str], bool] = lambda metric: True,
        average_best: int | None = None,
    ) -> None:
        """Save into `folder` at the end of every epoch.

        Args:
            folder: created if missing.
            student: returns the weights that `monitor` was measured with (the EMA's, if there is one).
            monitor: metric that selects the best student; None keeps no best.
            mode: whether a higher or a lower value is better.
            defaults: without `monitor`, metrics with their modes of which the first that a validation returns is it.
            every_n_steps: optimizer steps between saves of `last.ckpt` within an epoch; None saves at its end only.
            validate: validates, logs the metrics and returns them; for validation within an epoch.
            validate_every_n_steps: optimizer steps between these validations; None for none.
            is_measured: whether the last validation measured a metric. Lightning keeps the value of an earlier one.
            average_best: let `best_student.pt` be the mean of so many of the best students.
        """
        self._folder, self._student, self._every_n_steps = Path(folder), student, every_n_steps
        self.monitor, self._mode = monitor, mode
        self._defaults = defaults if monitor is None else None
        self._validate, self._validate_every_n_steps = validate, validate_every_n_steps
        self._is_measured = is_measured
        self._top = None if average_best is None else TopStudents(Path(folder) / "top", average_best)
        self._rng: list[dict[str, Any]] | None = None
        self.best_score = -math.inf if mode == "max" else math.inf
        self.best_epoch: int | None = None
        """The epoch of the best score, counted from 1; None before there is one."""
        self.validated_step = -1
        """After which the last validation within an epoch was."""

    def state_dict(self) -> dict[str, Any]:
        """The best score with its metric, and the random state of all ranks; call it on all ranks."""
        score = {
            "monitor": self.monitor,
            "mode": self._mode,
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
        }
        top = {} if self._top is None else {"top": self._top.state_dict()}
        return {**score, **top, "rng": capture_rng()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best score, unless it is of a different metric, and at `on_train_start` the random state."""
        if self._defaults and state["monitor"] in self._defaults:
            self._select_by(state["monitor"])
        if (state["monitor"], state["mode"]) == (self.monitor, self._mode):
            self.best_score, self.best_epoch = state["best_score"], state["best_epoch"]
            if self._top is not None:
                self._top.load_state_dict(state.get("top", ()))
        else:
            _logger.warning("best score reset: it was %s (%s) before", state["monitor"], state["mode"])
        self._rng = state["rng"]

    def save_last(self, trainer: Any) -> None:
        """Save `last.ckpt` now; call it on all ranks.

        Raises:
            NonFiniteError: a weight is NaN or inf; the file is the old one.
            StateError: it cannot be written.
        """
        self._save(trainer, "last.ckpt")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Restore the random state."""
        if self._rng is not None:
            restore_rng(self._rng)
            self._rng = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Validate and save within an epoch, the save second: it then includes the validation."""
        if not is_resumable_after(trainer, batch_idx):
            return
        step = trainer.global_step
        if self._validate is not None and _is_due(step, self._validate_every_n_steps):
            self._save_if_best(trainer, self._validate())
            self.validated_step = step
        if _is_due(step, self._every_n_steps):
            self.save_last(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Save the epoch, and the student too if it is the best so far.

        Raises:
            ConfigError: the metric was not logged.
            NonFiniteError: a weight is NaN or inf; the files are the old ones.
            StateError: a file cannot be written.
        """
        self._save_if_best(trainer, trainer.callback_metrics)
        self.save_last(trainer)

    def _save_if_best(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        """Before last.ckpt, which holds the best score: a run killed in between validates again."""
        score = self._score(trainer, metrics)
        if score is None:
            return
        rank = score if self._mode == "max" else -score
        enters = self._top is not None and self._top.takes(rank)
        is_best = self._is_best(trainer, score)
        if is_best or enters:
            student = self._student()  # on all ranks, as they may have to gather it
            if bad := [name for name, tensor in student.items() if tensor.is_floating_point() and tensor.isnan().any()]:
                raise NonFiniteError(
                    f"the student with the best {self.monitor} has NaN in {bad[0]!r}, so it was not saved; earlier "
                    "checkpoints are intact"
                )
            if self._top is not None:
                self._top.note(rank, trainer.global_step)
            if is_best:
                self._save(trainer, "best.ckpt")
            if trainer.is_global_zero:
                if self._top is not None:
                    student = self._top.write(trainer.global_step, student)
                save_checkpoint(student, self._folder / "best_student.pt")

    def _save(self, trainer: Any, name: str) -> None:
        check_weights(trainer.lightning_module, trainer, before=f"{name} was written")
        trainer.save_checkpoint(self._folder / name)

    def _select_by(self, metric: str) -> None:
        """Select by one of the defaults from now on."""
        assert self._defaults is not None
        self.monitor, self._mode = metric, self._defaults[metric]
        self._defaults = None
        self.best_score = -math.inf if self._mode == "max" else math.inf
        if self._top is not None:
            self._top.forget()

    def _settle_default(self, metrics: Mapping[str, Any]) -> None:
        """Choose the metric by what the first validation returned, and say so."""
        assert self._defaults is not None
        found = next((name for name in self._defaults if name in metrics), None)
        if found is not None:
            self._select_by(found)
            order = "higher" if self._mode == "max" else "lower"
            _logger.info("the best student is selected by %s (%s is better)", found, order)
            return
        known = ", ".join(sorted(name for name in metrics if "/" in name and not name.startswith("train/")))
        names = ", ".join(self._defaults)
        _logger.info("validation returned %s and none of %s, so the last student is the result", known, names)
        self._defaults = None

    def _score(self, trainer: Any, metrics: Mapping[str, Any]) -> float | None:
        """The metric that selects the best; None if it was not measured."""
        if self._defaults:
            self._settle_default(metrics)
        if self.monitor is None or not self._is_measured(self.monitor):
            return None
        if self.monitor not in metrics:
            known = ", ".join(sorted(name for name in metrics if "/" in name))
            raise ConfigError(f"no metric {self.monitor!r} to select the best by; there are {known}")
        # Rank zero decides for all: they save together, and the last digits may differ between ranks.
        score: float = trainer.strategy.broadcast(float(metrics[self.monitor]))
        return score

    def _is_best(self, trainer: Any, score: float) -> bool:
        if math.isnan(score):
            _logger.warning("%s is NaN after %d steps, which is never the best", self.monitor, trainer.global_step)
        is_better = score > self.best_score if self._mode == "max" else score < self.best_score
        if is_better:
            self.best_score, self.best_epoch = score, trainer.current_epoch + 1
        return is_better


def is_resumable_after(trainer: Any, batch_idx: int) -> bool:
    """Whether a checkpoint saved at the end of this training batch would resume exactly.

    Not within gradient accumulation, because gradients are not saved. Not after the last batch of an epoch, because
    Lightning would resume with the next epoch and skip the end of this one, validation included.
    """
    return not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _is_due(step: int, every_n_steps: int | None) -> bool:
    return every_n_steps is not None and step % every_n_steps == 0
