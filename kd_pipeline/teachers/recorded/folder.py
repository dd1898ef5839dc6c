"""The folder of a recording: where its files are, how they are read and written, and what a killed process leaves."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from kd_pipeline._core.files import open_regular, read_regular
from kd_pipeline.errors import StateError, TeacherError
from kd_pipeline.teachers.recorded.manifest import MANIFEST, MAX_MANIFEST_BYTES, RecordingManifest
from kd_pipeline.teachers.recorded.parts import Part, Parts, Piece

__all__ = ["CARD", "MAX_SUMS_BYTES", "SUMS", "LocalFolder", "RecordingFolder", "file_digest"]

SUMS, CARD = "SHA256SUMS", "README.md"
"""Names of the list of parts and of the card, which joining writes."""
_WORKING = "working"
"""Folder of what is not final. Nobody reads it but processes that record."""
_ATTEMPTS = 100
"""To write a file whose folder others remove: each of them does so once, when it ends."""
MAX_SUMS_BYTES = 2**30


class RecordingFolder(Protocol):
    """A folder on a disk or behind a URL; `str` gives what the user wrote."""

    def load_manifest(self) -> RecordingManifest:
        """The manifest.

        Raises:
            TeacherError: there is no recording, or its manifest is damaged or from a different release.
        """
        ...

    def find_parts(self, manifest: RecordingManifest, *, listed: bool = True) -> Parts:
        """The parts that are there now or, behind a URL, those in its list, unless `listed` is false.

        Raises:
            TeacherError: the folder cannot be listed.
        """
        ...

    def open_part(self, part: Part, num_bytes: int) -> BinaryIO:
        """The file of a part of so many bytes.

        Raises:
            TeacherError: it is missing, too short or damaged.
        """
        ...

    def expect(self, parts: Sequence[Part], manifest: RecordingManifest) -> None:
        """Note that these parts will be opened soon, in this order."""
        ...

    def close(self) -> None:
        """Release what is open. A second call does nothing."""
        ...


class LocalFolder:
    """A folder on a local or mounted disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def load_manifest(self) -> RecordingManifest:
        """See `RecordingFolder`."""
        path = self.path / MANIFEST
        try:
            content = read_regular(path, max_bytes=MAX_MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise TeacherError(
                f"{self} holds no recording: there is no {path}; make one with kd-pipeline record"
            ) from None
        except OSError as exc:
            raise TeacherError(f"{path} cannot be read: {exc.strerror}; copy or record it again") from None
        return RecordingManifest.parse(content, path)

    def find_manifest(self) -> RecordingManifest | None:
        """The manifest; None if there is no recording.

        Raises:
            TeacherError: it is damaged or from a different release.
        """
        exists = os.path.exists(self.path / MANIFEST)  # Path.exists raises for a name that is too long
        return self.load_manifest() if exists else None

    def find_parts(self, manifest: RecordingManifest, *, listed: bool = True) -> Parts:
        """See `RecordingFolder`."""
        names: list[str] = []
        try:
            for folder in _names(self.path):
                if folder.startswith("epoch-"):
                    names += [f"{folder}/{name}" for name in _names(self.path / folder)]
        except OSError as exc:
            raise TeacherError(f"{self} cannot be listed: {exc.strerror}; solve that, or copy it again") from None
        return Parts(manifest, names)

    def open_part(self, part: Part, num_bytes: int) -> BinaryIO:
        """See `RecordingFolder`."""
        path = self.path / part.name
        try:
            file = open_regular(path)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None
        except OSError as exc:
            raise self._damaged(path, f"cannot be read: {exc.strerror}") from exc
        if (size := os.fstat(file.fileno()).st_size) != num_bytes:
            file.close()
            raise self._damaged(path, f"has {size} bytes and not {num_bytes}")
        return file

    def verify(self, part: Part, num_bytes: int) -> None:
        """Compare the sha256 of a part with its name.

        Raises:
            TeacherError: they differ.
        """
        with self.open_part(part, num_bytes) as file:
            found = file_digest(file)
        if found != part.digest:
            raise TeacherError(
                f"the recording in {self} is damaged: {self.path / part.name} has the sha256 {found} instead of "
                f"{part.digest}; copy this file again, or delete it and run the command that recorded it"
            )

    def find(self, name: str, max_bytes: int) -> bytes | None:
        """The content of a small file; None if there is none, or it is no file."""
        try:
            return read_regular(self.path / name, max_bytes=max_bytes)
        except OSError:
            return None

    def expect(self, parts: Sequence[Part], manifest: RecordingManifest) -> None:
        """Nothing: the system reads ahead."""

    def close(self) -> None:
        """Nothing: whoever opened a file closes it."""

    def create(self, manifest: RecordingManifest) -> RecordingManifest:
        """Write the manifest, unless another process has written one; return the one that is there.

        Raises:
            StateError: it cannot be written, or there are parts of a recording that has lost its manifest.
            TeacherError: the one that is there is damaged.
        """

        def link(temporary: Path, path: Path) -> None:
            try:
                os.link(temporary, path)  # which replaces nothing, where a rename would
            except FileExistsError:
                if not os.path.exists(path):  # a link to nothing
                    os.replace(temporary, path)
            except OSError:  # a file system without hard links
                os.replace(temporary, path)

        has_parts = os.path.isdir(self.path) and (len(self.find_parts(manifest)) or self.find_pieces())
        if has_parts and not os.path.exists(self.path / MANIFEST):
            raise StateError(
                f"{self} has parts of a recording and no {MANIFEST}, so nobody knows what they are of; copy it there, "
                "delete the folder, or choose a different one with --out"
            )
        self._write(MANIFEST, manifest.content, link)
        return self.load_manifest()

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a whole file; readers see the old content or the new, never a part.

        Raises:
            StateError: it cannot be written.
        """
        self._write(name, content, os.replace)

    def find_pieces(self) -> list[Piece]:
        """The pieces that are there now, in order."""
        with suppress(OSError):
            return sorted(filter(None, map(Piece.parse, _names(self.path / _WORKING))))
        return []

    def write_piece(self, epoch: int, start: int, stop: int, content: bytes) -> None:
        """Write rows of a part that is not complete.

        Raises:
            StateError: they cannot be written.
        """
        piece = Piece(epoch, start, stop, sha256(content).hexdigest())
        self.write(f"{_WORKING}/{piece.name}", content)

    def read_piece(self, piece: Piece, num_bytes: int) -> bytes | None:
        """The content of a piece; None if it is gone or damaged, and its rows are to be recorded again."""
        try:
            content = read_regular(self.path / _WORKING / piece.name, max_bytes=num_bytes)
        except OSError:
            return None
        return content if len(content) == num_bytes and sha256(content).hexdigest() == piece.digest else None

    def remove_pieces(self, epoch: int, start: int, stop: int) -> None:
        """Remove the pieces of a part that is complete, whoever wrote them."""
        for piece in self.find_pieces():
            if piece.epoch == epoch and start <= piece.start < stop:
                with suppress(OSError):
                    (self.path / _WORKING / piece.name).unlink()

    def remove_working(self) -> None:
        """Remove all that is not final, once everything is recorded."""
        folder = self.path / _WORKING
        with suppress(OSError):
            if not folder.is_symlink():
                for name in _names(folder):
                    (folder / name).unlink()
                folder.rmdir()

    def _write(self, name: str, content: bytes | memoryview, put: Callable[[Path, Path], object]) -> None:
        """Write a temporary file, and `put` it at its path once its bytes are on the disk.

        It is in the working folder, where it is removed with the rest if the process is killed meanwhile.
        """
        path = self.path / name
        for attempt in range(_ATTEMPTS):
            temporary = self.path / _WORKING / f"{uuid4().hex}.tmp"
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "xb") as file:  # x follows no link
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                path.parent.mkdir(exist_ok=True)
                put(temporary, path)
                return
            except OSError as exc:
                # A process that finds everything recorded removes the working folder, perhaps at this moment.
                if attempt == _ATTEMPTS - 1 or not isinstance(exc, FileNotFoundError):
                    raise _unwritable(path, exc) from exc
            finally:
                with suppress(OSError):
                    temporary.unlink()

    def _damaged(self, path: Path, state: str) -> TeacherError:
        return TeacherError(f"the recording in {self} is damaged: {path} {state}; copy or record it again")


def file_digest(file: BinaryIO) -> str:
    """sha256 of what is left of a file, in hexadecimal."""
    digest = sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _unwritable(path: Path, exc: OSError) -> StateError:
    return StateError(f"{path} cannot be written: {exc.strerror}; solve that and run the same command again to resume")


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]
