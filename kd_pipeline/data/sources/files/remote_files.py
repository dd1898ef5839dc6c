"""Images in files behind URLs: their bytes, and what a fingerprint needs, through the stores that they are in."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.files import read_regular
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.encoded import Encoded, as_encoded
from kd_pipeline.data.sources.files.paths import FilesOnDisk, PathTable
from kd_pipeline.errors import FileTooLargeError, NoSuchFileError, StorageError
from kd_pipeline.storage import (
    ByteRange,
    FileStat,
    Store,
    StoreSettings,
    open_store,
    read_ranges,
    scheme_of,
    stat_files,
)

__all__ = ["MAX_IMAGE_BYTES", "RemoteFiles", "Stores"]

MAX_IMAGE_BYTES = 2**30
"""Larger files are not downloaded: no image of theirs would be decoded."""
_MISSING = "the file does not exist"
_BLOCK = 32
"""Files that are read at once for a fingerprint."""


class Stores:
    """The stores of all schemes, each opened when it is needed."""

    def __init__(self, settings: StoreSettings | None) -> None:
        self._settings = settings
        self._opened: dict[str | None, Store] = {}

    def __reduce__(self) -> tuple[type["Stores"], tuple[StoreSettings | None]]:
        return Stores, (self._settings,)  # a copy opens its own

    def of(self, path: str) -> Store:
        """The store of a path or URL.

        Raises:
            ConfigError: nothing reads such URLs.
            MissingPackageError: the package that does is not installed.
        """
        scheme = scheme_of(path)
        if scheme not in self._opened:
            self._opened[scheme] = open_store(path, self._settings)
        return self._opened[scheme]

    def is_file(self, path: str) -> bool:
        """Whether there is such a file.

        Raises:
            StorageError: the store does not say.
        """
        if scheme_of(path) is None:
            return os.path.isfile(path)
        try:
            self.of(path).stat(path)
        except NoSuchFileError:
            return False
        return True


class RemoteFiles:
    """The files of a table, some of which are behind URLs.

    Args:
        paths: N paths and URLs.
        stores: opens what they need.
        sizes: `[N]`, bytes of the files where that is known.
    """

    max_sizes = 2**12
    """Files whose size goes into a fingerprint, as a store takes a request for each."""

    def __init__(self, paths: PathTable, stores: Stores, sizes: NDArray[np.int64] | None = None) -> None:
        self._paths, self._stores, self._sizes = paths, stores, sizes
        self._local = FilesOnDisk(paths)
        if sizes is not None:
            self.max_sizes = FilesOnDisk.max_sizes

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """What is in the files at `indices` `[n]`; see `Source.read`."""
        files = [self._paths.location(index) for index in indices.tolist()]
        found: dict[int, NDArray[np.uint8] | UnreadableFileError] = {}
        for scheme, rows in _by_scheme(files).items():
            if scheme is None:
                found |= {row: _read_local(files[row]) for row in rows}
                continue
            ranges = [ByteRange(files[row], max_bytes=MAX_IMAGE_BYTES) for row in rows]
            for row, content in zip(rows, read_ranges(self._stores.of(files[rows[0]]), ranges), strict=True):
                found[row] = _encoded(content)
        return [found[row] for row in range(len(files))]

    def sizes(self, index: Sequence[int]) -> NDArray[np.int64]:
        """Bytes of the files at `index` `[n]`; -1 for what does not exist.

        Raises:
            StorageError: a store does not say.
        """
        if self._sizes is not None:
            known: NDArray[np.int64] = self._sizes[np.asarray(index)]
            return known
        files = [self._paths.location(each) for each in index]
        sizes = np.empty(len(index), np.int64)
        for scheme, rows in _by_scheme(files).items():
            if scheme is None:
                sizes[rows] = self._local.sizes([index[row] for row in rows])
            else:
                found = stat_files(self._stores.of(files[rows[0]]), [files[row] for row in rows])
                sizes[rows] = list(map(_size, found))
        return sizes

    def digests(self, index: Sequence[int], max_bytes: int) -> Iterator[bytes | None]:
        """SHA-256 of the first `max_bytes` of the files at `index`; None for what does not exist.

        Raises:
            StorageError: a store did not give a file.
        """
        for start in range(0, len(index), _BLOCK):
            yield from self._digests(index[start : start + _BLOCK], max_bytes)

    def _digests(self, index: Sequence[int], max_bytes: int) -> Iterator[bytes | None]:
        files = [self._paths.location(each) for each in index]
        lengths = self.sizes(index).clip(0, max_bytes).tolist()
        found: dict[int, bytes | None] = {}
        for scheme, rows in _by_scheme(files).items():
            if scheme is None:
                own = self._local.digests([index[row] for row in rows], max_bytes)
                found |= zip(rows, own, strict=True)
                continue
            ranges = [ByteRange(files[row], 0, lengths[row]) for row in rows]
            for row, content in zip(rows, read_ranges(self._stores.of(files[rows[0]]), ranges), strict=True):
                if isinstance(content, StorageError) and not isinstance(content, NoSuchFileError):
                    raise content
                found[row] = None if isinstance(content, NoSuchFileError) else hashlib.sha256(content).digest()
        return (found[row] for row in range(len(files)))


def _by_scheme(files: Sequence[str]) -> dict[str | None, list[int]]:
    """The rows of the files of each scheme."""
    rows: defaultdict[str | None, list[int]] = defaultdict(list)
    for row, file in enumerate(files):
        rows[scheme_of(file)].append(row)
    return dict(rows)


def _read_local(file: str) -> NDArray[np.uint8] | UnreadableFileError:
    try:
        return as_encoded(read_regular(file, max_bytes=MAX_IMAGE_BYTES))
    except FileNotFoundError:
        return UnreadableFileError(_MISSING)
    except OSError as exc:
        return UnreadableFileError(f"it cannot be opened: {exc.strerror}")


def _size(found: FileStat | StorageError) -> int:
    if isinstance(found, NoSuchFileError):
        return -1
    if isinstance(found, StorageError):
        raise found
    return found.num_bytes


def _encoded(content: bytes | StorageError) -> NDArray[np.uint8] | UnreadableFileError:
    if isinstance(content, NoSuchFileError):
        return UnreadableFileError(_MISSING)
    if isinstance(content, FileTooLargeError):
        return UnreadableFileError(content.reason)
    if isinstance(content, StorageError):
        raise content
    return as_encoded(content)
