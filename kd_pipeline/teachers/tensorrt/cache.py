"""Where engines lie, and the folder that one is built in."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_pipeline._core.user_cache import user_cache
from kd_pipeline.errors import EngineError

__all__ = ["cache_folder", "folder_beside"]


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
