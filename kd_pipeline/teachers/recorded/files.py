"""The files of a recording: teacher outputs of every position of every epoch, in a few large arrays.

Each array has one row for each position of each epoch, in this order: the rows of a batch are contiguous, for any batch
size and number of ranks. Besides the outputs, a row has the index of its sample plus one, and a checksum of its
pixels. The files have their full length from the start and are sparse where nothing was written: a sample of 0 marks a
missing row.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.files import open_own, open_regular
from kd_pipeline.errors import StateError, TeacherError
from kd_pipeline.teachers.recorded.manifest import MANIFEST, SAMPLE, Column, RecordingManifest

__all__ = ["RecordingReader", "RecordingWriter", "checksums", "create_files"]

_CHUNK = 16
"""Images in a step of a GPU's checksums, to limit its memory."""


class RecordingWriter:
    """Writes the files of a recording, row by row.

    A row counts once its sample is written. Only `commit` does that, after everything else of the row: by the order of
    the calls if the process is killed, and by `fdatasync` if the machine loses power. Rows are written with `pwrite`
    and not through a memory map, with which a full disk would kill the process without a message.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files that `create_files` made in `folder`.

        Raises:
            StateError: they cannot be opened, or are too short.
        """
        self.folder, self.manifest = folder, RecordingManifest.load(folder)
        self._columns = self.manifest.columns
        self._files: dict[str, BinaryIO] = {}
        self._uncommitted: list[tuple[int, int, NDArray[Any]]] = []
        with ExitStack() as opened:
            opened.callback(self.close)
            for name, column in self._columns.items():
                path = folder / column.file
                with _writing(path):
                    self._files[name] = open_own(path, "r+b")
                if problem := _too_short(self._files[name], column, self.manifest):
                    raise StateError(f"{path} is damaged: it {problem}; record again in a different folder with --out")
            opened.pop_all()

    def committed(self, epoch: int) -> NDArray[np.bool_]:
        """`[num_rows]`, True for the rows of `epoch` that count."""
        samples = np.empty(self.manifest.num_rows, self._columns[SAMPLE].dtype)
        with _writing(self.folder / self._columns[SAMPLE].file):
            _read_into(self._files[SAMPLE], samples, epoch * samples.nbytes)
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
            file.close()
        self._files.clear()

    def _put(self, name: str, epoch: int, position: int, rows: NDArray[Any]) -> None:
        column = self._columns[name]
        left = memoryview(np.ascontiguousarray(rows, dtype=column.dtype).tobytes())
        offset = (epoch * self.manifest.num_rows + position) * column.row_bytes
        with _writing(self.folder / column.file):
            while left:
                written = os.pwrite(self._files[name].fileno(), left, offset)
                left, offset = left[written:], offset + written

    def _sync(self, names: Iterable[str]) -> None:
        for name in names:
            with _writing(self.folder / self._columns[name].file):
                os.fdatasync(self._files[name].fileno())


class RecordingReader:
    """Reads rows of a recording's files, which stay open.

    The rows of a batch are contiguous, so a column takes one `pread`. With a memory map, a file that is cut off while
    it is used would kill the process without a message.
    """

    def __init__(self, folder: Path, manifest: RecordingManifest) -> None:
        """Open the files in `folder`.

        Raises:
            TeacherError: a file is missing, too short or no file.
        """
        self.folder, self.manifest = folder, manifest
        self.columns = manifest.columns
        self._files: dict[str, BinaryIO] = {}
        self.close = finalize(self, _close, self._files)
        """Close the files. A second call does nothing."""
        with ExitStack() as opened:
            opened.callback(self.close)
            for name in self.columns:
                self._files[name] = self._open(name)
            opened.pop_all()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._files

    def read(self, name: str, epoch: int, position: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows `[N, ...]` of a column at positions of an epoch.

        Args:
            name: of the column.
            epoch: number of the epoch.
            position: `[N]`, each from 0 to `num_rows` - 1.
            out: where to read them to; defaults to a new array.

        Raises:
            TeacherError: the file was cut off meanwhile, or the disk fails.
        """
        column = self.columns[name]
        rows = np.empty((len(position), *column.shape), column.dtype) if out is None else out
        starts = np.flatnonzero(np.diff(position, prepend=-2) != 1).tolist()  # of contiguous rows
        for start, end in pairwise([*starts, len(position)]):
            offset = (epoch * self.manifest.num_rows + int(position[start])) * column.row_bytes
            try:
                _read_into(self._files[name], rows[start:end], offset)
            except OSError as exc:
                raise self._damaged(name, f"cannot be read: {exc.strerror}") from exc
        return rows

    def _open(self, name: str) -> BinaryIO:
        column = self.columns[name]
        try:
            file = open_regular(self.folder / column.file)
        except FileNotFoundError:
            raise self._damaged(name, "is missing") from None
        except OSError as exc:
            raise self._damaged(name, f"cannot be read: {exc.strerror}") from exc
        if problem := _too_short(file, column, self.manifest):
            file.close()
            raise self._damaged(name, problem)
        return file

    def _damaged(self, name: str, state: str) -> TeacherError:
        path = self.folder / self.columns[name].file
        return TeacherError(f"the recording in {self.folder} is damaged: {path} {state}; copy or record it again")


def create_files(folder: Path, manifest: RecordingManifest) -> None:
    """Create the files of a recording, or extend existing ones, and write the manifest.

    Raises:
        StateError: they cannot be written, or are links.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Files without a manifest belong to no recording.
        mode: Literal["r+b", "w+b"] = "r+b" if (folder / MANIFEST).exists() else "w+b"
    for column in manifest.columns.values():
        with _writing(folder / column.file), open_own(folder / column.file, mode) as file:
            length = column.row_bytes * manifest.num_rows * manifest.epochs
            file.truncate(max(length, os.fstat(file.fileno()).st_size))
    with _writing(folder / MANIFEST):
        manifest.save(folder)


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


def _too_short(file: BinaryIO, column: Column, manifest: RecordingManifest) -> str | None:
    size, expected = os.fstat(file.fileno()).st_size, column.row_bytes * manifest.num_rows * manifest.epochs
    return f"has {size} bytes and not {expected}" if size < expected else None


def _close(files: dict[str, BinaryIO]) -> None:
    for file in files.values():
        file.close()
    files.clear()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a StateError about `path`."""
    try:
        yield
    except OSError as exc:
        raise StateError(
            f"{path} cannot be written: {exc.strerror}; solve that and run the same command again to resume"
        ) from exc
