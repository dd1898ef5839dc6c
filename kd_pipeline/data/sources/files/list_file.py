"""A file list as it is opened: from a disk, or downloaded from a store."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.paths import Url
from kd_pipeline.data.sources.files.remote_files import Stores
from kd_pipeline.errors import DataError, shown

__all__ = ["MAX_LIST_BYTES", "ListFile", "open_list"]

MAX_LIST_BYTES = 2**32
"""What has a terabyte is no list, and hashing it takes longer than finding that out."""


@dataclass(frozen=True, slots=True)
class ListFile:
    """A list."""

    name: str
    """Its path, or its URL without credentials."""
    open: Callable[[], BinaryIO]
    """Opens it; raises OSError."""
    folder: Path | None
    """Where it is; None if it is behind a URL."""

    def __str__(self) -> str:
        return self.name

    @classmethod
    def at(cls, path: Path) -> "ListFile":
        """The list at a local path."""
        return cls(str(path), partial(open_regular, path), path.parent)

    @property
    def suffix(self) -> str:
        """Such as `.csv`, in lowercase."""
        return PurePosixPath(self.name).suffix.lower()


def open_list(path: Path | Url, stores: Stores) -> ListFile:
    """The list at `path`, which is downloaded if that is a URL.

    Raises:
        DataError: it is a folder, or far too large to be downloaded.
        StorageError: its store does not give it.
    """
    if isinstance(path, Path):
        if path.is_dir():
            raise DataError(
                f"{path} is a folder, and path is the file with the list; for images in class folders take "
                f"kind: image_folder with root: {path}"
            )
        return ListFile.at(path)
    store = stores.of(path)
    if (size := store.stat(path).num_bytes) > MAX_LIST_BYTES:
        raise DataError(f"{shown(path)} has {size} bytes, and a list has at most {MAX_LIST_BYTES}; split it")
    return ListFile(shown(path), partial(io.BytesIO, store.read(path)), None)
