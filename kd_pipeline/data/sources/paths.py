"""What all sources of files share: a table of paths, read by position."""

import hashlib
import logging
import os
import stat
from array import array
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.sources.fingerprint import sampling_step, started_digest
from kd_pipeline.data.sources.labels import count_classes

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["FileSource", "Paths"]

_logger = logging.getLogger("kd_pipeline")

_MOST_SIZES = 2**18
"""Files of which a fingerprint looks at the size; the file system says some hundred thousand in a second."""


class Paths:
    """Paths below one root as a blob, its offsets and the root once: ten million need about half a gigabyte.

    Args:
        root: the folder.
        blob: paths that are known already, one behind the other; no more can be added to them.
        ends: `[N + 1]` int64, where each of them ends, after a 0.
    """

    def __init__(
        self, root: str, blob: bytearray | memoryview | None = None, ends: "array[int] | memoryview | None" = None
    ) -> None:
        self._root = os.fsencode(os.path.join(root, ""))
        self.blob: bytearray | memoryview = bytearray() if blob is None else blob
        """All paths, one behind the other."""
        self.ends: array[int] | memoryview = array("q", [0]) if ends is None else ends
        """Path n lies in `blob[ends[n] : ends[n + 1]]`."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    def extend(self, paths: Iterable[str]) -> int:
        """Add paths, relative to the root or absolute; return how many."""
        assert isinstance(self.blob, bytearray) and isinstance(self.ends, array)
        before = len(self)
        for path in paths:
            entry = os.fsencode(path)
            below = entry[len(self._root) :].lstrip(b"/") if entry.startswith(self._root) else b""
            self.blob += below or entry
            self.ends.append(len(self.blob))
        return len(self) - before

    def absolute(self, index: int) -> bytes:
        """The absolute path number `index`, in the file system's encoding."""
        start = self.ends[index]
        root = b"" if self.blob[start] == ord("/") else self._root
        return root + self.blob[start : self.ends[index + 1]]

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The absolute paths at `index` `[n]` as `[n, L]`, NUL-padded to the longest."""
        blob, ends = np.frombuffer(self.blob, dtype=np.uint8), np.frombuffer(self.ends, dtype=np.int64)
        start, length = ends[index], ends[index + 1] - ends[index]
        if (blob[start] == ord("/")).any():
            names = np.array([self.absolute(position) for position in index.tolist()], dtype=np.bytes_)
            return names.view(np.uint8).reshape(len(names), names.itemsize)
        column = np.arange(length.max(initial=0))
        below = blob[np.minimum(start[:, None] + column, len(blob) - 1)]
        rows = np.empty((len(index), len(self._root) + len(column)), dtype=np.uint8)
        rows[:, : len(self._root)] = np.frombuffer(self._root, dtype=np.uint8)
        rows[:, len(self._root) :] = below * (column < length[:, None])
        return rows

    def add_to(self, digest: "_Hash") -> None:
        """Feed all paths to `digest`, relative to the root where they lie below it."""
        digest.update(np.asarray(self.ends).astype("<i8", copy=False).data)
        digest.update(self.blob)


class FileSource:
    """A `Source` of files: what a folder and a list have in common once the paths are known."""

    stores: Literal["files", "pixels"] = "files"

    def __init__(
        self,
        paths: Paths,
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...] | None,
        reports: Iterable[str],
    ) -> None:
        self._paths = paths
        self.labels, self.classes, self.num_classes = labels, classes, count_classes(labels, classes)
        self.reports = tuple(reports)
        for report in self.reports:
            _logger.warning("%s", report)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Source.read`."""
        return self._paths.rows(indices)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return os.fsdecode(self._paths.absolute(index))

    @cached_property
    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = started_digest(self.labels, self.classes)
        step = -(-len(self) // _MOST_SIZES)
        known = [self._paths.absolute(index) for index in range(0, len(self), step)]
        sizes = np.fromiter(map(_size, known), dtype="<i8", count=len(known))
        for place in range(0, len(known), -(-sampling_step(step * int(sizes[sizes > 0].sum())) // step)):
            if sizes[place] >= 0:
                try:
                    with open(known[place], "rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                except OSError:
                    sizes[place] = -1
        digest.update(sizes.tobytes())
        self._paths.add_to(digest)
        return digest.hexdigest()


def _size(path: bytes) -> int:
    """Bytes of a regular file; -1 for everything else, which reading could block on."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
