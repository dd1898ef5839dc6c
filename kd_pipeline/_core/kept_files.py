"""Files that take long to make: made once, by one process, and kept in the user's cache by all they are made from."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kd_pipeline._core.atomic_write import locked
from kd_pipeline._core.user_cache import temporary_without_cache

__all__ = ["kept_folder"]

_logger = logging.getLogger("kd_pipeline")


def kept_folder(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `kind`/`key` in the user's cache; if there is none, `make` fills it first.

    Readers see a folder that is complete, or none. While one process makes it, others wait. Where this user has no
    cache, or somebody else could write to it, the folder lasts as long as this process.

    Args:
        kind: what is kept, such as `"exports"`.
        key: a digest of everything that the files depend on.
        make: writes the files into the empty folder that it gets.

    Raises:
        OSError: the folder cannot be written.
        Whatever `make` raises; nothing is kept then.
    """
    folder = temporary_without_cache(kind) / key
    if folder.is_dir():
        return folder
    with locked(folder, lambda: _logger.info("waiting for another process that makes %s", folder)):
        if not folder.is_dir():
            building = folder.with_name(f".{key}.building")
            shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
            building.mkdir(mode=0o700)
            try:
                make(building)
                os.replace(building, folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return folder
