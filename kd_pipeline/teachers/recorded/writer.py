"""Writes the parts of a recording from rows that come in order, and resumes what ended processes have left."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.errors import StateError
from kd_pipeline.teachers.recorded.location import AnyFolder
from kd_pipeline.teachers.recorded.manifest import SAMPLE, RecordingManifest
from kd_pipeline.teachers.recorded.parts import Part, PartRows, Piece
from kd_pipeline.teachers.recorded.reader import RecordingReader

__all__ = ["RecordingWriter"]


class RecordingWriter:
    """Writes the rows of one part after the other.

    A part is written at once when its last row is there. What is there of it before, `commit` keeps in a piece of its
    own. Every file is complete from the moment it has its name, so a process may be killed at any time, several may
    write the same part, and nobody waits for anybody.
    """

    def __init__(self, folder: AnyFolder, manifest: RecordingManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.parts = folder.find_parts(manifest, listed=False)
        """Those that were there at the start, and those that were written."""
        self._pieces = self._usable_pieces()
        self._rows: PartRows | None = None
        self._epoch = self._committed = self._position = 0
        """Of the open part: its epoch, and the positions up to which it was committed and written."""

    def missing_spans(self, parts: Iterable[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
        """What is not recorded yet of these parts, each given by its epoch and first position, by epoch."""
        spans: dict[int, list[tuple[int, int]]] = {}
        for epoch, start in parts:
            if self.parts.find(epoch, start) is None:
                pieces = self._pieces.get((epoch, start), ())
                first = pieces[-1].stop if pieces else start
                spans.setdefault(epoch, []).append((first, self.manifest.part_stop(start)))
        return spans

    def random_rows(self, batch_size: int) -> tuple[int, int, dict[str, NDArray[Any]]] | None:
        """Epoch, first position, and rows `[n, ...]` of every column of a batch that was recorded; None if none was.

        Raises:
            TeacherError: a part is damaged.
        """
        found = [(part.epoch, part.start, self.manifest.part_stop(part.start)) for part in self.parts.in_order]
        pieces = [piece for chain in self._pieces.values() for piece in chain]
        found += [(piece.epoch, piece.start, piece.stop) for piece in pieces]
        if not found:
            return None
        generator = np.random.default_rng()  # unseeded: every start checks different rows
        number = int(generator.integers(len(found)))
        epoch, start, stop = found[number]
        first = start + int(generator.integers(-(-(stop - start) // batch_size))) * batch_size
        position = np.arange(first, min(first + batch_size, stop))
        if number < len(self.parts):
            reader = RecordingReader(self.folder, self.manifest, self.parts)
            rows = {name: reader.read(name, epoch, position) for name in reader.columns}
            reader.close()
            return epoch, first, rows
        content = self._read(piece := pieces[number - len(self.parts)])
        if content is None:
            return None  # another process has completed the part
        part = PartRows(self.manifest, start - start % self.manifest.part_rows)
        part.put_piece(piece, content)
        return epoch, first, part.rows(position)

    def write(self, epoch: int, position: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Write rows `[n, ...]` of every column, from `position` of `epoch` on: the next ones of a part.

        Raises:
            StateError: the disk is full or fails.
        """
        if self._rows is None:
            self._open(epoch, position)
        assert self._rows is not None and (epoch, position) == (self._epoch, self._position)
        self._rows.put(position, rows)
        self._position += len(rows[SAMPLE])
        if self._position == self._rows.stop:
            self._finish(self._rows)

    def commit(self) -> None:
        """Keep what was written of an open part.

        Raises:
            StateError: the disk is full or fails.
        """
        if self._rows is not None and self._committed < self._position < self._rows.stop:
            content = self._rows.piece(self._committed, self._position)
            self.folder.write_piece(self._epoch, self._committed, self._position, content)
            self._committed = self._position

    def _open(self, epoch: int, position: int) -> None:
        start = position - position % self.manifest.part_rows
        rows = PartRows(self.manifest, start)
        for piece in self._pieces.pop((epoch, start), ()):
            content = self._read(piece)
            if content is None:
                raise StateError(
                    f"{self.folder}: another process has recorded the same positions meanwhile, and removed what was "
                    "to be resumed; run the same command again, and give each process a part of its own with --part"
                )
            rows.put_piece(piece, content)
        self._rows, self._epoch, self._committed, self._position = rows, epoch, position, position

    def _finish(self, rows: PartRows) -> None:
        part = Part(self._epoch, rows.start, rows.digest)
        self.folder.write(part.name, rows.content)
        self.folder.remove_pieces(self._epoch, rows.start, rows.stop)
        self.parts.add(part)
        self._rows = None

    def _usable_pieces(self) -> dict[tuple[int, int], Sequence[Piece]]:
        """Pieces without gaps from the start of each part on, by epoch and first position of the part."""
        found: dict[tuple[int, int], dict[int, list[Piece]]] = {}
        for piece in self.folder.find_pieces():
            start = piece.start - piece.start % self.manifest.part_rows
            if piece.start < piece.stop < self.manifest.part_stop(start) and not self.parts.find(piece.epoch, start):
                found.setdefault((piece.epoch, start), {}).setdefault(piece.start, []).append(piece)
        return {key: chain for key, pieces in found.items() if (chain := self._chain(key[1], pieces))}

    def _chain(self, position: int, pieces: Mapping[int, Sequence[Piece]]) -> list[Piece]:
        chain: list[Piece] = []
        while True:
            # Two processes may have committed the same rows; the longest piece is taken first.
            longest = sorted(pieces.get(position, ()), key=lambda piece: -piece.stop)
            piece = next((each for each in longest if self._read(each) is not None), None)
            if piece is None:
                return chain
            chain.append(piece)
            position = piece.stop

    def _read(self, piece: Piece) -> bytes | None:
        return self.folder.read_piece(piece, self.manifest.row_bytes * (piece.stop - piece.start))
