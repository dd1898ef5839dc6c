"""Where a loader is in its epochs, and what the end of a loop means for that."""

import dis
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import CO_GENERATOR
from types import FrameType
from typing import Literal, Self

from kd_pipeline.data.plan import check_whole

__all__ = ["UNKNOWN_LENGTH", "BatchSampler", "Consumer", "InEpochs", "Position"]

_logger = logging.getLogger("kd_pipeline")

UNKNOWN_LENGTH = sys.maxsize
"""The number of batches of a loader that does not say it."""
_MANY_LOOKS = 3
"""Looks in a row from which they are probably meant as steps of a training."""

_ORDINARY = ("FOR_ITER", "END_FOR", "POP_TOP", "POP_ITER", "RETURN_", "STORE_", "DELETE_")
"""Starts of the instructions that drop an iterator after `break`, `return`, an assignment or the end of a loop."""


class Position:
    """The epoch of a loader, and how many of its batches were returned.

    A loop that was left early by `break` or `return` has ended its epoch. An iterator that gave one batch to `next` was
    a look, which moves nothing: the next loop starts where a saved position would start it, here and after a resume. A
    loop that is open, or that an exception ended, is saved within its epoch; the next loop here runs the next epoch.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        """Batches in an epoch."""
        self.loop = 0
        """Number of the loop that may return batches; an older one has lost its place."""
        self.left: tuple[int, int] | None = None
        """Epoch and number of returned batches of the loop that was left early, if no other has started since."""
        self._epoch, self._batch = 0, 0
        self._began = 0, 0
        self._is_in_loop = False
        """Whether the newest loop has returned a batch, and its epoch has not ended."""
        self._num_looks = 0
        """Looks since the last loop."""
        self._has_warned = False
        self._is_announced = self._is_managed = False
        """Whether Lightning has set the epoch for the next loop, and for this one: it then ends epochs itself."""

    @property
    def epoch(self) -> int:
        """The epoch of the last batch or, after a loop has ended, of the next loop."""
        return self._epoch

    @property
    def num_returned(self) -> int:
        """Batches of `epoch` that were returned, here or before the position was saved."""
        return self._batch

    @property
    def here(self) -> tuple[int, int]:
        """Epoch and number of the batch after the last one returned; after the last of an epoch, the next epoch's."""
        return (self._epoch, self._batch) if self._batch < self.num_batches else (self._epoch + 1, 0)

    def to_save(self) -> tuple[int, int]:
        """`here`, with a warning, once, if a loop was left: its position is then no longer within its epoch."""
        epoch, batch = self.here
        if self.left is not None and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "the loop of epoch %d was left after %d%s batches, which ends the epoch: the saved position is the "
                "start of epoch %d. To resume within an epoch, call state_dict() before leaving the loop",
                *(self.left[0] + 1, self.left[1]),  # people count epochs from 1
                "" if self.num_batches == UNKNOWN_LENGTH else f" of {self.num_batches}",
                epoch + 1,
            )
        return epoch, batch

    @property
    def next_loop(self) -> tuple[int, int]:
        """Where the next loop starts: here or, within an epoch, at the next one."""
        return (self._epoch + 1, 0) if self._is_in_loop else self.here

    def move_to(self, epoch: int, batch: int) -> None:
        """Let the next loop start with `batch` of `epoch`; an open one has lost its place."""
        self._epoch, self._batch = epoch, batch
        self._epoch, self._batch = self.here
        self._is_in_loop, self.left = False, None
        self.loop += 1

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`: all of it or, if it was loaded or begun within, from there.

        Raises:
            ConfigError: this is no epoch.
        """
        check_whole("epoch", epoch, 0)
        current = self._epoch if self._is_in_loop else None if self.left is None else self.left[0]
        if current == epoch:
            self.move_to(*self._began)
        elif self._is_in_loop or self._epoch != epoch:
            self.move_to(epoch, 0)
        self.left = None

    def announce_epoch(self, epoch: int) -> None:
        """As `set_epoch`, by a framework that calls it before every loop."""
        self.set_epoch(epoch)
        self._is_announced = True

    def begin(self) -> int:
        """Start a loop, and return its number."""
        self.move_to(*self.next_loop)
        self._began = self.here
        self._is_announced, self._is_managed = False, self._is_announced
        return self.loop

    def advance(self) -> None:
        """Count a batch of the loop as returned."""
        self._batch += 1
        self._is_in_loop = True

    def finish(self) -> None:
        """End the loop and its epoch."""
        self._num_looks = 0
        self.move_to(self._epoch + 1, 0)

    def drop(self, how: Literal["left", "interrupted", "look"]) -> None:
        """End the loop as `how` its iterator was dropped."""
        if self._is_managed or how == "interrupted":
            return
        if how == "look":
            self._num_looks += 1
            if self._num_looks == _MANY_LOOKS:
                _logger.warning(
                    "next(iter(loader)) has shown the same batch %d times, because it moves nothing; iterate with "
                    "`for batch in loader`, or keep the iterator: iterator = iter(loader), then next(iterator)",
                    _MANY_LOOKS,
                )
            self.move_to(*self._began)
        elif self._batch == self.num_batches:
            self.finish()
        else:
            left = self._epoch, self._batch
            self.finish()
            self.left = left


class InEpochs:
    """A loader that has a position."""

    _position: Position

    @property
    def epoch(self) -> int:
        """The epoch of the current loop or, after it has ended, of the next one, counted from 0."""
        return self._position.epoch

    @property
    def num_returned(self) -> int:
        """Batches of `epoch` that were returned, those before the loaded position included."""
        return self._position.num_returned

    @property
    def position(self) -> Position:
        """Where the loader is in its epochs."""
        return self._position


@dataclass(frozen=True, slots=True)
class BatchSampler:
    """What Lightning expects of a loader: a batch sampler with a `sampler`, whose epoch it sets before every loop."""

    position: Position

    @property
    def sampler(self) -> Self:
        """It is its own sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`."""
        self.position.announce_epoch(epoch)


class Consumer:
    """The code that takes batches from one iterator, and how it drops the iterator.

    Python closes a dropped iterator alike after `break` and after an exception, but at different instructions of the
    function that holds it. Iterators around ours, as of `enumerate` and tqdm, change nothing about that.
    """

    def __init__(self) -> None:
        self._taken = 0
        self._is_looped_over = False
        self._places: list[tuple[int, int]] = []
        """Frame and instruction of all that called for the last batch, innermost first."""

    def take(self, caller: FrameType | None) -> None:
        """Note that `caller` asks for a batch."""
        self._taken += 1
        self._is_looped_over = caller is not None and _instruction(caller, caller.f_lasti) == "FOR_ITER"
        self._places = [(id(frame), frame.f_lasti) for frame in _outward(caller)]

    def how_dropped(self, dropper: FrameType | None) -> Literal["left", "interrupted", "look"]:
        """How the iterator that `dropper` closes was given up: by `break` and the like, by an exception, or after a
        single batch that `next` took."""
        closing = (frame for frame in _outward(dropper) if not _is_suspended(frame))
        frame = next(closing, None)
        place = next((place for place in self._places if frame is not None and place[0] == id(frame)), None)
        if frame is None or place is None:
            return "left"
        now, before = _instruction(frame, frame.f_lasti), _instruction(frame, place[1])
        if before == "FOR_ITER":
            return "left" if now.startswith(_ORDINARY) else "interrupted"
        return "look" if self._taken == 1 and not self._is_looped_over else "left"


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_suspended(frame: FrameType) -> bool:
    """Whether this is a generator around ours that is being closed itself."""
    is_generator = bool(frame.f_code.co_flags & CO_GENERATOR)
    return is_generator and _instruction(frame, frame.f_lasti) in ("YIELD_VALUE", "RESUME", "SEND")


def _instruction(frame: FrameType, offset: int) -> str:
    code = frame.f_code.co_code
    while 0 < offset < len(code) and dis.opname[code[offset]] == "CACHE":
        offset -= 2  # Python 3.12 may be at the cache of an instruction
    return dis.opname[code[offset]] if 0 <= offset < len(code) else ""
