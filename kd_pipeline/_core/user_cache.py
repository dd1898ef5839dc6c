"""The user's cache folder."""

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache(kind: str) -> Path:
    """The folder `kd_pipeline/<kind>` in `$XDG_CACHE_HOME` or `~/.cache`, created with access for this user only.

    Raises:
        RuntimeError: the user has no home folder.
        OSError: the folder cannot be created.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base.absolute() / "kd_pipeline" / kind
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
