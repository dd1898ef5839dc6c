"""What a store is: named files on a disk or behind a URL, of which whole ranges of bytes are read, or an error."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import Field, field_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import FileTooLargeError

__all__ = ["FileStat", "FolderEntry", "Store", "StoreSettings", "parse_size", "require_at_most", "scheme_of"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
"""Two letters or more, because `C:/` is a drive."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kMGT]?B)?")
_UNITS = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class StoreSettings(Settings):
    """How remote files are read; local ones need none of this."""

    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds that one request may take with all its retries, after which it is an error."""
    retries: int = Field(default=8, ge=0)
    """How often a request is repeated after a failure that may pass, within the deadline."""
    num_requests: int = Field(default=32, ge=1)
    """Requests at once."""
    cache_dir: Path | None = None
    """Folder of whole files that were downloaded; defaults to one in the user's cache. Processes may share it."""
    cache_size: int | str = "10 GB"
    """Bytes that the files in `cache_dir` may have together, such as 500 MB or 2 TB; 0 keeps none."""

    @property
    def cache_bytes(self) -> int:
        """`cache_size` in bytes."""
        return parse_size(self.cache_size)

    @field_validator("cache_size")
    @classmethod
    def _check_size(cls, size: int | str) -> int | str:
        parse_size(size)
        return size


class FileStat(NamedTuple):
    """What tells a file from what it was before."""

    num_bytes: int
    version: str
    """Changes with the content: time of the last change of a local file, ETag or the like of a remote one."""


class FolderEntry(NamedTuple):
    """What is in a folder."""

    name: str
    num_bytes: int | None
    """Of a file; None for a folder."""


class Store(Protocol):
    """Files of one kind of place. Paths are what the user wrote: local ones, or whole URLs of the store's scheme.

    All methods may be called from several threads at once, and after a fork.
    """

    num_threads: int
    """Reads at once that are worth it."""

    def stat(self, path: str) -> FileStat:
        """Size and version of a file.

        Raises:
            NoSuchFileError: there is none.
            StorageError: the store does not say.
        """
        ...

    def read(
        self,
        path: str,
        start: int = 0,
        length: int | None = None,
        *,
        expected: FileStat | None = None,
        max_bytes: int | None = None,
    ) -> bytes:
        """Exactly the `length` bytes of a file from byte `start` on, by default all to its end.

        Args:
            path: the file.
            start: first byte.
            length: number of bytes.
            expected: what `stat` said when it was found out what is where in the file. A file that has changed since
                is an error. Local files are looked at when they are opened, and not at every read.
            max_bytes: of a file that is read to its end.

        Raises:
            NoSuchFileError: there is no such file.
            FileTooLargeError: it has more than `max_bytes`; little of it was read.
            StorageError: the file ends before, has changed, or the store failed until its deadline.
        """
        ...

    def find(self, pattern: str) -> list[str]:
        """The paths that match a pattern with `*`, `?` and `[...]`, sorted; perhaps none.

        Raises:
            StorageError: the store cannot list files.
        """
        ...

    def list_folder(self, path: str) -> list[FolderEntry]:
        """The files and folders in a folder, by name. In most stores, one that does not exist is one without files.

        Raises:
            NoSuchFileError: there is no such folder.
            StorageError: the store cannot list files.
        """
        ...

    def write(self, path: str, content: bytes) -> None:
        """Write a whole file, with the folders it needs; readers see the old content or the new, never a part.

        Raises:
            StorageError: it cannot be written.
        """
        ...

    def prefetch(self, paths: Sequence[str]) -> None:
        """Note that these files will be read soon, and whole. Returns at once, and raises nothing."""
        ...

    def close(self) -> None:
        """Release files and threads; reading opens them again."""
        ...


def scheme_of(path: str | Path) -> str | None:
    """`s3` of `s3://bucket/a.tar`; None for a local path."""
    match = _SCHEME.match(str(path))
    return match[1].lower() if match else None


def require_at_most(path: str, stat: FileStat, max_bytes: int | None) -> None:
    """Refuse a file that is too large to be read.

    Raises:
        FileTooLargeError: it is.
    """
    if max_bytes is not None and stat.num_bytes > max_bytes:
        raise FileTooLargeError(path, f"it has {stat.num_bytes} bytes, and at most {max_bytes} are read")


def parse_size(size: int | str) -> int:
    """Bytes in a number, or in a text such as `20 GB`.

    Raises:
        ValueError: it is neither.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise ValueError(f"the size {size!r} should be a number of bytes, or one with kB, MB, GB or TB, such as 20 GB")
    return int(float(match[1]) * _UNITS[match[2]])
