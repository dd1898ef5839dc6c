"""The base of all sources of files: a compact table of paths, read by position."""

import logging
import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.fingerprint import content_digest, label_digest, sampling_step
from kd_pipeline.data.sources.labels import count_classes, shown_samples

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["FileSource", "PathTable", "fingerprint_of_files"]

_logger = logging.getLogger("kd_pipeline")

_MAX_CONTENT = 64 * 2**20
"""Bytes of one file that go into a fingerprint; reading a file of a terabyte takes half an hour."""
_MAX_SIZES = 2**18
"""Files whose size goes into a fingerprint; a file system looks up some hundred thousand a second."""


class PathTable:
    """Paths below one root, stored as one blob, offsets into it and the root: ten million take about half a gigabyte.

    Args:
        root: the folder.
        blob: existing paths, concatenated. No paths can be added to a table that is given them.
        ends: `[N + 1]` int64, 0 and the end of each path in `blob`.
    """

    def __init__(
        self, root: str, blob: bytearray | memoryview | None = None, ends: "array[int] | memoryview | None" = None
    ) -> None:
        self._root = os.fsencode(os.path.join(root, ""))
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
        if b"\0/" in b"\0" + b"\0".join(paths):
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

    def absolute(self, index: int) -> bytes:
        """The absolute path at `index`, in the file system's encoding."""
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
        """Update `digest` with all paths, relative to the root where they are below it."""
        digest.update(np.asarray(self.ends).astype("<i8", copy=False).data)
        digest.update(self.blob)


class FileSource:
    """A `Source` of files; subclasses find the paths and labels.

    Args:
        paths: N paths.
        labels: `[N]` int64, or None.
        classes: class names in label order, or None.
        warnings: what looks suspicious; logged here.
    """

    stores: Literal["files", "pixels"] = "files"

    def __init__(
        self,
        paths: PathTable,
        labels: NDArray[np.int64] | None = None,
        classes: tuple[str, ...] | None = None,
        warnings: Iterable[str] = (),
    ) -> None:
        self._paths = paths
        if labels is not None:  # as they are where they come from a cache
            labels = labels.view()
            labels.setflags(write=False)
        self.labels, self.classes, self.num_classes = labels, classes, count_classes(labels, classes)
        self.warnings = tuple(map(printable, warnings))
        for warning in self.warnings:
            _logger.warning("%s", warning)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Absolute paths at `indices` `[n]`, `[n, L]`, NUL-padded."""
        return self._paths.rows(indices)

    def name(self, index: int) -> str:
        """The absolute path."""
        return os.fsdecode(self._paths.absolute(index))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, class names, all paths, and evenly sampled sizes and contents; see `Source.fingerprint`."""
        return fingerprint_of_files(self._paths, self.labels, self.classes)

    def __repr__(self) -> str:
        shown = shown_samples(len(self), "files", self.labels, self.num_classes)
        return f"{type(self).__name__}({shown})"


def fingerprint_of_files(table: PathTable, labels: NDArray[np.int64] | None, classes: tuple[str, ...] | None) -> str:
    """The `Source.fingerprint` of files."""
    digest = label_digest(labels, classes)
    step = -(-len(table) // _MAX_SIZES)
    paths = [table.absolute(index) for index in range(0, len(table), step)]
    sizes = np.fromiter(map(_size, paths), dtype="<i8", count=len(paths))
    content_step = sampling_step(step * int(sizes[sizes > 0].sum()))
    for row in range(0, len(paths), -(-content_step // step)):
        if sizes[row] >= 0:
            try:
                with open_regular(os.fsdecode(paths[row])) as file:
                    digest.update(content_digest(file, _MAX_CONTENT).digest())
            except OSError:
                sizes[row] = -1
    digest.update(sizes.tobytes())
    table.update(digest)
    return digest.hexdigest()


def _size(path: bytes) -> int:
    """Bytes of a regular file; -1 for anything else, because reading a pipe could block."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
