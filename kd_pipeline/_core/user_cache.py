"""Where this user's machine keeps what can be made again."""

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache(kind: str) -> Path:
    """`kd_pipeline/<kind>` in `$XDG_CACHE_HOME` or `~/.cache`; made for this user alone if it is not there.

    Raises:
        RuntimeError: this user has no home folder.
        OSError: it cannot be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base.absolute() / "kd_pipeline" / kind
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
