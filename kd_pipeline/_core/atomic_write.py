"""Files that are there whole or not at all, and the right to write one."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["locked", "whole_file", "write_whole"]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end: whoever reads there finds the old or the new one.

    It lies in the same folder, where a rename is atomic (TMPDIR may be on another disk), and its bytes reach the disk
    before its name does. After an error there is only the old one. A process that is killed may leave `.NAME.*.tmp`.
    """
    # Not the number of the process, which containers that share a folder have alike.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the bytes, or the text in UTF-8, as the file `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def locked(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the right to write `path`; a process that dies gives it back. `on_wait` is called where another holds it.

    The lock file stays: if the last holder deleted it, one waiting for the old file and one opening a new file of the
    same name would both go on.
    """
    lock = path.with_name(f".{path.name}.lock")
    # Not through a symlink, with which another user could have us touch a file of ours.
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
