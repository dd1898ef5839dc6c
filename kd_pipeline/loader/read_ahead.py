"""The batches of an epoch, of which the next ones are in preparation while one is used."""

from collections import deque
from collections.abc import Callable, Iterator

from kd_pipeline.loader.prepare import PendingBatch

__all__ = ["ReadAhead"]


class ReadAhead:
    """Prepares batches a number of them ahead, and keeps one that was looked at."""

    def __init__(self, prepare: Callable[[int, int], PendingBatch], *, num_ahead: int) -> None:
        """`prepare` starts the preparation of a batch, given its epoch and its number."""
        self._prepare, self._num_ahead = prepare, num_ahead
        self._ahead: deque[PendingBatch] = deque()
        self._peeked: tuple[tuple[int, int], PendingBatch] | None = None
        """The batch that `peek` showed, with its position."""

    def peek(self, place: tuple[int, int]) -> PendingBatch:
        """The batch at `place`, an epoch and a number, which `batches` does not prepare again.

        Raises:
            Exception: as its preparation does.
        """
        if self._peeked is None or self._peeked[0] != place:
            self._peeked = place, self._prepare(*place)
        return self._peeked[1]

    def batches(self, epoch: int, first: int, num_batches: int) -> Iterator[PendingBatch]:
        """The batches of `epoch` from `first` on.

        Raises:
            Exception: as the preparation of a batch does, after the good batches before it.
        """
        ahead = self._ahead = deque()
        if self._peeked is not None and self._peeked[0] == (epoch, first):
            ahead.append(self._peeked[1])
        self._peeked = None
        failure: Exception | None = None
        for number in range(first, num_batches):
            while failure is None and len(ahead) <= self._num_ahead and number + len(ahead) < num_batches:
                try:
                    ahead.append(self._prepare(epoch, number + len(ahead)))
                except Exception as exc:
                    failure = exc
            if failure is not None and not ahead:
                raise failure
            yield ahead.popleft()

    def forget_peeked(self) -> None:
        """Prepare the batch that was looked at again."""
        self._peeked = None

    def clear(self) -> None:
        """Drop all batches, once their preparation is done."""
        self._peeked = None
        self._ahead.clear()
