"""Stop a training on SIGTERM, SIGUSR1 or Ctrl-C where it can be resumed exactly, with an exit status that says so."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from types import FrameType
from typing import Any, Self

from kd_pipeline._core.optional import require
from kd_pipeline.training.checkpoint_callback import is_resumable_after

__all__ = ["Signals", "StopOnSignal"]

_logger = getLogger(__name__)
_callbacks = require("lightning.pytorch.callbacks", extra="train")

_EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
"""128 + signal, as in shells, but the same for both signals of a scheduler."""


class StopOnSignal(_callbacks.Checkpoint):  # type: ignore[misc, name-defined]
    """On a signal, saves at the end of the batch and then leaves the training by `SystemExit`.

    The exit status is 143 for SIGTERM and SIGUSR1 and 130 for Ctrl-C (SIGINT). A second Ctrl-C ends the process at
    once; the previous checkpoint stays intact. A signal during gradient accumulation waits for the optimizer step, and
    one in the last batch of an epoch or in its validation for the checkpoint of the epoch: only those can be resumed
    exactly. All ranks leave together, whichever of them got the signal.

    SLURM sends SIGUSR1 before the time limit with `--signal=USR1@120`. Requeueing is left to the job and the site:
    `--requeue` and `PreemptMode=REQUEUE`, or a line such as `[ $? -eq 143 ] && scontrol requeue $SLURM_JOB_ID` after
    the command. Run the same command to resume.

    `trainer.should_stop` does not fit: Lightning would then validate and end the epoch early. Nor do its own signal
    handlers, which do not save, run collectives inside the handler and call `scontrol` themselves. Lightning installs
    them just before `on_train_start`; these handlers replace them, and Lightning restores the original ones however
    the training ends.
    """

    def __init__(self, save: Callable[[Any], None], signals: "Signals | None" = None) -> None:
        """Watch for signals from the start of the training to its end.

        Args:
            save: called with the trainer on all ranks, writes the checkpoint to resume from: the `save_last` of a
                `SaveLastAndBest` in the same trainer, which saves the ends of epochs.
            signals: those that are received already, for a training outside the main thread; the caller handles them.
        """
        self._save = save
        self._signals, self._handles = signals or Signals(), signals is None
        self._is_stopping = False

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Install the handlers; stop if Lightning received SIGTERM during setup."""
        if trainer.received_sigterm:
            self._signals.received = signal.SIGTERM
        if self._handles:
            self._signals.install()
        self._is_stopping = self._any_rank_received(trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if there was a signal; the rest of Lightning's batch end still runs."""
        if is_resumable_after(trainer, batch_idx) and self._any_rank_received(trainer):
            self._save(trainer)
            self._is_stopping = True

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Stop if there was a signal; `SaveLastAndBest` saves the epoch anyway."""
        self._is_stopping = self._any_rank_received(trainer)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Leave before anything happens that is not in the checkpoint."""
        self._exit_if_stopping()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Leave before anything happens that is not in the checkpoint."""
        self._exit_if_stopping()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Leave although the training is done: more may follow it."""
        self._exit_if_stopping()

    def _any_rank_received(self, trainer: Any) -> bool:
        """One small collective per step, at a point where Lightning runs another one."""
        return bool(trainer.strategy.reduce_boolean_decision(self._signals.received is not None, all=False))

    def _exit_if_stopping(self) -> None:
        if self._is_stopping:
            received = self._signals.received or signal.SIGTERM  # another rank received it
            _logger.info("%s: checkpoint saved, exiting; run the same command to resume", received.name)
            raise SystemExit(_EXIT_STATUS[received])


class Signals:
    """The signals that stop a training, and the first of them that this process has received."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._pid = 0

    def install(self) -> None:
        """Handle them from now on, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            _logger.warning("not in the main thread: a signal will end this training without a checkpoint")
            return
        self._pid = os.getpid()
        for number in _EXIT_STATUS:
            # A shell ignores Ctrl-C for its background jobs; leave it that way.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextmanager
    def handled(self) -> Iterator[Self]:
        """Handle them while the block runs, and then as before."""
        before = {number: signal.getsignal(number) for number in _EXIT_STATUS}
        self.install()
        try:
            yield self
        finally:
            if self._pid:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != self._pid:  # a forked worker, which must die of it
            signal.signal(received, signal.SIG_DFL)
            signal.raise_signal(received)
            return
        self.received = self.received or received
        if received is signal.SIGINT:
            signal.signal(received, signal.SIG_DFL)  # the kernel's default works even if Python hangs in a library
        # Neither print nor logging: the signal may have interrupted one of them.
        hint = "; press Ctrl-C again to exit at once" if received is signal.SIGINT else ""
        os.write(2, f"\n{received.name}: stopping at the next checkpoint{hint}\n".encode())
