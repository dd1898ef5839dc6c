"""The JSON file that a user names for a result: looked at before the work, and written whole after it."""

import os
from pathlib import Path

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import describe_special
from kd_pipeline.errors import ConfigError

__all__ = ["prepare_output", "write_output"]


def prepare_output(out: Path, *, kind: str = "JSON file") -> None:
    """Create the folder of a result file, a `kind` for messages, now, rather than fail after an hour of work.

    Raises:
        ConfigError: `out` is a folder, a link or no regular file, or its folder cannot be created.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        special = describe_special(os.lstat(out).st_mode)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ConfigError(f"out: {out} cannot be written: {exc.strerror}; choose another") from None
    if special is not None:
        special = special.replace("directory", "folder")
        raise ConfigError(f"out: {out} is {special}; give the name of a {kind}, which may exist and is then replaced")


def write_output(out: Path, text: str) -> None:
    """Write a result to a file that `prepare_output` has looked at.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_atomic(out, text)
    except OSError as exc:
        raise ConfigError(f"out: {out} cannot be written: {exc.strerror}; choose another") from None
