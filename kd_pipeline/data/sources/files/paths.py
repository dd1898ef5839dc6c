"""The base of all sources of files: a compact table of paths, read by position."""

import logging
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.fingerprint import content_digest, label_digest, pieces, sampling_step
from kd_pipeline.data.sources.labels import count_classes, shown_samples
from kd_pipeline.data.sources.masks.masks import Masks, fingerprint_with
from kd_pipeline.errors import shown
from kd_pipeline.storage.base import scheme_of
from kd_pipeline.storage.location import join, relative_to

if TYPE_CHECKING:
    from hashlib import _Hash

    from kd_pipeline.data.sources.encoded import Encoded
    from kd_pipeline.data.sources.files.remote_files import RemoteFiles

__all__ = ["FileSource", "FilesOnDisk", "PathTable", "fingerprint_of_files"]

_logger = logging.getLogger("kd_pipeline")

_MAX_CONTENT = 64 * 2**20
"""Bytes of one file that go into a fingerprint; reading a file of a terabyte takes half an hour."""


class PathTable:
    """Paths below one root, stored as one blob, offsets into it and the root: ten million take about half a gigabyte.

    The root, and paths, may be URLs.

    Args:
        root: the folder.
        blob: existing paths, concatenated. No paths can be added to a table that is given them.
        ends: `[N + 1]` int64, 0 and the end of each path in `blob`.
        schemes: those of the paths in `blob`.
    """

    def __init__(
        self,
        root: str,
        blob: bytearray | memoryview | None = None,
        ends: "array[int] | memoryview | None" = None,
        schemes: Iterable[str] = (),
    ) -> None:
        self.root = root
        self._root = os.fsencode(os.path.join(shown(root), ""))
        self._is_local = scheme_of(root) is None
        self.schemes = set(schemes)
        """Those of paths that are URLs."""
        self.has_credentials = False
        """Whether a path that was added may hold some."""
        self.blob: bytearray | memoryview = bytearray() if blob is None else blob
        self.ends: array[int] | memoryview = array("q", [0]) if ends is None else ends
        """Path n is `blob[ends[n] : ends[n + 1]]`, relative to the root if it is below it."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    def extend(self, paths: Iterable[str]) -> int:
        """Add paths, absolute or relative to the root; return how many."""
        return self.extend_encoded(list(map(os.fsencode, paths)))

    def extend_encoded(self, paths: Sequence[bytes]) -> int:
        """Add paths in the file system's encoding, as `extend`."""
        assert isinstance(self.blob, bytearray) and isinstance(self.ends, array)
        joined = b"\0" + b"\0".join(paths)
        if b"://" in joined:
            paths = [self._add_url(path) if b"://" in path else path for path in paths]
        if b"\0/" in joined:
            paths = [self._relative(path) if path.startswith(b"/") else path for path in paths]
        ends = np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)))
        self.ends.frombytes((ends + len(self.blob)).tobytes())
        self.blob += b"".join(paths)
        return len(paths)

    def extend_folder(self, folder: str, names: bytes) -> int:
        """Add the files in a folder, an absolute path, given their encoded names with NUL between them; as `extend`."""
        above = os.fsencode(os.path.join(folder, ""))
        prefix = above.removeprefix(self._root)
        return self.extend_encoded([prefix + name for name in names.split(b"\0")])

    def _relative(self, path: bytes) -> bytes:
        """An absolute path, relative to the root if it is below it."""
        relative = path[len(self._root) :].lstrip(b"/") if path.startswith(self._root) else b""
        return relative or path

    def _add_url(self, path: bytes) -> bytes:
        """A path that may be a URL, relative to the root if it is below it."""
        url = os.fsdecode(path)
        scheme = scheme_of(url)
        if scheme is None:
            return path
        relative = None if self._is_local else relative_to(self.root, url)
        if relative is None:
            self.schemes.add(scheme)
            self.has_credentials |= shown(url) != url
        return path if relative is None else os.fsencode(relative)

    def entry(self, index: int) -> str:
        """The path at `index`, relative to the root if it is below it."""
        return os.fsdecode(bytes(self.blob[self.ends[index] : self.ends[index + 1]]))

    def location(self, index: int) -> str:
        """The absolute path or the URL at `index`."""
        return join(self.root, self.entry(index))

    def absolute(self, index: int) -> bytes:
        """The absolute path at `index` in the file system's encoding, where neither the root nor the path is a URL."""
        start = self.ends[index]
        root = b"" if self.blob[start] == ord("/") else self._root
        return root + self.blob[start : self.ends[index + 1]]

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The absolute paths at `indices` `[n]` as `[n, L]`, NUL-padded to the longest."""
        blob, ends = np.frombuffer(self.blob, dtype=np.uint8), np.frombuffer(self.ends, dtype=np.int64)
        start, length = ends[indices], ends[indices + 1] - ends[indices]
        if (blob[start] == ord("/")).any():
            names = np.array([self.absolute(index) for index in indices.tolist()], dtype=np.bytes_)
            return names.view(np.uint8).reshape(len(names), names.itemsize)
        column = np.arange(length.max(initial=0))
        relative = blob[np.minimum(start[:, None] + column, len(blob) - 1)]
        rows = np.empty((len(indices), len(self._root) + len(column)), dtype=np.uint8)
        rows[:, : len(self._root)] = np.frombuffer(self._root, dtype=np.uint8)
        rows[:, len(self._root) :] = relative * (column < length[:, None])
        return rows

    def update(self, digest: "_Hash") -> None:
        """Update `digest` with all paths, relative to the root where they are below it, and without credentials."""
        ends, blob = np.frombuffer(self.ends, dtype=np.int64), self.blob
        if self.schemes:
            entries = [os.fsencode(shown(self.entry(index))) for index in range(len(self))]
            ends, blob = np.cumsum([0, *map(len, entries)]), bytearray().join(entries)
        for piece in pieces(ends):
            digest.update(piece.astype("<i8", copy=False).data)
        for piece in pieces(np.frombuffer(blob, dtype=np.uint8)):
            digest.update(piece.data)


class FileSource:
    """A `Source` of files; subclasses find the paths and labels.

    Args:
        paths: N paths.
        labels: `[N]` int64, or None.
        classes: class names in label order, or None.
        warnings: what looks suspicious; logged here.
        remote: reads the files where some are behind URLs, as bytes.
        masks: those of the N files, if they have any.
    """

    def __init__(
        self,
        paths: PathTable,
        labels: NDArray[np.int64] | None = None,
        classes: tuple[str, ...] | None = None,
        warnings: Iterable[str] = (),
        remote: "RemoteFiles | None" = None,
        masks: Masks | None = None,
    ) -> None:
        self._paths, self._remote, self.masks = paths, remote, masks
        self.stores: Literal["files", "bytes", "pixels"] = "files" if remote is None else "bytes"
        if labels is not None:  # as they are where they come from a cache
            labels = labels.view()
            labels.setflags(write=False)
        self.labels, self.classes = labels, classes
        self.num_classes = count_classes(labels, classes) if masks is None else masks.num_classes
        self.warnings = tuple(map(printable, warnings))
        for warning in self.warnings:
            _logger.warning("%s", warning)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: NDArray[np.int64]) -> "NDArray[np.uint8] | Encoded":
        """Absolute paths at `indices` `[n]`, `[n, L]`, NUL-padded; or what is in the files, if some are behind URLs.

        Raises:
            StorageError: a store did not give a file.
        """
        return self._paths.rows(indices) if self._remote is None else self._remote.read(indices)

    def name(self, index: int) -> str:
        """The absolute path, or the URL without credentials."""
        return shown(self._paths.location(index))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, class names, all paths, and evenly sampled sizes and contents; see `Source.fingerprint`."""
        own = fingerprint_of_files(self._paths, self.labels, self.classes, self._remote)
        return fingerprint_with(own, self.masks)

    def __repr__(self) -> str:
        samples = shown_samples("files", self)
        return f"{type(self).__name__}({samples})"


