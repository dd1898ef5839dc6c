"""The files of a recording: teacher outputs of every position of every epoch, in a few large arrays.

Each array has one row for each position of each epoch, in this order: the rows of a batch are contiguous, for any batch
size and number of ranks. Besides the outputs, a row has the index of its sample plus one, and a checksum of its
pixels. The files have their full length from the start and are sparse where nothing was written: a sample of 0 marks a
missing row.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import StateError, TeacherError

__all__ = [
    "CHECKSUM",
    "MANIFEST",
    "SAMPLE",
    "Column",
    "RecordedDtype",
    "RecordingManifest",
    "RecordingWriter",
    "TeacherInfo",
    "checksums",
    "create_files",
    "decode",
    "encode",
    "open_columns",
]

RecordedDtype = Literal["float32", "float16"]

SAMPLE, CHECKSUM = "sample", "checksum"
"""Columns besides those of the outputs, whose names contain a dot."""
MANIFEST = "manifest.json"
"""Name of the file that describes the others."""
_MAX_INT16_CLASSES = 2**15
_CHUNK = 16
"""Images in a step of a GPU's checksums, to limit its memory."""


class TeacherInfo(Settings):
    """The teacher that was recorded."""

    fingerprint: str
    backend: str
    precision: str
    classes: tuple[str, ...] | None


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


class RecordingManifest(Settings):
    """What was recorded, and how; `manifest.json`."""

    version: Literal[1] = 1
    teacher: TeacherInfo
    outputs: dict[str, tuple[int, ...]]
    """Shape of each output, without the batch."""
    top_k: int | None = Field(default=None, ge=1)
    """How many logits of an image are kept; None keeps all."""
    dtype: RecordedDtype = "float32"
    """Of the outputs in the files."""
    stream: dict[str, Any]
    """Everything that the image at a position of an epoch depends on; see `KDDataLoader.stream_fingerprint`."""
    num_rows: int = Field(ge=1)
    """Places of an epoch."""
    epochs: int = Field(ge=1)
    """Epochs for which the files have space."""
    epochs_done: int = Field(default=0, ge=0)
    """Epochs that are complete."""

    @classmethod
    def load(cls, folder: Path) -> "RecordingManifest":
        """The manifest of the recording in `folder`.

        Raises:
            TeacherError: there is no recording, or its manifest is damaged or from a different release.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise TeacherError(f"{folder} holds no recording: there is no {path}; make one with kd-pipeline record")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as exc:
            reason = str(exc)
            if isinstance(exc, ValidationError):
                error = exc.errors()[0]
                reason = f"{'.'.join(map(str, error['loc']))}: {error['msg']}"
            raise TeacherError(
                f"{path} is damaged, or was written by a different release ({reason}); record the teacher again"
            ) from None

    def save(self, folder: Path) -> None:
        """Write it to `folder`, atomically."""
        write_atomic(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")

    @property
    def columns(self) -> dict[str, Column]:
        """The arrays by name: sample, checksum, and `<output>.values` for each output.

        With `top_k` the logits also have `logits.classes`, and `logits.rest`: the log of the summed exponentials of all
        logits that are not kept.
        """
        largest = self.num_rows + 1
        columns = {SAMPLE: Column("sample.bin", np.dtype("<i4" if largest < 2**31 else "<i8"), ())}
        columns[CHECKSUM] = Column("checksum.bin", np.dtype("<u4"), ())
        values = np.dtype("<f4" if self.dtype == "float32" else "<f2")
        for name, shape in self.outputs.items():
            file = quote(name, safe="")
            if name != "logits" or self.top_k is None:
                columns[f"{name}.values"] = Column(f"{file}.values.bin", values, shape)
                continue
            classes = np.dtype("<i2" if shape[0] <= _MAX_INT16_CLASSES else "<i4")
            columns["logits.values"] = Column("logits.values.bin", values, (self.top_k,))
            columns["logits.classes"] = Column("logits.classes.bin", classes, (self.top_k,))
            columns["logits.rest"] = Column("logits.rest.bin", values, ())
        return columns

    @property
    def row_bytes(self) -> int:
        """Bytes for one image of one epoch, in all files together."""
        return sum(column.row_bytes for column in self.columns.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together when every row is written."""
        return self.row_bytes * self.num_rows * self.epochs


