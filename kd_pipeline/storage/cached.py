"""A remote store with whole files in a folder of this machine: read ahead, and read again from there."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import NamedTuple

from kd_pipeline._core.user_cache import temporary_without_cache
from kd_pipeline.errors import StorageError, shown
from kd_pipeline.storage.base import FileStat, StoreSettings
from kd_pipeline.storage.cache_folder import CacheFolder
from kd_pipeline.storage.local import LocalStore
from kd_pipeline.storage.parallel import ByteRange, read_ranges, run_in_thread
from kd_pipeline.storage.remote import CHUNK_BYTES, RemoteStore

__all__ = ["CachedStore"]

_logger = logging.getLogger("kd_pipeline")

_NUM_DOWNLOADS = 2
"""Files downloaded at once, each in several requests."""
_CHUNKS_AT_ONCE = 4
_MAX_WAITING = 256
"""Files noted for download; of more, the first ones are read in ranges."""
_MAX_OPEN = 16
"""Few, as a file that is deleted while it is open still takes its space."""
_TOUCH_S = 30.0
"""How often a file that is being read is marked as used."""
_MAX_WHOLE_DOWNLOADS = 2
"""Of one file because it was read: where the cache is too small, it is read in ranges from then on."""
_MAX_KEEPING = 64
"""Contents that wait to be written to the cache; of more, some are not kept."""


class CachedStore:
    """Reads what is in the cache from there, and the rest in ranges, without waiting for a download."""

    def __init__(self, remote: RemoteStore, settings: StoreSettings, *, whole: bool) -> None:
        """With `whole`, a file is downloaded from its first read on."""
        self._remote, self._settings, self._whole = remote, settings, whole
        self.num_threads = remote.num_threads
        self._local = LocalStore(_MAX_OPEN)
        self._now = _State()

    def stat(self, path: str) -> FileStat:
        """See `Store`."""
        stat = self._state.stats[path] = self._remote.stat(path)
        return stat

    def stat_many(self, paths: Sequence[str]) -> list[FileStat | StorageError]:
        """See `stat_files`."""
        found = self._remote.stat_many(paths)
        self._state.stats.update(
            (path, stat) for path, stat in zip(paths, found, strict=True) if isinstance(stat, FileStat)
        )
        return found

    def read(self, path: str, start: int = 0, length: int | None = None, *, expected: FileStat | None = None) -> bytes:
        """See `Store`. A file in the cache is read from there without asking whether the remote one has changed."""
        (content,) = self.read_many([ByteRange(path, start, length, expected)])
        if isinstance(content, StorageError):
            raise content
        return content

    def read_many(self, ranges: Sequence[ByteRange], num_threads: int | None = None) -> list[bytes | StorageError]:
        """See `read_ranges`."""
        results = self._read_copies(ranges, range(len(ranges)))
        missing = [index for index in range(len(ranges)) if index not in results]
        if self._whole and (
            unknown := {ranges[index].path for index in missing if self._stat_of(ranges[index]) is None}
        ):
            failed = {stat.path: stat for stat in self.stat_many(list(unknown)) if isinstance(stat, StorageError)}
            results |= {index: failed[path] for index in missing if (path := shown(ranges[index].path)) in failed}
            results |= self._read_copies(ranges, [index for index in missing if index not in results])
            missing = [index for index in missing if index not in results]
        found = self._remote.read_many([ranges[index] for index in missing], num_threads)
        for index, content in zip(missing, found, strict=True):
            results[index] = content
            if self._whole and isinstance(content, bytes):
                self._keep(ranges[index], content)
        return [results[index] for index in range(len(ranges))]

    def find(self, pattern: str) -> list[str]:
        """See `Store`."""
        return self._remote.find(pattern)

    def write(self, path: str, content: bytes) -> None:
        """See `Store`."""
        state = self._state
        state.stats.pop(path, None)
        state.copies.pop(path, None)
        self._remote.write(path, content)

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download the files to the cache in the background, in this order, a few at once."""
        state = self._state
        with state.lock:
            for path in paths:
                if path not in state.noted and len(state.waiting) < _MAX_WAITING:
                    state.noted.add(path)
                    state.waiting.append(path)
            num_new = min(_NUM_DOWNLOADS - state.num_workers, len(state.waiting))
            state.num_workers += max(num_new, 0)
        for _ in range(num_new):
            run_in_thread(lambda: self._download_all(state))

    def close(self) -> None:
        """Begin no more downloads, and close the files."""
        with self._state.lock:
            self._state.waiting.clear()
        self._local.close()

    @property
    def _state(self) -> "_State":
        """That of this process: a fork has the files of its parent, and none of its downloads."""
        if self._now.process != os.getpid():
            self._now = _State()
        return self._now

    def _stat_of(self, wanted: ByteRange) -> FileStat | None:
        return wanted.expected or self._state.stats.get(wanted.path)

    def _read_copies(self, ranges: Sequence[ByteRange], which: Iterable[int]) -> dict[int, bytes | StorageError]:
        """The contents, by index, of those ranges that are on this machine."""
        results: dict[int, bytes | StorageError] = {}
        places: list[tuple[int, str]] = []
        for index in which:
            download = self._state.downloads.get(ranges[index].path)
            part = download.read(ranges[index], self._stat_of(ranges[index])) if download is not None else None
            if part is not None:
                results[index] = part
            elif (copy := self._copy_of(ranges[index])) is not None:
                places.append((index, copy))
        local = [ByteRange(copy, ranges[index].start, ranges[index].length) for index, copy in places]
        for (index, _), content in zip(places, read_ranges(self._local, local), strict=True):
            if isinstance(content, StorageError):
                self._forget(ranges[index])  # somebody cut it
            else:
                results[index] = content
        return results

    def _copy_of(self, wanted: ByteRange) -> str | None:
        """The file in the cache that has the range, if it is there."""
        state, path = self._state, wanted.path
        copy = state.copies.get(path)
        stat = self._stat_of(wanted)
        now = monotonic()
        if copy is not None and now - copy.looked < _TOUCH_S and copy.stat == stat:
            return copy.path
        if stat is None or not stat.version:
            return None
        folder = self._folder
        found = folder.find(_key_of(path, stat), stat.num_bytes) if folder is not None else None
        if found is None:
            if state.copies.pop(path, None) is not None:
                self._local.close()  # another process deleted it, and here it would still take its space
            return None
        state.copies[path] = _Copy(str(found), stat, now)
        return str(found)

    def _forget(self, wanted: ByteRange) -> None:
        copy = self._state.copies.pop(wanted.path, None)
        if copy is not None and self._folder is not None:
            self._folder.delete(Path(copy.path).name)
            self._local.close()

    def _keep(self, wanted: ByteRange, content: bytes) -> None:
        """Put into the cache what was read, in the background, or download the rest of it."""
        state, path, stat = self._state, wanted.path, self._stat_of(wanted)
        if stat is None or not stat.version:
            return
        if len(content) < stat.num_bytes:
            if state.num_whole.get(path, 0) < _MAX_WHOLE_DOWNLOADS:
                self.prefetch([path])
            return
        with state.lock:
            if path in state.noted or state.num_keeping >= _MAX_KEEPING:
                return
            state.num_keeping += 1
            state.noted.add(path)

        def keep() -> None:
            self._add(state, path, stat, lambda descriptor: _write_all(descriptor, content, 0))
            with state.lock:
                state.num_keeping -= 1
                state.noted.discard(path)

        run_in_thread(keep)

    def _download_all(self, state: "_State") -> None:
        """What a worker does: download what waits until nothing does."""
        while True:
            with state.lock:
                if not state.waiting:
                    state.num_workers -= 1
                    return
                path = state.waiting.popleft()
            self._download(state, path)
            with state.lock:
                state.noted.discard(path)

    def _download(self, state: "_State", path: str) -> None:
        try:
            stat = state.stats.get(path) or self.stat(path)
            if stat.version:
                state.num_whole[path] = state.num_whole.get(path, 0) + 1
                self._add(state, path, stat, lambda descriptor: self._download_to(descriptor, state, path, stat))
        except StorageError as exc:
            _logger.debug("not read ahead: %s", exc)  # whoever reads it gets the error
        finally:
            state.downloads.pop(path, None)

    def _download_to(self, descriptor: int, state: "_State", path: str, stat: FileStat) -> None:
        """Write the file chunk by chunk, each of the version `stat`."""
        step = CHUNK_BYTES * _CHUNKS_AT_ONCE
        download = state.downloads[path] = _Download(descriptor, stat)
        for offset in range(0, stat.num_bytes, step):
            ranges = [
                ByteRange(path, start, min(CHUNK_BYTES, stat.num_bytes - start), stat)
                for start in range(offset, min(offset + step, stat.num_bytes), CHUNK_BYTES)
            ]
            for wanted, content in zip(ranges, self._remote.read_many(ranges), strict=True):
                if isinstance(content, StorageError):
                    raise content
                _write_all(descriptor, content, wanted.start)
                download.num_done += len(content)

    def _add(self, state: "_State", path: str, stat: FileStat, write: Callable[[int], None]) -> None:
        folder = self._folder
        if folder is None:
            return
        patience_s = self._settings.deadline_s * (1 + stat.num_bytes // CHUNK_BYTES)
        try:
            added = folder.add(_key_of(path, stat), stat.num_bytes, write, patience_s)
        except OSError as exc:
            self._warn(exc)
        else:
            if added is not None:
                state.copies[path] = _Copy(str(added), stat, monotonic())

    @property
    def _folder(self) -> CacheFolder | None:
        """The cache, made when it is first needed; None if it cannot be written."""
        state = self._state
        if state.folder is None and not state.is_broken:
            with state.lock:
                if state.folder is None:
                    try:
                        folder = self._settings.cache_dir or temporary_without_cache("downloads")
                        state.folder = CacheFolder(folder, self._settings.cache_bytes)
                    except OSError as exc:
                        self._warn(exc)
        return state.folder

    def _warn(self, exc: OSError) -> None:
        """Say once that there is no cache, which makes reading slower, and nothing else."""
        state = self._state
        state.folder = None
        if not state.is_broken:
            state.is_broken = True
            _logger.warning(
                "files are not kept in the cache, but read again each time: %s: %s; make room, or set cache_dir to a "
                "folder on another disk",
                exc.filename or "the cache",
                exc.strerror,
            )


class _Copy(NamedTuple):
    """A file in the cache, which was there at the time `looked`."""

    path: str
    stat: FileStat
    looked: float


class _Download:
    """The first `num_done` bytes of a file, while the rest is on its way."""

    def __init__(self, descriptor: int, stat: FileStat) -> None:
        self._descriptor, self._stat, self.num_done = os.dup(descriptor), stat, 0

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, wanted: ByteRange, stat: FileStat | None) -> bytes | None:
        """The range, if it is there, and if the file is what `stat` says."""
        if wanted.length is None or wanted.start + wanted.length > self.num_done or stat != self._stat:
            return None
        content = os.pread(self._descriptor, wanted.length, wanted.start)
        return content if len(content) == wanted.length else None


class _State:
    """What belongs to one process.

    Attributes:
        stats: of files that were asked about.
        copies: files in the cache.
        waiting: to be downloaded.
        downloads: what is being downloaded.
        noted: those, those that are being downloaded, and those that are being written.
        num_whole: downloads of each file.
        folder: None before it is needed, and if it is broken.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = Lock()
        self.stats: dict[str, FileStat] = {}
        self.copies: dict[str, _Copy] = {}
        self.waiting: deque[str] = deque()
        self.downloads: dict[str, _Download] = {}
        self.noted: set[str] = set()
        self.num_whole: dict[str, int] = {}
        self.num_workers = self.num_keeping = 0
        self.folder: CacheFolder | None = None
        self.is_broken = False


def _key_of(path: str, stat: FileStat) -> str:
    """A name for one version of a file. What is signed in a URL changes, so with an ETag the query does not count."""
    address = shown(path) if stat.version.startswith(('"', 'W/"')) else path
    return sha256("\0".join((address, stat.version, str(stat.num_bytes))).encode()).hexdigest()[:40]


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        num_bytes = os.pwrite(descriptor, view, offset)
        view, offset = view[num_bytes:], offset + num_bytes
