"""Where engines lie, and how one process builds an engine while the others wait for it."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_pipeline.errors import EngineError
from kd_pipeline.user_cache import user_cache

__all__ = ["cache_folder", "folder_beside", "locked"]


def cache_folder() -> Path:
    """`kd_pipeline/engines` in `$XDG_CACHE_HOME` or `~/.cache`; made for this user alone if it is not there.

    Raises:
        EngineError: this user has no home folder.
        OSError: it cannot be made.
    """
    try:
        return user_cache("engines")
    except RuntimeError as exc:
        raise EngineError(f"there is no place for engines ({exc}); set XDG_CACHE_HOME, or give save_engine") from None


@contextmanager
def locked(engine: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the right to write `engine`; a process that dies gives it back.

    The lock file stays: if the last holder deleted it, one waiting for the old file and one opening a new file of the
    same name would both go on.
    """
    path = engine.with_name(f".{engine.name}.lock")
    # Not through a symlink, with which another user could have us touch a file of ours.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that builds {engine}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def folder_beside(engine: Path) -> Iterator[Path]:
    """An empty folder on the same filesystem as `engine`, for whoever holds its lock; it goes when the work is over.

    Its name is always the same, so that the next build removes what a killed one left.
    """
    folder = engine.with_name(f".{engine.name}.building")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
