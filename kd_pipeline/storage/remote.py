"""Files behind URLs: ranges of bytes with retries, all of which end by a deadline."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import wait
from itertools import count
from operator import itemgetter
from time import monotonic
from typing import Any, TypeVar

from kd_pipeline.errors import StorageError
from kd_pipeline.storage.base import FileStat, FolderEntry, StoreSettings, require_at_most
from kd_pipeline.storage.connections import Driver, advice_of, check_installed, driver_of, event_loop, make_driver
from kd_pipeline.storage.failures import Failure, failure_of
from kd_pipeline.storage.parallel import ByteRange, RangeReader, in_thread

__all__ = ["CHUNK_BYTES", "RemoteStore"]

_T = TypeVar("_T")

CHUNK_BYTES = 8 * 2**20
"""Most that one request asks for, so that a deadline is about a request and not about the size of a file."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 10.0
_MAX_PAGES = 10
"""Deadlines that the pages of one folder may take together; a store lists a thousand files on each."""
_GRACE_S = 1.0
"""Seconds after the deadline in which the loop of events should have said so."""


class RemoteStore(RangeReader):
    """The URLs of one scheme. All stores of a process share their connections."""

    def __init__(self, scheme: str, settings: StoreSettings) -> None:
        """Look for no credential yet.

        Raises:
            ConfigError: nothing reads URLs of this scheme.
            MissingPackageError: the package that does is not installed.
        """
        check_installed(scheme)
        self._scheme, self._settings = scheme, settings
        self.num_threads = settings.num_requests

    def stat(self, path: str) -> FileStat:
        """See `Store`."""
        return self._wait(path, self._retried(path, None, lambda driver: driver.stat(path)))

    def stat_many(self, paths: Sequence[str]) -> list[FileStat | StorageError]:
        """See `stat_files`."""
        if not paths:
            return []
        progress = _Progress(self.num_threads)

        async def stat_one(path: str) -> FileStat | StorageError:
            try:
                return await self._in_turn(progress, path, None, lambda driver: driver.stat(path))
            except StorageError as exc:
                return exc.with_traceback(None)

        async def stat_all() -> list[FileStat | StorageError]:
            return await asyncio.gather(*map(stat_one, paths))

        return self._wait(paths[0], stat_all(), progress)

    def read_many(self, ranges: Sequence[ByteRange], num_requests: int | None = None) -> list[bytes | StorageError]:
        """See `read_ranges`. Large ranges are several requests at once."""
        if not ranges:
            return []
        progress = _Progress(num_requests or self.num_threads)
        return self._wait(ranges[0].path, self._read_all(ranges, progress), progress)

    def find(self, pattern: str) -> list[str]:
        """See `Store`. A web server is asked for the page of the folder."""
        return sorted(self._wait(pattern, self._retried(pattern, None, lambda driver: driver.find(pattern))))

    def list_folder(self, path: str) -> list[FolderEntry]:
        """See `Store`. The deadline is as long as that of many requests, as a large folder takes so many."""
        work = self._retried(path, None, lambda driver: driver.list_folder(path), _MAX_PAGES)
        return sorted(self._wait(path, work, times=_MAX_PAGES), key=itemgetter(0))

    def write(self, path: str, content: bytes) -> None:
        """See `Store`. The deadline grows with the content."""
        times = 1 + len(content) // CHUNK_BYTES
        writing = self._retried(path, None, lambda driver: driver.write(path, content), times)
        self._wait(path, writing, times=times)

    def prefetch(self, paths: Sequence[str]) -> None:
        """Nothing, as there is no cache to put them into."""

    def close(self) -> None:
        """Nothing: the connections are for the whole process."""

    async def _read_all(self, ranges: Sequence[ByteRange], progress: "_Progress") -> list[bytes | StorageError]:
        return await asyncio.gather(*(self._read_one(each, progress) for each in ranges))

    async def _read_one(self, wanted: ByteRange, progress: "_Progress") -> bytes | StorageError:
        """A range in chunks; the first one says how long the file is and, if that is not known, its version."""
        path, start, length, expected, max_bytes = wanted
        if length == 0:
            return b""
        try:
            first = CHUNK_BYTES if length is None else min(length, CHUNK_BYTES)
            content, stat = await self._read_chunk(path, start, start + first, expected, progress)
            if length is None:
                require_at_most(path, stat, max_bytes)
            end = stat.num_bytes if length is None else start + length
            if end > stat.num_bytes or end < start:
                num_left = max(stat.num_bytes - start, 0)
                what = f"{max(end - start, 0)} bytes were expected here and {num_left} are left"
                return StorageError(path, f"the file was cut: {what}; upload it again", offset=start)
            if start + len(content) == end:
                return content
            rest = (
                self._read_chunk(path, offset, min(offset + CHUNK_BYTES, end), stat, progress)
                for offset in range(start + first, end, CHUNK_BYTES)
            )
            return b"".join([content, *(part for part, _ in await asyncio.gather(*rest))])
        except StorageError as exc:
            return exc.with_traceback(None)

    async def _read_chunk(
        self, path: str, start: int, end: int, expected: FileStat | None, progress: "_Progress"
    ) -> tuple[bytes, FileStat]:
        return await self._in_turn(progress, path, start, lambda driver: driver.read(path, start, end, expected))

    async def _in_turn(
        self, progress: "_Progress", path: str, offset: int | None, attempt: Callable[[Driver], Awaitable[_T]]
    ) -> _T:
        """`_retried`, as soon as fewer than the limit are at work."""
        async with progress.at_once:
            if progress.failure is not None:
                raise StorageError(path, progress.failure, offset=offset)
            started = monotonic()
            try:
                return await self._retried(path, offset, attempt)
            except StorageError as exc:
                if monotonic() - started > self._settings.deadline_s / 2:
                    progress.failure = exc.reason
                raise
            finally:
                progress.num_done += 1

    async def _retried(
        self, path: str, offset: int | None, attempt: Callable[[Driver], Awaitable[_T]], times: int = 1
    ) -> _T:
        """What `attempt` returns at last, within `times` the deadline.

        Raises:
            StorageError: it does not.
        """
        patience = self._settings.deadline_s * times
        deadline, num_denied = monotonic() + patience, 0
        failure = Failure("passing", "there was no answer in time")
        for number in count(1):
            # Half of the time for each, as a new connection may do better than one that does not answer.
            limit_s = min(patience / 2, deadline - monotonic())
            try:
                async with asyncio.timeout(limit_s):
                    driver = driver_of(self._scheme)
                    if driver is None:  # looking for credentials may take a while
                        driver = await in_thread(lambda: make_driver(self._scheme))
                    return await attempt(driver)
            except Exception as exc:
                if not (isinstance(exc, TimeoutError) and limit_s < patience / 2):  # a last try that was cut short
                    failure = failure_of(exc, advice_of(self._scheme))
            num_denied += failure.kind == "denied"
            may_pass = failure.kind == "passing" or (failure.kind == "denied" and num_denied == 1)
            pause_s = min(_FIRST_PAUSE_S * 2 ** (number - 1), _LAST_PAUSE_S) * random.uniform(0.5, 1.0)
            pause_s = max(pause_s, failure.pause_s)
            if not may_pass or number > self._settings.retries or monotonic() + pause_s >= deadline:
                break
            await asyncio.sleep(pause_s)
        note = ""
        if failure.kind == "passing":
            note = self._how_often(number, patience)
        raise failure.as_error(path, offset, note)

    def _how_often(self, number: int, patience: float) -> str:
        """What was tried in vain, and the limit that ended it."""
        times = "once" if number == 1 else f"{number} times"
        if number > self._settings.retries:
            return f"; tried {times}. Check the network, or raise storage.retries"
        return f"; tried {times} within {patience:g} s. Check the network, or raise storage.deadline_s"

    def _wait(
        self, path: str, work: Coroutine[Any, Any, _T], progress: "_Progress | None" = None, times: int = 1
    ) -> _T:
        """The result of `work`, for which this thread waits no longer than the deadline without progress.

        The work ends by itself before, unless a driver holds up the loop of events.
        """
        future = asyncio.run_coroutine_threadsafe(work, event_loop())
        limit_s = self._settings.deadline_s * times + _GRACE_S
        try:
            while True:
                num_done = progress.num_done if progress is not None else 0
                if wait([future], limit_s).done:
                    return future.result()
                if progress is None or progress.num_done == num_done:
                    raise StorageError(path, f"there was no answer within {limit_s:g} s; check the network")
        except BaseException:
            future.cancel()
            raise


class _Progress:
    """What the requests of one call have in common.

    Attributes:
        at_once: held by each.
        num_done: requests that ended.
        failure: of the first that met its deadline. Those that have not started share it: one deadline is enough.
    """

    def __init__(self, num_at_once: int) -> None:
        self.at_once = asyncio.Semaphore(num_at_once)
        self.num_done = 0
        self.failure: str | None = None
