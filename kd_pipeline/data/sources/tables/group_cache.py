"""Decoded groups of samples, kept in memory up to a bound: each is decoded once, by one thread, ahead if it can be."""

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.storage.parallel import run_in_thread

__all__ = ["GroupCache"]

T = TypeVar("T")


class GroupCache(Generic[T]):
    """Keeps the groups used last. Threads that want a group that another one decodes wait for it.

    Args:
        decode: makes the group of a number; called in several threads.
        sizes: `[G]`, bytes of each group in memory.
        max_bytes: groups that have more together are not kept, but for those being decoded.
        num_threads: groups that are decoded ahead at the same time.
    """

    def __init__(
        self, decode: Callable[[int], T], sizes: NDArray[np.int64], *, max_bytes: int, num_threads: int
    ) -> None:
        self._decode, self._sizes = decode, sizes
        self._max_bytes, self._num_threads = max_bytes, num_threads
        self._coming: deque[int] = deque()
        self._kept: OrderedDict[int, Future[T]] = OrderedDict()
        self._start_empty()

    @property
    def num_bytes(self) -> int:
        """Bytes of the groups that are kept or being decoded."""
        return self._num_bytes

    def __contains__(self, number: int) -> bool:
        return number in self._kept

    def get(self, number: int) -> T:
        """The group of a number.

        Raises:
            Whatever `decode` raises; the next call tries again.
        """
        if self._owner != os.getpid():  # a fork may have taken over a lock, or a group that no thread decodes
            self._start_empty()
        with self._lock:
            found = self._kept.get(number)
            if found is not None:
                self._kept.move_to_end(number)
            else:
                mine: Future[T] = Future()
                self._kept[number] = mine
                self._num_bytes += int(self._sizes[number])
                self._drop_oldest()
        if found is not None:
            return found.result()
        try:
            group = self._decode(number)
        except BaseException as exc:
            with self._lock:
                if self._kept.get(number) is mine:
                    self._forget(number)
            mine.set_exception(exc)
            raise
        mine.set_result(group)
        with self._lock:
            self._drop_oldest()
        return group

    def drop(self, number: int) -> None:
        """Keep the group no longer."""
        with self._lock:
            if number in self._kept and self._kept[number].done():
                self._forget(number)

    def expect(self, numbers: Sequence[int]) -> None:
        """Decode the groups of `numbers` in threads, in this order, as far as half of the bound allows.

        What an earlier call asked for and no thread has begun with is dropped.
        """
        if self._owner != os.getpid():
            self._start_empty()
        ends = np.cumsum(self._sizes[list(numbers)])
        with self._lock:
            fitting = [number for number, end in zip(numbers, ends, strict=True) if end <= self._max_bytes // 2]
            for number in fitting:
                if number in self._kept:
                    self._kept.move_to_end(number)
            self._coming = deque(number for number in fitting if number not in self._kept)
            num_new = max(0, min(len(self._coming), self._num_threads) - self._num_workers)
            self._num_workers += num_new
        for _ in range(num_new):
            run_in_thread(self._work)

    def _start_empty(self) -> None:
        self._owner, self._lock = os.getpid(), Lock()
        self._kept, self._num_bytes = OrderedDict(), 0
        self._coming = deque()
        self._num_workers = 0

    def _drop_oldest(self) -> None:
        """Make room, but keep what is being decoded, which its threads hold anyway."""
        for number in list(self._kept):
            if self._num_bytes <= self._max_bytes:
                return
            if self._kept[number].done():
                self._forget(number)

    def _forget(self, number: int) -> None:
        del self._kept[number]
        self._num_bytes -= int(self._sizes[number])

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._coming:
                    self._num_workers -= 1
                    return
                number = self._coming.popleft()
            try:
                self.get(number)
            except Exception:  # whoever reads the group gets the error
                with self._lock:
                    self._coming.clear()
