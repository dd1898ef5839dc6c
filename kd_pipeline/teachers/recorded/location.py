"""The folder of a recording, wherever it is."""

import os
from pathlib import Path

from kd_pipeline._core.paths import Url, path_or_url
from kd_pipeline.errors import ConfigError
from kd_pipeline.storage import StoreSettings
from kd_pipeline.teachers.recorded.folder import LocalFolder
from kd_pipeline.teachers.recorded.remote import RemoteFolder

__all__ = ["AnyFolder", "open_folder"]

AnyFolder = LocalFolder | RemoteFolder
"""Where a recording is written and read."""


def open_folder(path: str | os.PathLike[str], settings: StoreSettings | None = None) -> AnyFolder:
    """The folder at a local path or URL, which need not exist.

    Raises:
        ConfigError: it is neither, or nothing reads such URLs.
        MissingPackageError: the package that does is not installed.
    """
    try:
        place = path_or_url(path)
    except ValueError as exc:
        raise ConfigError(str(exc)) from None
    return RemoteFolder(place, settings) if isinstance(place, Url) else LocalFolder(Path(place))
