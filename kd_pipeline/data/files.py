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

from kd_pipeline.data.fingerprint import sampling_step, started_digest
from kd_pipeline.data.labels import count_classes

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["FileSource", "Paths"]

_logger = logging.getLogger("kd_pipeline")


class Paths:
    """Paths below one root as a blob, its offsets and the root once: ten million need about half a gigabyte."""

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(os.path.join(root, ""))
        self._blob, self._ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def extend(self, paths: Iterable[str]) -> int:
        """Add paths, relative to the root or absolute; return how many."""
        before = len(self)
        for path in paths:
            entry = os.fsencode(path)
            below = entry[len(self._root) :].lstrip(b"/") if entry.startswith(self._root) else b""
            self._blob += below or entry
            self._ends.append(len(self._blob))
        return len(self) - before

    def absolute(self, index: int) -> bytes:
        """The absolute path number `index`, in the file system's encoding."""
        start = self._ends[index]
        root = b"" if self._blob[start] == ord("/") else self._root
        return root + self._blob[start : self._ends[index + 1]]

    def add_to(self, digest: "_Hash") -> None:
        """Feed all paths to `digest`, relative to the root where they lie below it."""
        digest.update(np.array(self._ends, dtype="<i8").tobytes())
        digest.update(self._blob)


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
        rows = np.array([self._paths.absolute(index) for index in indices.tolist()], dtype=np.bytes_)
        return rows.view(np.uint8).reshape(len(rows), rows.itemsize)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return os.fsdecode(self._paths.absolute(index))

    @cached_property
    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = started_digest(self.labels, self.classes)
        sizes = np.fromiter((_size(self._paths.absolute(i)) for i in range(len(self))), dtype="<i8", count=len(self))
        for index in range(0, len(self), sampling_step(int(sizes[sizes > 0].sum()))):
            if sizes[index] >= 0:
                try:
                    with open(self._paths.absolute(index), "rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                except OSError:
                    sizes[index] = -1
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