class FilesOnDisk:
    """What a fingerprint needs to know about the files of a table; the same of all files that are local."""

    max_sizes = 2**18
    """Files whose size goes into a fingerprint; a file system looks up some hundred thousand a second."""

    def __init__(self, paths: PathTable) -> None:
        self._paths = paths

    def sizes(self, index: Sequence[int]) -> NDArray[np.int64]:
        """Bytes of the files at `index` `[n]`; -1 for what is no regular file, because reading a pipe could block."""
        return np.fromiter((_size(self._paths.absolute(each)) for each in index), "<i8", len(index))

    def digests(self, index: Sequence[int], max_bytes: int) -> Iterator[bytes | None]:
        """SHA-256 of the first `max_bytes` of the files at `index`; None for what cannot be read."""
        for each in index:
            try:
                with open_regular(os.fsdecode(self._paths.absolute(each))) as file:
                    yield content_digest(file, max_bytes).digest()
            except OSError:
                yield None


def fingerprint_of_files(
    table: PathTable,
    labels: NDArray[np.int64] | None,
    classes: tuple[str, ...] | None,
    remote: "RemoteFiles | None" = None,
) -> str:
    """The `Source.fingerprint` of files; `remote` knows those that are behind URLs."""
    files = FilesOnDisk(table) if remote is None else remote
    digest = label_digest(labels, classes)
    step = -(-len(table) // files.max_sizes)
    index = range(0, len(table), step)
    sizes = files.sizes(index)
    content_step = sampling_step(step * int(sizes[sizes > 0].sum()))
    rows = [row for row in range(0, len(index), -(-content_step // step)) if sizes[row] >= 0]
    contents = files.digests([index[row] for row in rows], _MAX_CONTENT)
    for row, content in zip(rows, contents, strict=True):
        if content is None:
            sizes[row] = -1
        else:
            digest.update(content)
    digest.update(sizes.astype("<i8", copy=False).tobytes())
    table.update(digest)
    return digest.hexdigest()


def _size(path: bytes) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
