"""The parts of a recording: immutable files, each with the rows of some positions of one epoch.

A part holds one column after the other, in the manifest's order, without a header. Its name has the epoch, the first
position and the sha256 of its content, so a folder's list of names says what has been recorded, whoever recorded it.
Which positions a part has depends on the manifest alone.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.recorded.manifest import Column, RecordingManifest

__all__ = ["Part", "PartRows", "Parts", "Piece", "column_offsets"]

_PART = re.compile(r"epoch-(\d{4,9})/(\d{9,13})-([0-9a-f]{64})\.bin")
_PIECE = re.compile(r"(\d{4,9})-(\d{9,13})-(\d{9,13})-([0-9a-f]{64})\.piece")
_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A part by its name."""

    epoch: int
    """Counted from 0; names count from 1."""
    start: int
    """Its first position."""
    digest: str
    """sha256 of its content, in hexadecimal."""

    @property
    def name(self) -> str:
        """Its file, from the recording's folder on."""
        return f"epoch-{self.epoch + 1:04}/{self.start:09}-{self.digest}.bin"

    @classmethod
    def parse(cls, name: str) -> "Part | None":
        """The part with this name; None if it is no name of one."""
        match = _PART.fullmatch(name)
        part = None if match is None else cls(int(match[1]) - 1, int(match[2]), match[3])
        return part if part is not None and part.name == name and part.epoch >= 0 else None


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """The first rows of a part that is not complete, or some that follow them: what an ended process leaves."""

    epoch: int
    start: int
    stop: int
    """The position after its last."""
    digest: str

    @property
    def name(self) -> str:
        """Its file, in the folder of working files."""
        return f"{self.epoch + 1:04}-{self.start:09}-{self.stop:09}-{self.digest}.piece"

    @classmethod
    def parse(cls, name: str) -> "Piece | None":
        """The piece with this name; None if it is no name of one."""
        match = _PIECE.fullmatch(name)
        return None if match is None else cls(int(match[1]) - 1, int(match[2]), int(match[3]), match[4])


class Parts:
    """The parts that a recording has."""

    def __init__(self, manifest: RecordingManifest, names: Iterable[str]) -> None:
        """Of the files called `names`, of which others than parts are left out.

        Two computers that round differently may have recorded the same part twice; then the first by name counts.
        """
        self._manifest = manifest
        found = sorted(filter(None, map(Part.parse, names)), reverse=True)
        self._parts = {(part.epoch, part.start): part for part in found if part.start in manifest.part_starts}

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, part: Part) -> None:
        """Count one that was written."""
        self._parts[part.epoch, part.start] = part

    def find(self, epoch: int, start: int) -> Part | None:
        """The part that starts at a position of an epoch."""
        return self._parts.get((epoch, start))

    @property
    def in_order(self) -> list[Part]:
        """All of them, by epoch and position."""
        return sorted(self._parts.values())

    @property
    def num_epochs(self) -> int:
        """Complete epochs, up to the first one that is not."""
        epoch = 0
        while all((epoch, start) in self._parts for start in self._manifest.part_starts):
            epoch += 1
        return epoch

    def missing(self, epochs: int) -> list[tuple[int, int]]:
        """Epoch and first position of each part of the first `epochs` epochs that is missing."""
        starts = self._manifest.part_starts
        return [(epoch, start) for epoch in range(epochs) for start in starts if (epoch, start) not in self._parts]

    @property
    def sums(self) -> bytes:
        """The list of all parts as `sha256sum` writes it."""
        return "".join(f"{part.digest}  {part.name}\n" for part in self.in_order).encode()

    @classmethod
    def of_sums(cls, manifest: RecordingManifest, sums: bytes) -> "Parts":
        """The parts in such a list.

        Raises:
            ValueError: a line is not of one.
        """
        names = []
        for number, line in enumerate(sums.decode("ascii").splitlines(), start=1):
            match = _SUM.fullmatch(line)
            if match is None or f"-{match[1]}.bin" not in match[2] or Part.parse(match[2]) is None:
                raise ValueError(f"line {number} is {line!r:.100}, not a sha256 with the name of a part")
            names.append(match[2])
        return cls(manifest, names)


class PartRows:
    """The rows of one part, in memory."""

    def __init__(self, manifest: RecordingManifest, start: int) -> None:
        self.start, self.stop = start, manifest.part_stop(start)
        num_rows = self.stop - start
        self._content = np.empty(manifest.row_bytes * num_rows, np.uint8)
        self._columns = _views(self._content, manifest.columns, num_rows)

    def put(self, position: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Rows `[n, ...]` of every column, from `position` on."""
        for name, column in self._columns.items():
            first = position - self.start
            column[first : first + len(rows[name])] = rows[name]

    def put_piece(self, piece: Piece, content: bytes) -> None:
        """The rows of a piece of this part."""
        columns = {name: Column(column.dtype, column.shape[1:]) for name, column in self._columns.items()}
        self.put(piece.start, _views(np.frombuffer(content, np.uint8), columns, piece.stop - piece.start))

    def rows(self, position: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Rows `[n, ...]` of every column."""
        return {name: column[position - self.start] for name, column in self._columns.items()}

    def piece(self, start: int, stop: int) -> bytes:
        """The content of a piece of the rows at positions `start` to `stop` - 1."""
        rows = slice(start - self.start, stop - self.start)
        return b"".join(column[rows].tobytes() for column in self._columns.values())

    @property
    def content(self) -> memoryview:
        """Of the whole part."""
        return self._content.data

    @property
    def digest(self) -> str:
        """sha256 of the content, in hexadecimal."""
        return hashlib.sha256(self._content.data).hexdigest()


def column_offsets(manifest: RecordingManifest, num_rows: int) -> dict[str, int]:
    """Where each column starts in a part of so many rows, in bytes."""
    offsets, offset = {}, 0
    for name, column in manifest.columns.items():
        offsets[name] = offset
        offset += column.row_bytes * num_rows
    return offsets


def _views(content: NDArray[np.uint8], columns: Mapping[str, Column], num_rows: int) -> dict[str, NDArray[Any]]:
    """The columns `[num_rows, ...]` of a part or piece, as views of its bytes."""
    views, offset = {}, 0
    for name, column in columns.items():
        end = offset + column.row_bytes * num_rows
        views[name] = content[offset:end].view(column.dtype).reshape(num_rows, *column.shape)
        offset = end
    if offset != len(content):
        raise TeacherError(f"a part of a recording has {len(content)} bytes and not {offset}")
    return views
