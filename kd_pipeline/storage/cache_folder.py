"""A folder of whole files that were downloaded, bounded in size, and shared by any number of processes."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["CacheFolder"]

_PART = ".part"
_LOCK, _LIMIT = ".lock", ".limit-"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_KEPT_OF_FULL = 0.95
"""Part of the limit that is kept when there is no room, so that the folder is not listed for each new file."""
_UNLISTED = 0.02
"""Part of the limit that this process adds before it looks at what others have added."""
_POLL_S = 0.05
_LOCK_PATIENCE_S = 5.0


class CacheFolder:
    """Files by key, which have their names when they are whole; until then they are parts, locked by who writes them.

    The files that were used last stay. The largest limit of all processes that have the folder open holds for all of
    them, so that one with a small limit does not delete what another one needs.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make the folder.

        Raises:
            OSError: it cannot be made or written.
        """
        self.folder, self._max_bytes = folder, max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own_limit = _lock_shared(folder / f"{_LIMIT}{max_bytes}")
        self._num_bytes, self._num_unlisted = 0, max_bytes

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self._own_limit)

    def find(self, key: str, num_bytes: int) -> Path | None:
        """The file `key` if it is there; it then counts as used now. One of another size is deleted."""
        path = self.folder / key
        try:
            if path.stat().st_size == num_bytes:
                os.utime(path)
                return path
            path.unlink()
        except OSError:
            pass
        return None

    def delete(self, key: str) -> None:
        """Delete a file that turned out to be wrong."""
        with suppress(OSError):
            (self.folder / key).unlink()

    def add(self, key: str, num_bytes: int, write: Callable[[int], None], patience_s: float) -> Path | None:
        """The file `key`, which `write` writes to a descriptor if no other process does.

        Returns:
            None if it is larger than all the folder may be, or another process writes it for longer than `patience_s`.

        Raises:
            OSError: there is no room on the disk, even with all other files deleted, or it cannot be written.
            Whatever `write` raises; nothing is kept then.
        """
        part = self.folder / f"{key}{_PART}"
        with _locked_part(part, patience_s) as descriptor:
            if (found := self.find(key, num_bytes)) is not None or descriptor is None:
                if descriptor is not None:
                    part.unlink()
                return found
            try:
                if not self._make_room(num_bytes, descriptor, part.name):
                    part.unlink()
                    return None
                write(descriptor)
                if os.fstat(descriptor).st_size != num_bytes:
                    raise OSError(errno.EIO, "the file has not the size that was written", str(part))
                os.fsync(descriptor)  # or after a crash the name could be there, and the bytes not
                os.replace(part, self.folder / key)
            except BaseException:
                with suppress(OSError):
                    part.unlink()
                raise
        return self.folder / key

    def _make_room(self, num_bytes: int, descriptor: int, name: str) -> bool:
        """Delete what was not used for longest, and take `num_bytes` of the disk for `descriptor`, the part `name`."""
        os.ftruncate(descriptor, 0)  # left by a process that was killed
        with _locked(self.folder / _LOCK):
            limit = self._limit()
            if num_bytes > limit:
                return False
            self._num_unlisted += num_bytes
            self._num_bytes += num_bytes
            if self._num_bytes > limit or self._num_unlisted > _UNLISTED * limit:
                self._delete_oldest(limit, num_bytes, name)
            while True:
                try:
                    _allocate(descriptor, num_bytes)
                    return True
                except OSError as exc:
                    if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    if not self._delete_oldest(0, num_bytes, name, at_least=num_bytes):
                        raise

    def _delete_oldest(self, limit: int, num_bytes: int, name: str, *, at_least: int = 0) -> bool:
        """Delete files until `num_bytes` of `limit` are free, or at least `at_least`; False if no file is left."""
        files = sorted(self._list(name))
        total, num_deleted = num_bytes + sum(file.num_bytes for file in files), 0
        keep = limit if total <= limit else max(int(limit * _KEPT_OF_FULL), num_bytes)
        for file in files:
            if total <= keep or (at_least and num_deleted >= at_least):
                break
            if file.path.suffix != _PART:
                with suppress(OSError):
                    file.path.unlink()
                    total -= file.num_bytes
                    num_deleted += file.num_bytes
        self._num_bytes, self._num_unlisted = total, 0
        return num_deleted > 0

    def _list(self, name: str) -> Iterator["_File"]:
        """The files and parts, but for the part `name`. Parts that nobody writes are deleted."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == name:
                    continue
                with suppress(OSError):
                    if not (entry.name.endswith(_PART) and _delete_unlocked(Path(entry.path))):
                        status = entry.stat(follow_symlinks=False)
                        yield _File(status.st_mtime, status.st_size, Path(entry.path))

    def _limit(self) -> int:
        """The largest limit of all processes that use the folder."""
        limits = [self._max_bytes]
        for path in self.folder.glob(f"{_LIMIT}*"):
            with suppress(OSError, ValueError):
                if not _delete_unlocked(path):
                    limits.append(int(path.name.removeprefix(_LIMIT)))
        return max(limits)


class _File(NamedTuple):
    used: float
    num_bytes: int
    path: Path


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Take the space at once: a full disk is noticed before the download."""
    if num_bytes:
        os.posix_fallocate(descriptor, 0, num_bytes)


@contextmanager
def _locked_part(part: Path, patience_s: float) -> Iterator[int | None]:
    """A descriptor of the file `part` with its lock, which the kernel takes from a process that dies; None in vain."""
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = os.open(part, _FLAGS, 0o600)
        try:
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(_POLL_S)
            if _is_at(descriptor, part):  # and not renamed or deleted by who had the lock before
                yield descriptor
                return
        finally:
            _unlock(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that nobody has for long; without it, more may be deleted than needs to be, which does no harm."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    descriptor = os.open(path, _FLAGS, 0o600)
    try:
        while not _try_lock(descriptor) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield
    finally:
        _unlock(descriptor)


def _lock_shared(path: Path) -> int:
    """A descriptor of the file `path`, which is not deleted while somebody has one."""
    while True:
        descriptor = os.open(path, _FLAGS, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _delete_unlocked(path: Path) -> bool:
    """Delete the file if nobody has its lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink()
        return True
    finally:
        _unlock(descriptor)


def _unlock(descriptor: int) -> None:
    """Close the file; to close it alone would leave the lock to a fork that has the descriptor too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
