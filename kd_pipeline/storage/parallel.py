"""Many ranges at once, on threads that all stores share."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import NamedTuple, TypeVar

from kd_pipeline.errors import StorageError
from kd_pipeline.storage.base import FileStat, Store

__all__ = ["ByteRange", "call_in_thread", "in_thread", "read_ranges", "run_in_thread", "stat_files"]

_T = TypeVar("_T")
_MAX_THREADS = 64


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
        num_threads: reads at once, one of them in this thread; defaults to the store's own number.

    Raises:
        Whatever `store.read` raises but StorageError.
    """
    if (read_many := getattr(store, "read_many", None)) is not None:
        results: list[bytes | StorageError] = read_many(ranges, num_threads)
        return results
    work = _Work(store, ranges)
    for _ in range(min(num_threads or store.num_threads, len(ranges)) - 1):
        run_in_thread(work.run)
    return work.finish()


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


class _Work:
    """Ranges that threads take one by one, without a lock and a future for each."""

    def __init__(self, store: Store, ranges: Sequence[ByteRange]) -> None:
        self._read, self._ranges = store.read, ranges
        self._results: list[bytes | StorageError | None] = [None] * len(ranges)
        self._take = count().__next__  # atomic
        self._stopped: BaseException | None = None
        self._lock, self._num_done, self._all_done = Lock(), 0, Event()

    def run(self) -> None:
        """Read until no range is left to take."""
        read, ranges, results, take = self._read, self._ranges, self._results, self._take
        num_done = 0
        while (index := take()) < len(ranges) and self._stopped is None:
            path, start, length, expected, max_bytes = ranges[index]
            try:
                results[index] = read(path, start, length, expected=expected, max_bytes=max_bytes)
            except StorageError as exc:
                results[index] = exc.with_traceback(None)
            except BaseException as exc:
                self._stopped = exc
                break
            num_done += 1
        with self._lock:
            self._num_done += num_done
            if self._num_done == len(ranges) or self._stopped is not None:
                self._all_done.set()

    def finish(self) -> list[bytes | StorageError]:
        """Take part, and wait for the others; those that have not started yet are not needed."""
        try:
            self.run()
            self._all_done.wait()
        except BaseException as exc:  # Ctrl-C while waiting
            self._stopped = exc
            raise
        if self._stopped is not None:
            raise self._stopped
        return [result for result in self._results if result is not None]


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
