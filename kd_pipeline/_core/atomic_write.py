"""Atomic file writes, and a lock that allows one writer at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["atomic_file", "locked", "write_atomic"]


@contextmanager
def atomic_file(path: Path, *, permissions: int = 0o666) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path` when the `with` ends; readers see the old content or the new, never a part.

    It is in the folder of `path`, because a rename is atomic only within one disk, and its bytes reach the disk before
    its name does. After an error `path` is unchanged. A process that is killed may leave `.NAME.*.tmp`. The umask takes
    from `permissions`.
    """
    # A UUID and no process ID: containers that share a folder may have equal ones.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb", opener=partial(os.open, mode=permissions)) as file:
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
    """
    lock = path.with_name(f".{path.name}.lock")
    # O_NOFOLLOW: another user could point a symlink at one of our files.
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