class RecordingWriter:
    """Writes the files of a recording, row by row.

    A row counts once its sample is written. Only `commit` does that, after everything else of the row: by the order of
    the calls if the process is killed, and by `fdatasync` if the machine loses power. Rows are written with `pwrite`
    and not through a memory map, with which a full disk would kill the process without a message.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files that `create_files` made in `folder`.

        Raises:
            StateError: they cannot be opened.
        """
        self.folder, self.manifest = folder, RecordingManifest.load(folder)
        self._columns = self.manifest.columns
        self._files: dict[str, int] = {}
        self._uncommitted: list[tuple[int, int, NDArray[Any]]] = []
        with ExitStack() as opened, _writing(folder):
            opened.callback(self.close)
            for name, column in self._columns.items():
                self._files[name] = os.open(folder / column.file, os.O_RDWR)
            opened.pop_all()

    def committed(self, epoch: int) -> NDArray[np.bool_]:
        """`[num_rows]`, True for the rows of `epoch` that count."""
        column = self._columns[SAMPLE]
        length = column.row_bytes * self.manifest.num_rows
        samples = np.frombuffer(os.pread(self._files[SAMPLE], length, epoch * length), column.dtype)
        committed: NDArray[np.bool_] = samples != 0
        return committed

    def write(self, epoch: int, position: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Write rows `[n, ...]` of every column, from `position` of `epoch` on; they count after `commit`.

        Raises:
            StateError: the disk is full or fails.
        """
        for name, values in rows.items():
            if name != SAMPLE:
                self._put(name, epoch, position, values)
        self._uncommitted.append((epoch, position, rows[SAMPLE] + 1))

    def commit(self) -> None:
        """Let everything that was written count.

        Raises:
            StateError: the disk is full or fails.
        """
        self._sync(name for name in self._files if name != SAMPLE)
        for epoch, position, samples in self._uncommitted:
            self._put(SAMPLE, epoch, position, samples)
        self._uncommitted.clear()
        self._sync([SAMPLE])

    def finish_epoch(self, epoch: int, *, save: bool) -> None:
        """Mark `epoch` and all before it as complete; one of the processes should `save` that in the manifest.

        Raises:
            StateError: the disk is full or fails.
        """
        self.manifest = self.manifest.model_copy(update={"epochs_done": epoch + 1})
        if save:
            with _writing(self.folder / MANIFEST):
                self.manifest.save(self.folder)

    def close(self) -> None:
        """Close the files; what was not committed does not count."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _put(self, name: str, epoch: int, position: int, rows: NDArray[Any]) -> None:
        column = self._columns[name]
        left = memoryview(np.ascontiguousarray(rows, dtype=column.dtype).tobytes())
        offset = (epoch * self.manifest.num_rows + position) * column.row_bytes
        with _writing(self.folder / column.file):
            while left:
                written = os.pwrite(self._files[name], left, offset)
                left, offset = left[written:], offset + written

    def _sync(self, names: Iterable[str]) -> None:
        for name in names:
            with _writing(self.folder / self._columns[name].file):
                os.fdatasync(self._files[name])


def create_files(folder: Path, manifest: RecordingManifest) -> None:
    """Create the files of a recording, or extend existing ones, and write the manifest.

    Raises:
        StateError: they cannot be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Files without a manifest belong to no recording.
        mode = "r+b" if (folder / MANIFEST).exists() else "w+b"
        for column in manifest.columns.values():
            with (folder / column.file).open(mode) as file:
                length = column.row_bytes * manifest.num_rows * manifest.epochs
                file.truncate(max(length, os.fstat(file.fileno()).st_size))
        manifest.save(folder)


def open_columns(folder: Path, manifest: RecordingManifest) -> dict[str, NDArray[Any]]:
    """The arrays of a recording, memory-mapped, `[epochs, num_rows, ...]` each.

    Raises:
        TeacherError: a file is missing or too short.
    """
    columns: dict[str, NDArray[Any]] = {}
    for name, column in manifest.columns.items():
        path = folder / column.file
        expected = column.row_bytes * manifest.num_rows * manifest.epochs
        size = -1
        with suppress(OSError):
            size = path.stat().st_size
        if size < expected:
            state = "is missing" if size < 0 else f"has {size} bytes and not {expected}"
            raise TeacherError(f"the recording in {folder} is damaged: {path} {state}; copy or record it again")
        columns[name] = np.memmap(path, column.dtype, "r", shape=(manifest.epochs, manifest.num_rows, *column.shape))
    return columns


def encode(outputs: Mapping[str, Tensor], manifest: RecordingManifest) -> dict[str, Tensor]:
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


def decode(columns: Mapping[str, Tensor], manifest: RecordingManifest) -> dict[str, Tensor]:
    """Columns of a recording as outputs `[N, ...]` float32, on the same device.

    With `top_k`, the other classes share the rest of the probability evenly, so a softmax gives the kept classes the
    probabilities that they had.
    """
    outputs = {name: columns[f"{name}.values"].float() for name in manifest.outputs}
    if manifest.top_k is not None:
        num_classes = manifest.outputs["logits"][0]
        share_N1 = (columns["logits.rest"].float() - float(np.log(num_classes - manifest.top_k)))[:, None]
        logits_NK = share_N1.repeat(1, num_classes)
        outputs["logits"] = logits_NK.scatter_(1, columns["logits.classes"].long(), outputs["logits"])
    return outputs


def checksums(images: Tensor) -> NDArray[np.uint32]:
    """`[N]`, a checksum of each image `[N, ...]`, float32 or float16: the bits of its pixels times odd numbers, summed.

    Integers that wrap around give the same sum on every device, and a single changed pixel always changes it. It is
    computed on the device of the images, faster than a cryptographic digest.
    """
    bits = images.flatten(1).view(torch.int32 if images.dtype == torch.float32 else torch.int16)
    factors = _factors(bits.shape[1])
    sums = _sums_on_cpu(bits, factors) if images.device.type == "cpu" else _sums_on_gpu(bits, factors)
    return np.asarray(sums, dtype=np.uint32)


def _sums_on_cpu(bits: Tensor, factors: NDArray[np.uint32]) -> list[int]:
    """In NumPy, which takes a third of torch's time."""
    sums = []
    for row in bits.numpy():
        pixels = row.astype(np.int32, copy=False).view(np.uint32)
        # With the upper half of each number added to its lower half, sign and exponent affect all of the product.
        products = pixels >> np.uint32(16)
        products ^= pixels
        products *= factors
        sums.append(int(products.sum(dtype=np.uint32)))
    return sums


def _sums_on_gpu(bits: Tensor, factors: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The same in torch, which has signed integers only, for a few images at a time."""
    factors_P = torch.from_numpy(factors.view(np.int32)).to(bits.device)
    sums = []
    for start in range(0, len(bits), _CHUNK):
        pixels = bits[start : start + _CHUNK].to(torch.int32)
        products = (pixels ^ ((pixels >> 16) & 0xFFFF)) * factors_P
        sums.append(products.sum(1))  # in int64
    return np.asarray(torch.cat(sums).cpu().numpy().astype(np.uint32))


@cache
def _factors(count: int) -> NDArray[np.uint32]:
    """Odd numbers, from a generator whose raw output NumPy promises never to change."""
    return np.random.Philox(key=0).random_raw(count).astype(np.uint32) | np.uint32(1)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a StateError about `path`."""
    try:
        yield
    except OSError as exc:
        raise StateError(
            f"{path} cannot be written: {exc.strerror}; solve that and run the same command again to resume"
        ) from exc


def _half(name: str, column: Tensor) -> Tensor:
    halved = column.half()
    if bool((halved.isinf() & column.isfinite()).any()):
        raise TeacherError(
            f"{name} goes up to {float(column[column.isfinite()].abs().max()):.4g}, and float16 to 65504; record it "
            "with --dtype float32"
        )
    return halved
