"""Many ranges, or calls, at once, on threads that are shared."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from math import inf
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Generic, NamedTuple, TypeVar

from kd_pipeline.errors import StorageError
from kd_pipeline.storage.base import FileStat, Store

__all__ = [
    "ByteRange",
    "RangeReader",
    "call_each",
    "call_in_thread",
    "in_thread",
    "read_ranges",
    "run_in_thread",
    "stat_all",
    "stat_files",
]

_T = TypeVar("_T")
_Item = TypeVar("_Item")
_MAX_THREADS = 64
_PATIENCE_S = 0.0005
"""Files in memory are read by one thread: to hand each range to another takes longer than to copy
them. The others are for disks that let a read wait longer than this."""


class ByteRange(NamedTuple):
    """The arguments of `Store.read`."""

    path: str
    start: int = 0
    length: int | None = None
    expected: FileStat | None = None
    max_bytes: int | None = None


def read_ranges(
    store: Store, ranges: Sequence[ByteRange], num_threads: int | None = None
) -> list[bytes | StorageError]:
    """Read all `ranges`; in place of one that cannot be read is the error.

    The bytes are not copied again: `np.frombuffer` makes them an array. Several threads may call this at once.

    Args:
        store: has all the files. Its own `read_many`, if it has one, does the same with less effort.
        ranges: what to read.
        num_threads: reads at once, one of them in this thread, where reads take long; defaults to the store's number.

    Raises:
        Whatever `store.read` raises but StorageError.
    """
    if (read_many := getattr(store, "read_many", None)) is not None:
        results: list[bytes | StorageError] = read_many(ranges, num_threads)
        return results

    def read(wanted: ByteRange) -> bytes | StorageError:
        path, start, length, expected, max_bytes = wanted
        try:
            return store.read(path, start, length, expected=expected, max_bytes=max_bytes)
        except StorageError as exc:
            return exc.with_traceback(None)

    return _Work(read, ranges).finish(num_threads or store.num_threads, patience_s=_PATIENCE_S)


def call_each(function: Callable[[_Item], _T], items: Sequence[_Item], num_threads: int) -> list[_T]:
    """What `function` returns for each of `items`, called by so many threads at once, one of them this one.

    Raises:
        Whatever `function` raises; other calls may not have ended yet.
    """
    return _Work(function, items).finish(num_threads)


class RangeReader(ABC):
    """A store that reads many ranges at once, and so also one."""

    @abstractmethod
    def read_many(self, ranges: Sequence[ByteRange], num_threads: int | None = None) -> list[bytes | StorageError]:
        """See `read_ranges`."""

    def read(
        self,
        path: str,
        start: int = 0,
        length: int | None = None,
        *,
        expected: FileStat | None = None,
        max_bytes: int | None = None,
    ) -> bytes:
        """See `Store`."""
        (content,) = self.read_many([ByteRange(path, start, length, expected, max_bytes)])
        if isinstance(content, StorageError):
            raise content
        return content


def stat_all(store: Store, paths: Sequence[str]) -> list[FileStat]:
    """Size and version of files that must all be there.

    Raises:
        StorageError: of the first that is not, or of which the store does not say.
    """
    stats = []
    for stat in stat_files(store, paths):
        if isinstance(stat, StorageError):
            raise stat
        stats.append(stat)
    return stats


def stat_files(store: Store, paths: Sequence[str]) -> list[FileStat | StorageError]:
    """`Store.stat` of all `paths`, many at once if they are remote; in place of one that has none is the error."""
    if (stat_many := getattr(store, "stat_many", None)) is not None:
        found: list[FileStat | StorageError] = stat_many(paths)
        return found
    return [_stat(store, path) for path in paths]


def run_in_thread(function: Callable[[], object]) -> None:
    """Call `function`, which must not raise, as soon as one of the shared threads is free.

    The threads are daemons, so that a process can end while a disk does not answer.
    """
    _pool.put(function)


def call_in_thread(function: Callable[[], _T]) -> Future[_T]:
    """The result of `function`, which one of the shared threads calls."""
    result: Future[_T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as exc:
            result.set_exception(exc)

    run_in_thread(call)
    return result


async def in_thread(function: Callable[[], _T]) -> _T:
    """`call_in_thread` for a coroutine. The default of asyncio would hold up the end of the process."""
    return await asyncio.wrap_future(call_in_thread(function))


class _Work(Generic[_Item, _T]):
    """Calls of a function, which threads take one by one, without a lock and a future for each."""

    def __init__(self, function: Callable[[_Item], _T], items: Sequence[_Item]) -> None:
        self._function, self._items = function, items
        self._results: dict[int, _T] = {}
        self._take = count().__next__  # atomic
        self._stopped: BaseException | None = None
        self._lock, self._num_done, self._all_done = Lock(), 0, Event()

    def run(self, patience_s: float = inf) -> None:
        """Call until no item is left to take, or a call has taken longer than `patience_s`."""
        function, items, results, take = self._function, self._items, self._results, self._take
        num_done = 0
        while self._stopped is None and (index := take()) < len(items):
            start_s = perf_counter()
            try:
                results[index] = function(items[index])
            except BaseException as exc:
                self._stopped = exc
                break
            num_done += 1
            if perf_counter() - start_s > patience_s:
                break
        with self._lock:
            self._num_done += num_done
            if self._num_done == len(items) or self._stopped is not None:
                self._all_done.set()

    def finish(self, num_threads: int, patience_s: float = 0.0) -> list[_T]:
        """Take part, and wait for the others, which start when a call has taken `patience_s`."""
        try:
            if patience_s:
                self.run(patience_s)
            for _ in range(min(num_threads, len(self._items) - self._num_done) - 1):
                run_in_thread(self.run)
            self.run()
            self._all_done.wait()
        except BaseException as exc:  # Ctrl-C while waiting
            self._stopped = exc
            raise
        if self._stopped is not None:
            raise self._stopped
        return [self._results[index] for index in range(len(self._items))]


def _stat(store: Store, path: str) -> FileStat | StorageError:
    try:
        return store.stat(path)
    except StorageError as exc:
        return exc.with_traceback(None)


class _Pool:
    """Threads that are started when there is more to do than there are idle ones."""

    def __init__(self) -> None:
        self._functions: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock, self._num_threads, self._num_busy = Lock(), 0, 0

    def put(self, function: Callable[[], object]) -> None:
        with self._lock:
            self._num_busy += 1
            is_new = self._num_threads < min(self._num_busy, _MAX_THREADS)
            self._num_threads += is_new
        self._functions.put(function)
        if is_new:
            Thread(target=self._serve, name="kd_pipeline-store", daemon=True).start()

    def _serve(self) -> None:
        for function in iter(self._functions.get, None):
            function()
            del function  # or the results would be kept until the next call
            with self._lock:
                self._num_busy -= 1


_pool = _Pool()


def _start_again() -> None:
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_start_again)
