"""Files on local and mounted disks."""

import errno
import glob
import os
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import open_regular
from kd_pipeline.errors import NoSuchFileError, StorageError
from kd_pipeline.storage.base import FileStat, FolderEntry, require_at_most
from kd_pipeline.storage.changes import changed

__all__ = ["LocalStore"]

_MAX_OPEN = 128
"""Files kept open; the limit of a process is often 1024."""


class LocalStore:
    """Reads by `pread` from files that stay open, at any number of threads and in forks."""

    num_threads = 4

    def __init__(self, max_open: int = _MAX_OPEN) -> None:
        # It needs no lock, which another thread might hold while this process is forked.
        self._open = lru_cache(max_open)(_OpenFile)

    def stat(self, path: str) -> FileStat:
        """Size and time of the last change; not the inode, so that a copy with its times counts as the same file."""
        try:
            return _file_stat(os.stat(path))
        except OSError as exc:
            raise _error(path, exc) from None

    def read(
        self,
        path: str,
        start: int = 0,
        length: int | None = None,
        *,
        expected: FileStat | None = None,
        max_bytes: int | None = None,
    ) -> bytes:
        """See `Store`; without `expected`, and but for whole files, a file stays what it was when it was opened."""
        try:
            if length is None:
                file = _OpenFile(path)
                length = file.stat.num_bytes - start
                require_at_most(path, file.stat, max_bytes)
            else:
                file = self._open(path)
            if expected is not None and file.stat != expected:
                file = self._reopen(path, expected)
            content = os.pread(file.descriptor, length, start) if length > 0 else b""
            if len(content) < length:  # one call returns at most 2 GiB, and a network disk may return less
                content = _read_rest(file.descriptor, content, length, start)
        except OSError as exc:
            raise _error(path, exc, start) from None
        if len(content) != length:
            what = f"{max(length, 0)} bytes were expected here and {len(content)} are left"
            raise StorageError(path, f"the file was cut: {what}; copy it again", offset=start)
        return content

    def find(self, pattern: str) -> list[str]:
        """See `Store`. `**` is any number of folders."""
        return sorted(glob.glob(pattern, recursive=True))

    def list_folder(self, path: str) -> list[FolderEntry]:
        """See `Store`; hidden files and what is no regular file are listed too."""
        try:
            with os.scandir(path) as entries:
                found = [FolderEntry(each.name, None if each.is_dir() else each.stat().st_size) for each in entries]
        except OSError as exc:
            raise _error(path, exc) from None
        return sorted(found, key=itemgetter(0))

    def write(self, path: str, content: bytes) -> None:
        """See `Store`."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), content)
        except OSError as exc:
            raise StorageError(path, f"cannot be written: {exc.strerror}") from None

    def prefetch(self, paths: Sequence[str]) -> None:
        """Nothing: the system reads ahead."""

    def close(self) -> None:
        """Close the files."""
        self._open.cache_clear()

    def _reopen(self, path: str, expected: FileStat) -> "_OpenFile":
        file = _OpenFile(path)
        if file.stat != expected:
            raise StorageError(path, changed(expected, file.stat))
        self._open.cache_clear()  # the one it keeps is of a file that is no longer at `path`
        return self._open(path)


class _OpenFile:
    """A descriptor that is closed when nobody holds this object, so never while a thread reads from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        with open_regular(path) as file:
            self.descriptor = os.dup(file.fileno())  # close-on-exec, like all that Python opens
        self.stat = _file_stat(os.fstat(self.descriptor))

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _file_stat(status: os.stat_result) -> FileStat:
    return FileStat(status.st_size, str(status.st_mtime_ns))


def _read_rest(descriptor: int, content: bytes, length: int, start: int) -> bytes:
    parts, num_bytes = [content], len(content)
    while num_bytes < length and (part := os.pread(descriptor, length - num_bytes, start + num_bytes)):
        parts.append(part)
        num_bytes += len(part)
    return b"".join(parts)


def _error(path: str, exc: OSError, offset: int | None = None) -> StorageError:
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return NoSuchFileError(path, "no such file", offset=offset)
    return StorageError(path, f"cannot be read: {exc.strerror}", offset=offset)
