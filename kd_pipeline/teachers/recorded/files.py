"""The files of a recording: what a teacher answered at every place of every epoch, in a few large arrays.

Each array has a row for each place of each epoch, in that order, so that what one batch needs lies together, for any
batch size and any number of ranks. Beside the answers stand the sample that was shown there, plus one, and a checksum
of its pixels. The files are as long as all epochs from the start and empty (sparse) where nothing was written: a
sample of 0 says that this row is not there yet.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import StateError, TeacherError
from kd_pipeline.teachers.base import Teacher

__all__ = [
    "CHECKSUM",
    "MANIFEST",
    "SAMPLE",
    "Column",
    "Manifest",
    "RecordedDtype",
    "RecordingWriter",
    "TeacherFacts",
    "checksums",
    "decode",
    "encode",
    "make_files",
    "open_columns",
]

RecordedDtype = Literal["float32", "float16"]

SAMPLE, CHECKSUM = "sample", "checksum"
"""Columns beside those of the outputs, whose names have a dot."""
MANIFEST = "manifest.json"
"""The file that says what the others are."""
_MAX_INT16_CLASSES = 2**15
_CHUNK = 16
"""Images whose checksums a GPU computes at once: what that takes for the moment stays small."""


class TeacherFacts(Settings):
    """Which teacher has answered."""

    fingerprint: str
    backend: str
    precision: str
    classes: tuple[str, ...] | None

    @classmethod
    def of(cls, teacher: Teacher) -> "TeacherFacts":
        """Those of an open one."""
        return cls(
            fingerprint=teacher.fingerprint,
            backend=teacher.backend,
            precision=teacher.precision,
            classes=teacher.classes,
        )


@dataclass(frozen=True, slots=True)
class Column:
    """One of the arrays, `[epochs, num_rows, *shape]`."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Manifest(Settings):
    """What a recording is of, and what is in its files; `manifest.json`."""

    version: Literal[1] = 1
    teacher: TeacherFacts
    outputs: dict[str, tuple[int, ...]]
    """Shape of each output, without the batch."""
    top_k: int | None = Field(default=None, ge=1)
    """How many logits of an image are kept; all where None."""
    dtype: RecordedDtype = "float32"
    """Of the answers in the files."""
    stream: dict[str, Any]
    """Everything that the image at a place of an epoch depends on; see `KDDataLoader.stream_fingerprint`."""
    num_rows: int = Field(ge=1)
    """Places of an epoch."""
    epochs: int = Field(ge=1)
    """Epochs that the files have room for."""
    epochs_done: int = Field(default=0, ge=0)
    """Epochs of which every row is there."""

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of the recording in `folder`.

        Raises:
            TeacherError: there is no recording, or its manifest is damaged or of another release.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise TeacherError(f"{folder} holds no recording: there is no {path}; make one with kd-pipeline record")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, ValueError) as exc:
            reason = exc.errors()[0] if isinstance(exc, ValidationError) else exc
            why = f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}" if isinstance(reason, dict) else str(reason)
            raise TeacherError(
                f"{path} is damaged, or was written by another release ({why}); record the teacher again"
            ) from None

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")

    @property
    def columns(self) -> dict[str, Column]:
        """The arrays by name: sample and checksum, and for each output `<output>.values`.

        Of the logits' largest `top_k` there are also `logits.classes`, and `logits.rest`, the logarithm of the summed
        exponentials of the others.
        """
        largest = self.num_rows + 1
        found = {SAMPLE: Column("sample.bin", np.dtype("<i4" if largest < 2**31 else "<i8"), ())}
        found[CHECKSUM] = Column("checksum.bin", np.dtype("<u4"), ())
        values = np.dtype("<f4" if self.dtype == "float32" else "<f2")
        for name, shape in self.outputs.items():
            file = quote(name, safe="")
            if name != "logits" or self.top_k is None:
                found[f"{name}.values"] = Column(f"{file}.values.bin", values, shape)
                continue
            classes = np.dtype("<i2" if shape[0] <= _MAX_INT16_CLASSES else "<i4")
            found["logits.values"] = Column("logits.values.bin", values, (self.top_k,))
            found["logits.classes"] = Column("logits.classes.bin", classes, (self.top_k,))
            found["logits.rest"] = Column("logits.rest.bin", values, ())
        return found

    @property
    def row_bytes(self) -> int:
        """Bytes for one image of one epoch, in all files together."""
        return sum(column.row_bytes for column in self.columns.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together once every row is there."""
        return self.row_bytes * self.num_rows * self.epochs


class RecordingWriter:
    """Fills the files of a recording, row by row.

    A row counts once its sample is there, and that is written by `commit` alone, behind everything else of that row:
    in order for a process that is killed, and after `fsync` for a machine that loses power. Everything is written with
    `pwrite` instead of through a memory map, where a full disk would kill the process without a word.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files that `make_files` has made in `folder`.

        Raises:
            StateError: they cannot be opened.
        """
        self.folder, self.manifest = folder, Manifest.load(folder)
        self._columns = self.manifest.columns
        self._files: dict[str, int] = {}
        self._unmarked: list[tuple[int, int, NDArray[Any]]] = []
        try:
            for name, column in self._columns.items():
                self._files[name] = os.open(folder / column.file, os.O_RDWR)
        except OSError as exc:
            self.close()
            raise _cannot_write(folder, exc) from exc

    def marks(self, epoch: int) -> NDArray[np.bool_]:
        """`[num_rows]`, True for the rows of `epoch` that are there."""
        column = self._columns[SAMPLE]
        length = column.row_bytes * self.manifest.num_rows
        found = os.pread(self._files[SAMPLE], length, epoch * length)
        marks: NDArray[np.bool_] = np.frombuffer(found, column.dtype) != 0
        return marks

    def write(self, epoch: int, place: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Put rows `[n, ...]` of every column behind one another from `place` of `epoch` on; `commit` makes them count.

        Raises:
            StateError: the disk is full, or fails.
        """
        for name, values in rows.items():
            if name != SAMPLE:
                self._put(name, epoch, place, values)
        self._unmarked.append((epoch, place, rows[SAMPLE] + 1))

    def commit(self) -> None:
        """Let everything written so far count.

        Raises:
            StateError: the disk is full, or fails.
        """
        self._sync(name for name in self._files if name != SAMPLE)
        for epoch, place, samples in self._unmarked:
            self._put(SAMPLE, epoch, place, samples)
        self._unmarked.clear()
        self._sync([SAMPLE])

    def finish_epoch(self, epoch: int, *, save: bool) -> None:
        """Know that `epoch` and those before it are whole, and `save` that; of several processes one does.

        Raises:
            StateError: the disk is full, or fails.
        """
        self.manifest = self.manifest.model_copy(update={"epochs_done": epoch + 1})
        if save:
            try:
                self.manifest.save(self.folder)
            except OSError as exc:
                raise _cannot_write(self.folder / MANIFEST, exc) from exc

    def close(self) -> None:
        """Close the files; what was not committed does not count."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _put(self, name: str, epoch: int, place: int, rows: NDArray[Any]) -> None:
        column = self._columns[name]
        left = memoryview(np.ascontiguousarray(rows, dtype=column.dtype).tobytes())
        offset = (epoch * self.manifest.num_rows + place) * column.row_bytes
        try:
            while left:
                written = os.pwrite(self._files[name], left, offset)
                left, offset = left[written:], offset + written
        except OSError as exc:
            raise _cannot_write(self.folder / column.file, exc) from exc

    def _sync(self, names: Any) -> None:
        for name in names:
            try:
                os.fdatasync(self._files[name])
            except OSError as exc:
                raise _cannot_write(self.folder / self._columns[name].file, exc) from exc


def make_files(folder: Path, manifest: Manifest) -> None:
    """Make the files of a recording, or make those that are there longer, and write the manifest.

    Raises:
        StateError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a manifest, what lies there belongs to no recording.
        mode = "r+b" if (folder / MANIFEST).exists() else "w+b"
        for column in manifest.columns.values():
            with (folder / column.file).open(mode) as file:
                length = column.row_bytes * manifest.num_rows * manifest.epochs
                file.truncate(max(length, os.fstat(file.fileno()).st_size))
        manifest.save(folder)
    except OSError as exc:
        raise _cannot_write(folder, exc) from exc


def open_columns(folder: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The arrays of a recording, memory-mapped, `[epochs, num_rows, ...]` each.

    Raises:
        TeacherError: a file is not there or too short.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, column in manifest.columns.items():
        path = folder / column.file
        wanted = column.row_bytes * manifest.num_rows * manifest.epochs
        size = -1
        with suppress(OSError):
            size = path.stat().st_size
        if size < wanted:
            state = "is not there" if size < 0 else f"has {size} bytes and not {wanted}"
            raise TeacherError(f"the recording in {folder} is damaged: {path} {state}; copy or record it again")
        shape = (manifest.epochs, manifest.num_rows, *column.shape)
        found[name] = np.memmap(path, column.dtype, "r", shape=shape)
    return found


def encode(outputs: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Outputs `[N, ...]` float32 as columns of a recording, on the same device.

    Raises:
        TeacherError: a finite number is too large for float16.
    """
    columns = {f"{name}.values": output for name, output in outputs.items()}
    if manifest.top_k is not None:
        logits_NK = outputs["logits"]
        values_Nk, classes_Nk = logits_NK.topk(manifest.top_k)
        others_NK = logits_NK.scatter(1, classes_Nk, -torch.inf)
        columns |= {"logits.values": values_Nk, "logits.rest": others_NK.logsumexp(1), "logits.classes": classes_Nk}
    if manifest.dtype == "float32":
        return columns
    return {name: column if name == "logits.classes" else _half(name, column) for name, column in columns.items()}


def decode(columns: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Columns of a recording as outputs `[N, ...]` float32, on the same device.

    Where only the largest logits were kept, the other classes share the rest of the probability evenly, so that a
    softmax gives those that were kept the probabilities that they had.
    """
    outputs = {name: columns[f"{name}.values"].float() for name in manifest.outputs}
    if manifest.top_k is not None:
        num_classes = manifest.outputs["logits"][0]
        share_N1 = (columns["logits.rest"].float() - float(np.log(num_classes - manifest.top_k)))[:, None]
        logits_NK = share_N1.repeat(1, num_classes)
        outputs["logits"] = logits_NK.scatter_(1, columns["logits.classes"].long(), outputs["logits"])
    return outputs


def checksums(images: Tensor) -> NDArray[np.uint32]:
    """Of each of the images `[N, ...]`, float32 or float16: the sum of its pixels' bits, each times an odd number.

    Integers that wrap around, so that it is the same on every device, and one pixel that changes always changes it.
    It is computed where the images are, in less time than a digest by the book.
    """
    bits = images.flatten(1).view(torch.int32 if images.dtype == torch.float32 else torch.int16)
    factors = _factors(bits.shape[1])
    sums = _sums_on_cpu(bits, factors) if images.device.type == "cpu" else _sums_on_gpu(bits, factors)
    return np.asarray(sums, dtype=np.uint32)


def _sums_on_cpu(bits: Tensor, factors: NDArray[np.uint32]) -> list[int]:
    """In NumPy, which takes a third of the time that torch takes."""
    sums = []
    for row in bits.numpy():
        pixels = row.astype(np.int32, copy=False).view(np.uint32)
        # With the upper half of each number in its lower half too, sign and exponent move all of a product.
        products = pixels >> np.uint32(16)
        products ^= pixels
        products *= factors
        sums.append(int(products.sum(dtype=np.uint32)))
    return sums


def _sums_on_gpu(bits: Tensor, factors: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The same in torch, which knows signed numbers alone, for a few images at a time."""
    factors_P = torch.from_numpy(factors.view(np.int32)).to(bits.device)
    sums = []
    for start in range(0, len(bits), _CHUNK):
        pixels = bits[start : start + _CHUNK].to(torch.int32)
        products = (pixels ^ ((pixels >> 16) & 0xFFFF)) * factors_P
        sums.append(products.sum(1))  # in int64
    found: NDArray[np.uint32] = torch.cat(sums).cpu().numpy().astype(np.uint32)
    return found


@cache
def _factors(count: int) -> NDArray[np.uint32]:
    """Odd numbers, from a generator whose raw words NumPy promises never to change."""
    return np.random.Philox(key=0).random_raw(count).astype(np.uint32) | np.uint32(1)


def _cannot_write(path: Path, exc: OSError) -> StateError:
    return StateError(
        f"{path} cannot be written: {exc.strerror}; put that right and run the same command again, which goes on where "
        "this one stopped"
    )


def _half(name: str, column: Tensor) -> Tensor:
    halved = column.half()
    if bool((halved.isinf() & column.isfinite()).any()):
        raise TeacherError(
            f"{name} goes up to {float(column[column.isfinite()].abs().max()):.4g}, and float16 to 65504; record it "
            "with --dtype float32"
        )
    return halved
