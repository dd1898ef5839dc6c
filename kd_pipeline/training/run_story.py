"""What a training shows while it runs: a line that moves on a terminal, and one for each epoch that stays."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline._core.progress import REDRAW_S, bar_text, status_line, time_text
from kd_pipeline._core.text import plural
from kd_pipeline.training.checkpoint_callback import SaveLastAndBest

__all__ = ["RunStory", "StepProgress", "metric_text"]

_logger = logging.getLogger("kd_pipeline")
_callbacks = require("lightning.pytorch.callbacks", extra="train")

_BAR_WIDTH = 12
_SHOWN_FIRST = ("val/top1", "val/miou", "val/knn_top1", "val/loss")
"""The metric of an epoch's line where nothing selects the best, if it was measured."""
_FRACTIONS = ("top1", "top5", "macro_f1", "miou", "pixel_accuracy", "agreement")
"""Ends of the names of metrics that are shown in percent."""


@dataclass(frozen=True, slots=True)
class StepProgress:
    """What is known on the host after a training step, without waiting for the device."""

    loss: float
    """Of the last batch on this rank; NaN before the first step."""
    lr: float
    speed: str
    """Of all ranks, such as `1,386 images/s`; empty before the first step."""
    num_skipped: int
    """Steps of the run that were not taken."""


class RunStory(_callbacks.Checkpoint):  # type: ignore[misc, name-defined]
    """Tells how far a training is. List it after `SaveLastAndBest`, which knows the best epoch.

    It is a `Checkpoint` because Lightning calls those after all other callbacks. Epochs are counted from 1 in what
    people see.
    """

    def __init__(self, best: SaveLastAndBest, *, epochs: int) -> None:
        """Tell of a run of `epochs`, whose best student is that of `best`."""
        self._best, self._epochs = best, epochs
        self._opened = ExitStack()
        self._draw: Any = None
        self._drawn = -REDRAW_S
        self._started = self._epoch_started = 0.0
        self._num_steps = 0
        """Batches since the start of this process."""
        self._num_skipped = 0
        self._told_step = -1
        """Of the last validation within an epoch that has its line."""

    @property
    def state_key(self) -> str:
        """A name for checkpoints, in which it keeps nothing."""
        return "RunStory"

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Open the line that moves."""
        self._draw = self._opened.enter_context(status_line())
        # A run that resumes within an epoch has no start of that epoch.
        self._started = self._epoch_started = time.monotonic()
        self._num_skipped = module.progress.num_skipped

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Show the epoch before its first batch, which may take long."""
        self._epoch_started = time.monotonic()
        self._show(trainer, module, done=trainer.fit_loop.batch_idx + 1 if trainer.fit_loop.restarting else 0)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the line; tell of a validation within the epoch."""
        self._num_steps += 1
        if self._best.validated_step == trainer.global_step != self._told_step:
            self._told_step = trainer.global_step
            step = f"step {batch_idx + 1}/{trainer.num_training_batches}"
            self._tell(trainer, [f"{self._epoch(trainer)}  {step}", self._metric(module.measured)])
        if time.monotonic() - self._drawn >= REDRAW_S or trainer.is_last_batch:
            self._show(trainer, module, done=batch_idx + 1)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """The line of the epoch."""
        progress, metrics = module.progress, trainer.callback_metrics
        parts = [self._epoch(trainer)]
        if "train/epoch_loss" in metrics:
            parts.append(f"loss {float(metrics['train/epoch_loss']):.4g}")
        parts += [self._metric(module.measured), f"lr {progress.lr:.3g}", progress.speed]
        if skipped := progress.num_skipped - self._num_skipped:
            parts.append(f"{skipped} {plural(skipped, 'step')} skipped")
            self._num_skipped = progress.num_skipped
        parts.append(_seconds_text(time.monotonic() - self._epoch_started))
        if trainer.current_epoch + 1 < self._epochs and not trainer.should_stop:
            parts.append(self._time_left(trainer, trainer.num_training_batches))
        self._tell(trainer, parts)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Close the line that moves."""
        self._close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Close it before the error is printed."""
        self._close()

    def _close(self) -> None:
        self._draw = None
        self._opened.close()

    def _epoch(self, trainer: Any) -> str:
        return f"epoch {trainer.current_epoch + 1}/{self._epochs}"

    def _tell(self, trainer: Any, parts: list[str]) -> None:
        if trainer.is_global_zero:
            _logger.info("%s", "  ".join(filter(None, parts)))

    def _metric(self, measured: Mapping[str, float]) -> str:
        """The metric that selects the best, with the best so far."""
        best = self._best
        if best.monitor is None or best.monitor not in measured:
            name = next((each for each in (*_SHOWN_FIRST, *measured) if each in measured), None)
            return "" if name is None else f"{name} {metric_text(name, measured[name])}"
        text = f"{best.monitor} {metric_text(best.monitor, measured[best.monitor])}"
        return text if best.best_epoch is None else f"{text} ({self._best_text}, epoch {best.best_epoch})"

    @property
    def _best_text(self) -> str:
        best = self._best
        if best.monitor is None or best.best_epoch is None:
            return ""
        return f"best {metric_text(best.monitor, best.best_score)}"

    def _show(self, trainer: Any, module: Any, done: int) -> None:
        """Draw the line that moves; where it is too long for the terminal, without the bar."""
        if self._draw is None:
            return
        self._drawn = time.monotonic()
        total, progress = trainer.num_training_batches, module.progress
        parts = [
            self._epoch(trainer),
            bar_text(done, total, _BAR_WIDTH),
            f"{done}/{total}",
            "" if progress.loss != progress.loss else f"loss {progress.loss:.3g}",
            f"lr {progress.lr:.3g}" if progress.lr else "",
            progress.speed,
            self._time_left(trainer, done),
            self._best_text,
        ]
        text = "  ".join(filter(None, parts))
        if len(text) >= (os.get_terminal_size(sys.stderr.fileno()).columns or 80):  # some terminals say 0
            text = "  ".join(filter(None, parts[:1] + parts[2:]))
        self._draw(text)

    def _time_left(self, trainer: Any, done: int) -> str:
        """What is left of the run if it continues as since the start, validation included."""
        if not self._num_steps:
            return ""
        left = (self._epochs - trainer.current_epoch) * trainer.num_training_batches - done
        return f"{time_text((time.monotonic() - self._started) / self._num_steps * left)} left"


def metric_text(name: str, value: float) -> str:
    """A metric as people read it: accuracies and agreement in percent."""
    return f"{value:.1%}" if name.endswith(_FRACTIONS) else f"{value:.4g}"


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else time_text(seconds)
