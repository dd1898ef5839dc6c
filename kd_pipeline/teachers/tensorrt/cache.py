"""The folder of cached engines, and the temporary folder of a build."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_pipeline._core.user_cache import user_cache
from kd_pipeline.errors import EngineError

__all__ = ["build_folder", "cache_folder"]


def cache_folder() -> Path:
    """Return `kd_pipeline/engines` in `$XDG_CACHE_HOME` or `~/.cache`; created if needed, for this user only.

    Raises:
        EngineError: this user has no home folder.
        OSError: the folder cannot be created.
    """
    try:
        return user_cache("engines")
    except RuntimeError as exc:
        raise EngineError(f"there is no folder for engines ({exc}); set XDG_CACHE_HOME, or pass save_engine") from None


@contextmanager
def build_folder(engine: Path) -> Iterator[Path]:
    """Make an empty folder on the filesystem of `engine`, for the holder of its lock, and remove it at the end.

    Its name is always the same, so the next build removes what a killed one left.
    """
    folder = engine.with_name(f".{engine.name}.building")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
