"""Atomic file writes, and a lock that allows one writer at a time."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from kd_pipeline._core.files import NotAFileError, describe_special, open_own

__all__ = ["atomic_file", "locked", "write_atomic"]


@contextmanager
def atomic_file(path: Path, *, permissions: int = 0o666) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path` when the `with` ends; readers see the old content or the new, never a part.

    It is in the folder of `path`, because a rename is atomic only within one disk, and its bytes reach the disk before
    its name does. After an error `path` is unchanged. A process that is killed may leave `.NAME.*.tmp`.

    A link at `path` is replaced, and what it points to stays as it is.

    Args:
        path: the file.
        permissions: of the new file, less those that the umask takes away; not those of the file that it replaces.

    Raises:
        NotAFileError: `path` is a directory, pipe, socket or device, and stays.
        OSError: the file cannot be written.
    """
    _refuse_special(path)
    # A UUID and no process ID: containers that share a folder may have equal ones.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC  # O_EXCL follows no link
        with os.fdopen(os.open(temporary, flags, permissions), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomic(path: Path, content: str | bytes, *, permissions: int = 0o666) -> None:
    """Write bytes, or text as UTF-8, to `path` as `atomic_file` does."""
    with atomic_file(path, permissions=permissions) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def locked(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the exclusive lock for writing `path`; the kernel releases it if the process dies.

    `on_wait` is called once if another process holds the lock. The lock file is never deleted: a process that waits
    for the deleted file and one that creates it again would both hold a lock.

    Raises:
        NotAFileError: the lock file is a link or no regular file. `strerror` names it, and says what to do.
        OSError: it cannot be opened.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        file = open_own(lock, "ab", permissions=0o600)
    except NotAFileError as exc:
        raise NotAFileError(exc.errno, f"{exc.strerror} ({lock})", str(lock)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)  # a handler of a signal that raises ends the wait
        yield


def _refuse_special(path: Path) -> None:
    """A rename would replace a pipe or a device, such as /dev/null for root."""
    try:
        status = os.lstat(path)
    except OSError:
        return  # nothing is there, or writing says why it cannot be
    kind = describe_special(status.st_mode)
    if kind is not None and not stat.S_ISLNK(status.st_mode):
        raise NotAFileError(errno.EINVAL, f"this is {kind} and no file", str(path))
