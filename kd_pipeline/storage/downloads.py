"""Whole files on their way from a remote store into the folder of the cache: a few at once, in the background."""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import NamedTuple

from kd_pipeline._core.user_cache import temporary_without_cache
from kd_pipeline.errors import StorageError, shown
from kd_pipeline.storage.base import FileStat, StoreSettings
from kd_pipeline.storage.cache_folder import CacheFolder
from kd_pipeline.storage.parallel import ByteRange, run_in_thread
from kd_pipeline.storage.remote import CHUNK_BYTES, RemoteStore

__all__ = ["Downloads"]

_logger = logging.getLogger("kd_pipeline")

_NUM_WORKERS = 2
"""Files downloaded at once, each in several requests."""
_CHUNKS_AT_ONCE = 4
_MAX_WAITING = 256
"""Files that wait to be downloaded; more are not noted."""
_MAX_KEEPING = 64
"""Contents that wait to be written; more are not kept."""
_TOUCH_S = 30.0
"""How often a file that is being read is marked as used."""


class Downloads:
    """Those of one process.

    Attributes:
        noted: files that wait, are being downloaded or are being written.
        num_downloads: of each file.
        parts: files that are being downloaded.
    """

    def __init__(self, remote: RemoteStore, settings: StoreSettings, on_deleted: Callable[[], None]) -> None:
        """`on_deleted` is called when a file that may be open was deleted, and here would still take its space."""
        self._remote, self._settings, self._on_deleted = remote, settings, on_deleted
        self._lock = Lock()
        self._waiting: deque[str] = deque()
        self._copies: dict[str, _Copy] = {}
        self._num_workers = self._num_keeping = 0
        self._folder: CacheFolder | None = None
        self._is_broken = False
        self.noted: set[str] = set()
        self.num_downloads: dict[str, int] = {}
        self.parts: dict[str, _Part] = {}

    def want(self, paths: Sequence[str], stat_of: Callable[[str], FileStat]) -> None:
        """Download the files that are not there yet, in this order."""
        with self._lock:
            for path in paths:
                if path not in self.noted and len(self._waiting) < _MAX_WAITING:
                    self.noted.add(path)
                    self._waiting.append(path)
            num_new = max(min(_NUM_WORKERS - self._num_workers, len(self._waiting)), 0)
            self._num_workers += num_new
        for _ in range(num_new):
            run_in_thread(lambda: self._work(stat_of))

    def keep(self, path: str, stat: FileStat, content: bytes) -> None:
        """Write the content of a whole file, which was read anyway."""
        with self._lock:
            if path in self.noted or self._num_keeping >= _MAX_KEEPING or not stat.version:
                return
            self.noted.add(path)
            self._num_keeping += 1

        def keep() -> None:
            self._add(path, stat, lambda descriptor: _write_all(descriptor, content, 0))
            with self._lock:
                self.noted.discard(path)
                self._num_keeping -= 1

        run_in_thread(keep)

    def stop(self) -> None:
        """Begin no more."""
        with self._lock:
            self.noted.difference_update(self._waiting)
            self._waiting.clear()

    def copy_of(self, path: str, stat: FileStat | None) -> str | None:
        """The file of the cache that is the version `stat` of `path`."""
        copy, now = self._copies.get(path), monotonic()
        if copy is not None and now - copy.looked < _TOUCH_S and copy.stat == stat:
            return copy.path
        if stat is None or not stat.version:
            return None
        folder = self._open_folder()
        found = folder.find(_key_of(path, stat), stat.num_bytes) if folder is not None else None
        if found is not None:
            self._copies[path] = _Copy(str(found), stat, now)
            return str(found)
        if self._copies.pop(path, None) is not None:
            self._on_deleted()
        return None

    def read_part(self, wanted: ByteRange, stat: FileStat | None) -> bytes | None:
        """A range of a file that is being downloaded, if it is there already."""
        part = self.parts.get(wanted.path)
        return part.read(wanted, stat) if part is not None else None

    def forget(self, path: str, *, is_wrong: bool = False) -> None:
        """Look again for the copy of `path`, and delete it if it is wrong."""
        copy = self._copies.pop(path, None)
        if copy is not None and is_wrong and self._folder is not None:
            self._folder.delete(Path(copy.path).name)
            self._on_deleted()

    def _work(self, stat_of: Callable[[str], FileStat]) -> None:
        """Download what waits until nothing does."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_workers -= 1
                    return
                path = self._waiting.popleft()
            self._download(path, stat_of)
            with self._lock:
                self.noted.discard(path)

    def _download(self, path: str, stat_of: Callable[[str], FileStat]) -> None:
        try:
            stat = stat_of(path)
            if stat.version:  # without one, nobody could tell whether the copy is old
                self._add(path, stat, lambda descriptor: self._download_to(descriptor, path, stat))
        except StorageError as exc:
            _logger.debug("not downloaded: %s", exc)  # whoever reads it gets the error
        finally:
            self.parts.pop(path, None)

    def _download_to(self, descriptor: int, path: str, stat: FileStat) -> None:
        """Write the file chunk by chunk, each of the version `stat`."""
        self.num_downloads[path] = self.num_downloads.get(path, 0) + 1
        part = self.parts[path] = _Part(descriptor, stat)
        step = CHUNK_BYTES * _CHUNKS_AT_ONCE
        for offset in range(0, stat.num_bytes, step):
            ranges = [
                ByteRange(path, start, min(CHUNK_BYTES, stat.num_bytes - start), stat)
                for start in range(offset, min(offset + step, stat.num_bytes), CHUNK_BYTES)
            ]
            for wanted, content in zip(ranges, self._remote.read_many(ranges), strict=True):
                if isinstance(content, StorageError):
                    raise content
                _write_all(descriptor, content, wanted.start)
                part.num_done += len(content)

    def _add(self, path: str, stat: FileStat, write: Callable[[int], None]) -> None:
        folder = self._open_folder()
        if folder is None:
            return
        patience_s = self._settings.deadline_s * (1 + stat.num_bytes // CHUNK_BYTES)
        try:
            added = folder.add(_key_of(path, stat), stat.num_bytes, write, patience_s)
        except OSError as exc:
            self._warn(exc)
        else:
            if added is not None:
                self._copies[path] = _Copy(str(added), stat, monotonic())

    def _open_folder(self) -> CacheFolder | None:
        """The folder, made when it is first needed; None if it cannot be written."""
        if self._folder is None and not self._is_broken:
            with self._lock:
                if self._folder is None:
                    try:
                        folder = self._settings.cache_dir or temporary_without_cache("downloads")
                        self._folder = CacheFolder(folder, self._settings.cache_bytes)
                    except OSError as exc:
                        self._warn(exc)
        return self._folder

    def _warn(self, exc: OSError) -> None:
        """Say once that there is no cache, which makes reading slower, and nothing else."""
        self._folder = None
        if not self._is_broken:
            self._is_broken = True
            _logger.warning(
                "files are no longer kept in the cache, but read from their URLs each time: %s: %s; make room, or set "
                "storage.cache_dir to a folder on another disk",
                exc.filename or self._settings.cache_dir or "the user's cache",
                exc.strerror,
            )


class _Copy(NamedTuple):
    """A file in the cache, which was there at the time `looked`."""

    path: str
    stat: FileStat
    looked: float


class _Part:
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


def _key_of(path: str, stat: FileStat) -> str:
    """A name for one version of a file. What is signed in a URL changes, so with an ETag the query does not count."""
    address = shown(path) if stat.version.startswith(('"', 'W/"')) else path
    return sha256("\0".join((address, stat.version, str(stat.num_bytes))).encode()).hexdigest()[:40]


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        num_bytes = os.pwrite(descriptor, view, offset)
        view, offset = view[num_bytes:], offset + num_bytes
