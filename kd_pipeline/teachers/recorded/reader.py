"""Reads rows of a recording from its parts."""

import errno
import os
from collections import OrderedDict
from itertools import pairwise
from typing import Any, BinaryIO
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.recorded.folder import RecordingFolder
from kd_pipeline.teachers.recorded.manifest import RecordingManifest
from kd_pipeline.teachers.recorded.parts import Part, Parts, column_offsets

__all__ = ["RecordingReader"]

_MAX_OPEN = 16
"""Parts that stay open."""
_AHEAD = 2
"""Parts that are announced to the folder before they are needed."""


class RecordingReader:
    """Reads rows of a recording's parts, of which the last used ones stay open.

    The rows of a batch are contiguous, so a column takes one `pread`, or two where a part ends. With a memory map, a
    file that is cut off while it is used would kill the process without a message.
    """

    def __init__(self, folder: RecordingFolder, manifest: RecordingManifest, parts: Parts) -> None:
        self.folder, self.manifest, self.parts = folder, manifest, parts
        self.columns = manifest.columns
        self._files: OrderedDict[Part, BinaryIO] = OrderedDict()
        self._offsets = {
            num_rows: column_offsets(manifest, num_rows)
            for num_rows in {manifest.part_stop(start) - start for start in (0, manifest.part_starts[-1])}
        }
        self._is_closed = False
        self._close = finalize(self, _close, self._files, folder)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self._is_closed = True
        self._close()

    def read(self, name: str, epoch: int, position: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows `[N, ...]` of a column at positions of an epoch.

        Args:
            name: of the column.
            epoch: number of the epoch, of which all parts are there.
            position: `[N]`, each from 0 to `num_rows` - 1.
            out: where to read them to; defaults to a new array.

        Raises:
            TeacherError: a part is missing or damaged, or was cut off meanwhile, or the disk fails.
        """
        column, part_rows = self.columns[name], self.manifest.part_rows
        rows = np.empty((len(position), *column.shape), column.dtype) if out is None else out
        is_new = (np.diff(position, prepend=-2) != 1) | (position % part_rows == 0)
        for first, end in pairwise([*np.flatnonzero(is_new).tolist(), len(position)]):
            start = int(position[first]) // part_rows * part_rows
            num_rows = self.manifest.part_stop(start) - start
            part, file = self._open(epoch, start, num_rows)
            offset = self._offsets[num_rows][name] + (int(position[first]) - start) * column.row_bytes
            try:
                _read_into(file, rows[first:end], offset)
            except OSError as exc:
                raise TeacherError(
                    f"the recording in {self.folder} is damaged: {self.folder}/{part.name} cannot be read: "
                    f"{exc.strerror}; copy or record it again"
                ) from exc
        return rows

    def _open(self, epoch: int, start: int, num_rows: int) -> tuple[Part, BinaryIO]:
        part = self.parts.find(epoch, start)
        if part is None:
            raise TeacherError(f"the recording in {self.folder} has no position {start} of epoch {epoch + 1}")
        file = self._files.get(part)
        if file is None:
            file = self._files[part] = self.folder.open_part(part, self.manifest.row_bytes * num_rows)
            while len(self._files) > _MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._expect(epoch, start)
        self._files.move_to_end(part)
        return part, file

    def _expect(self, epoch: int, start: int) -> None:
        """Announce the parts that a training needs next."""
        starts = self.manifest.part_starts
        following = [(epoch, each) for each in starts[starts.index(start) + 1 :][:_AHEAD]]
        following += [(epoch + 1, each) for each in starts[: _AHEAD - len(following)]]
        parts = [part for each in following if (part := self.parts.find(*each)) is not None]
        parts = [part for part in parts if part not in self._files]
        self.folder.expect(parts, self.manifest)


def _read_into(file: BinaryIO, rows: NDArray[Any], offset: int) -> None:
    """Fill `rows` with the bytes from `offset` on.

    Raises:
        OSError: the disk fails, or the file ends before.
    """
    left = rows.reshape(-1).view(np.uint8).data
    while left:
        num_read = os.preadv(file.fileno(), [left], offset)
        if not num_read:
            raise OSError(errno.EIO, "it was cut off while it was used")
        left, offset = left[num_read:], offset + num_read


def _close(files: OrderedDict[Part, BinaryIO], folder: RecordingFolder) -> None:
    for file in files.values():
        file.close()
    files.clear()
    folder.close()
