"""SIGTERM, SIGUSR1 and Ctrl-C end a training where it can be resumed exactly, with a status that says so."""

import os
import signal
import threading
from collections.abc import Callable
from logging import getLogger
from types import FrameType
from typing import Any

from kd_pipeline.training.checkpoint import CheckpointCallback, is_resumable_after

__all__ = ["StopOnSignal"]

_logger = getLogger(__name__)

_EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
"""As shells write it, 128 and the signal; but a scheduler that asks in one way or the other gets one answer."""


class StopOnSignal(CheckpointCallback):
    """After a signal: save at the end of the batch, then leave the training by `SystemExit`.

    SIGTERM and SIGUSR1 leave with status 143, Ctrl-C (SIGINT) with 130; a second Ctrl-C ends the process at once, and
    the checkpoint before it stays whole. A signal that comes while the gradients of several batches are accumulated
    waits for the optimizer's step, and one that comes in the last batch of an epoch or in its validation waits for the
    checkpoint of the epoch: nothing else can be resumed exactly. All ranks leave together, whichever got the signal.

    SLURM sends SIGUSR1 ahead of the time limit where the job says `--signal=USR1@120`. Nothing is put back into the
    queue from here, which is for the job and the site to decide: `--requeue` and `PreemptMode=REQUEUE`, or a line such
    as `[ $? -eq 143 ] && scontrol requeue $SLURM_JOB_ID` behind the command. The same command then resumes.

    `trainer.should_stop` would be no way out: it makes Lightning validate and end the epoch in the middle. Nor are
    Lightning's own handlers: they leave out the save, run collectives within the handler, and call `scontrol`
    themselves. Lightning sets them just before `on_train_start`; these replace them, and however the training ends,
    Lightning puts back what was there before its own.
    """

    def __init__(self, save: Callable[[Any], None]) -> None:
        """Watch for signals from the start of the training to its end.

        Args:
            save: takes the trainer, writes the checkpoint that the next start resumes from, and is called on all
                ranks: `SaveLastAndBest.save_last`, whose owner is needed beside this one for the ends of epochs.

        Raises:
            MissingPackageError: Lightning is not installed.
        """
        self._save = save
        self._received: signal.Signals | None = None
        self._leaving = False
        self._process = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Take over the signals; leave if Lightning has got SIGTERM while it set things up."""
        if trainer.received_sigterm:
            self._received = signal.SIGTERM
        self._take_over()
        self._leaving = self._agree(trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if there was a signal; what Lightning does at the end of a batch is still to come."""
        if is_resumable_after(trainer, batch_idx) and self._agree(trainer):
            self._save(trainer)
            self._leaving = True

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Nothing to save here: an epoch is saved anyway."""
        self._leaving = self._agree(trainer)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Leave before anything happens that the checkpoint does not know."""
        self._leave_if_due()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Leave likewise."""
        self._leave_if_due()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Leave even though the training is done, because more may follow it."""
        self._leave_if_due()

    def _agree(self, trainer: Any) -> bool:
        """Whether any rank has got a signal: one small collective per step, where Lightning does another."""
        return bool(trainer.strategy.reduce_boolean_decision(self._received is not None, all=False))

    def _leave_if_due(self) -> None:
        if self._leaving:
            received = self._received or signal.SIGTERM  # another rank got it
            _logger.info("%s: saved, leaving; the same command resumes", received.name)
            raise SystemExit(_EXIT_STATUS[received])

    def _take_over(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            _logger.warning("not in the main thread: signals will end this training without a checkpoint")
            return
        self._process = os.getpid()
        for number in _EXIT_STATUS:
            # A shell that starts a job in the background has its Ctrl-C ignored, and so it stays.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != self._process:  # a worker that was forked from here, which must die of it
            signal.signal(received, signal.SIG_DFL)
            signal.raise_signal(received)
            return
        self._received = self._received or received
        if received is signal.SIGINT:
            signal.signal(received, signal.SIG_DFL)  # by the kernel, even if Python hangs in a library
        # Neither print nor logging: the signal may have interrupted one of them.
        again = "; Ctrl-C again ends at once" if received is signal.SIGINT else ""
        os.write(2, f"\n{received.name}: stopping at the next checkpoint{again}\n".encode())
