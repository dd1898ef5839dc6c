"""The user's cache folder, which holds programs and what programs are made from, and is therefore this user's alone."""

import atexit
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from kd_pipeline._core.files import check_trusted_folder

__all__ = ["temporary_without_cache", "user_cache", "user_cache_path"]

_logger = logging.getLogger("kd_pipeline")


def user_cache(kind: str) -> Path:
    """The folder `kd_pipeline/<kind>` in `$XDG_CACHE_HOME` or `~/.cache`; every folder it creates is this user's alone.

    Raises:
        RuntimeError: the user has no home folder.
        UntrustedFileError: another user could write to it or to a folder above it.
        OSError: the folder cannot be created.
    """
    folder = user_cache_path(kind)
    missing = [level for level in (folder, *folder.parents) if not level.is_dir()]
    check_trusted_folder(missing[-1].parent if missing else folder)
    for level in reversed(missing):  # parents=True would give the mode to the last one only
        level.mkdir(mode=0o700, exist_ok=True)
    if missing:
        check_trusted_folder(folder)
    return folder


def user_cache_path(kind: str) -> Path:
    """The folder `user_cache(kind)`, which may not exist.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # by the XDG specification it is then to be ignored
        base = Path.home() / ".cache"
    return base.absolute() / "kd_pipeline" / kind


def temporary_without_cache(kind: str) -> Path:
    """`user_cache(kind)`, or a folder that lasts as long as this process where there is none; a warning says why."""
    try:
        return user_cache(kind)
    except (OSError, RuntimeError) as exc:
        return _temporary(kind, str(exc.strerror if isinstance(exc, OSError) else exc))


@cache
def _temporary(kind: str, reason: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"kd_pipeline-{kind}-"))
    _logger.warning("what is kept in the cache of %s lasts only for this process: no cache folder, as %s", kind, reason)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked
        shutil.rmtree(folder, ignore_errors=True)
