"""Open arrays in `.npy` and `.npz` files: sizes are checked before memory is taken, and large arrays stay on disk."""

import io
import math
import os
import shlex
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kd_pipeline._core.files import open_regular
from kd_pipeline.data.sources.containers import find_container
from kd_pipeline.errors import DataError

__all__ = ["NpyFile", "NpyHeader", "NpzFile", "StoredArray", "check_fits", "open_stored", "parse_header"]

_MAX_HEADER = 10_000
"""Bytes of an array's header; NumPy's own limit. The header of a plain array has 128."""
_MAX_DIMS = 32
_ALWAYS_UNPACKED = 2**28
_MAX_RATIO = 100
_BLOCK = 2**20
"""Bytes that are read from an archive at once, its directory included: that of some ten thousand arrays."""
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How NumPy packs arrays. Other ways unpack without a limit to their memory."""
_MEMINFO = Path("/proc/meminfo")
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_CGROUP = Path("/sys/fs/cgroup")


class StoredArray(ABC):
    """An array in a file, of which nothing but the header was read.

    Args:
        name: the file's name for messages.
        header: what the array's header says.
    """

    def __init__(self, name: str, header: "NpyHeader") -> None:
        self.name, self.shape, self.dtype = name, header.shape, header.dtype
        self._header = header

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def load(self) -> NDArray[Any]:
        """The whole array, in memory.

        Raises:
            DataError: it is too large for that, or its file is damaged.
        """
        check_fits(self.name, self.nbytes, self._advice())
        flat = np.empty(self.nbytes, dtype=np.uint8)
        self._fill(flat.data)
        whole: NDArray[Any] = np.ndarray(self.shape, self.dtype, flat, order="F" if self._header.is_fortran else "C")
        return whole

    @abstractmethod
    def _fill(self, memory: memoryview) -> None:
        """Read the array's bytes into `memory`."""

    @abstractmethod
    def _advice(self) -> str:
        """What to do with an array that does not fit into memory."""


class NpyFile(StoredArray):
    """An `.npy` file, of which `rows` reads parts.

    It is read and not memory-mapped: where a mapped file is cut off by another program, or its disk fails, the process
    is killed without a word. Reading takes 0.1 ms longer for 64 images.
    """

    def __init__(self, name: str, file: BinaryIO) -> None:
        weakref.finalize(self, file.close)
        header = parse_header(os.pread(file.fileno(), _MAX_HEADER, 0))
        super().__init__(name, header)
        size = os.fstat(file.fileno()).st_size
        if size < header.start + self.nbytes:
            raise ValueError(f"it has {size} bytes, and its header promises {header.start + self.nbytes}")
        self.has_rows = not header.is_fortran and bool(self.shape)
        self._file = file

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at `indices` `[n]`, in a new array.

        Raises:
            DataError: the file was cut off, cannot be read any more, or the rows do not fit into memory.
        """
        try:
            rows: NDArray[Any] = np.empty((len(indices), *self.shape[1:]), self.dtype)
        except MemoryError as exc:
            raise DataError(f"{self.name}: {len(indices)} images do not fit into memory; reduce batch_size") from exc
        if not rows.size:
            return rows
        row_bytes = self.nbytes // len(self)
        memory = rows.reshape(-1).view(np.uint8).data
        first = np.flatnonzero(np.diff(indices, prepend=-2) != 1)  # neighbors in the file are read at once
        offsets = self._header.start + indices[first] * row_bytes
        bounds = [*(first * row_bytes).tolist(), len(memory)]
        for start, end, offset in zip(bounds[:-1], bounds[1:], offsets.tolist(), strict=True):
            self._read(memory[start:end], offset)
        return rows

    def _fill(self, memory: memoryview) -> None:
        self._read(memory, self._header.start)

    def _read(self, memory: memoryview, offset: int) -> None:
        try:
            while memory:
                num_bytes = os.preadv(self._file.fileno(), [memory], offset)
                if not num_bytes:
                    size = os.fstat(self._file.fileno()).st_size
                    reason = f"it was cut off while it was in use, to {size} bytes"
                    raise DataError(f"{self.name}: {reason}; write it again, and resume the run")
                memory, offset = memory[num_bytes:], offset + num_bytes
        except OSError as exc:
            raise DataError(f"{self.name}: cannot be read any more ({exc.strerror}); check its disk") from exc

    def _advice(self) -> str:
        if self.has_rows:
            return "give this process more memory"
        code = "np.save(NEW, np.ascontiguousarray(np.load(OLD, mmap_mode='r')))"
        return f"{code} writes a file of which only the images of a batch are read"


class NpzMember(StoredArray):
    """An array in an `.npz` file, which is always loaded."""

    def __init__(self, owner: "NpzFile", archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        self._owner, self._archive, self._member = owner, archive, member  # the owner closes the file
        if member.flag_bits & 1 or member.compress_type not in _PLAIN:
            raise ValueError(f"{member.filename!r} is encrypted or compressed as no np.savez does it")
        with archive.open(member) as unpacked:
            header = parse_header(unpacked.read(_MAX_HEADER))
        super().__init__(owner.name, header)
        if member.file_size != header.start + self.nbytes:
            promised = f"the header promises {header.start + self.nbytes}"
            raise ValueError(f"{member.filename!r} has {member.file_size} bytes, and {promised}")

    def load(self) -> NDArray[Any]:
        """The whole array, in memory.

        Raises:
            DataError: it unpacks to too much, or its file is damaged.
        """
        packed = self._member.compress_size
        if self.nbytes > max(_ALWAYS_UNPACKED, _MAX_RATIO * packed):
            raise DataError(
                f"{self.name}: {self._member.filename!r} unpacks from {packed} bytes to {self.nbytes}, more than "
                f"{_MAX_RATIO} times as many, as archives do that are made to fill a memory; if it is as it should be, "
                f"{self._advice()}"
            )
        return super().load()

    def _fill(self, memory: memoryview) -> None:
        with _damage_named(self.name), self._archive.open(self._member) as unpacked:
            unpacked.read(self._header.start)
            while memory:
                block = unpacked.read(min(len(memory), _BLOCK))
                if not block:
                    raise ValueError(f"{self._member.filename!r} is cut off")
                memory[: len(block)] = block
                memory = memory[len(block) :]

    def _advice(self) -> str:
        command = shlex.join(["unzip", self.name, self._member.filename])
        return f"unpack it and take the .npy file, of which only the images of a batch are read: {command}"


class NpzFile:
    """An `.npz` file, of which nothing but the directory was read."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        weakref.finalize(self, file.close)
        self.name = name
        self._archive = zipfile.ZipFile(_Limited(file))
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key in self._members:
                raise ValueError(f"it has {key!r:.60} more than once")
            self._members[key] = member

    def __iter__(self) -> Iterator[str]:
        """Names of the arrays."""
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, key: str) -> NpzMember:
        """The array called `key`.

        Raises:
            DataError: it is none.
        """
        with _damage_named(self.name):
            return NpzMember(self, self._archive, self._members[key])


def open_stored(path: Path) -> NpyFile | NpzFile:
    """The array in an `.npy` file, or the arrays in an `.npz` file; none is loaded.

    An array of an `.npz` may unpack to 256 MiB, or to 100 times its compressed size: images that are worth keeping take
    more than a hundredth of their pixels, and files that are made to fill a memory a thousandth. What is loaded may
    take half of the memory that is free.

    Raises:
        DataError: it is neither, or is damaged.
    """
    name = str(path)
    with _damage_named(name), ExitStack() as closed_on_error:
        file = closed_on_error.enter_context(open_regular(path))
        is_zip = os.pread(file.fileno(), 2, 0) == b"PK"
        stored = NpzFile(name, file) if is_zip else NpyFile(name, file)
        closed_on_error.pop_all()
    return stored


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What the header of an `.npy` file says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    start: int
    """Bytes before the array."""


class _Limited:
    """The file of an archive; its directory cannot fill the memory, whatever size it claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _BLOCK:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes, and at most {_BLOCK} are read")
        return self._file.read(_BLOCK if size < 0 else size)


def parse_header(head: bytes) -> NpyHeader:
    """The header at the start of an `.npy` file, of which `head` has at least the first 10,000 bytes or all.

    Raises:
        ValueError: it is none, or describes no plain array.
    """
    if not head.startswith(npy.MAGIC_PREFIX):  # NumPy takes it for a pickle, and recommends to load it unsafely
        raise ValueError("not a NumPy file, or it contains Python objects")
    file = io.BytesIO(head)
    try:
        version = npy.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"plain arrays have no version {version}")
        read = _READERS[version]
        shape, is_fortran, dtype = read(file, max_header_size=_MAX_HEADER)
    except Exception as exc:  # NumPy raises a dozen kinds of errors on damaged headers
        raise ValueError(f"its header is damaged: {str(exc) or type(exc).__name__:.200}") from exc
    if dtype.hasobject:
        raise ValueError("not a NumPy file, or it contains Python objects")
    if len(shape) > _MAX_DIMS or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"its header has the shape {shape!s:.60}")
    return NpyHeader(shape, dtype, is_fortran, file.tell())


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Name the file in an error about its content, and what else it may be."""
    try:
        yield
    except DataError:
        raise
    except Exception as exc:  # zipfile too raises a dozen kinds of errors on damaged files
        reason = exc.strerror if isinstance(exc, OSError) else exc
        container = None if name.lower().endswith(".npz") else find_container(name, _head(name))
        advice = "" if container is None else f"; it is {container.kind}: {container.advice}"
        raise DataError(f"{name}: cannot be read as an .npy or .npz file of plain arrays ({reason}){advice}") from exc


def _head(name: str) -> bytes:
    """The first bytes of what is no array."""
    try:
        with open_regular(name) as file:
            head = file.read(512)
    except OSError:
        return b""
    return b"" if head.startswith(npy.MAGIC_PREFIX) else head


def check_fits(name: str, num_bytes: int, advice: str) -> None:
    """Refuse to take more than half of the memory that is free.

    Raises:
        DataError: `num_bytes` are more; ends with `advice`.
    """
    free = _free_memory()
    if num_bytes > free / 2:
        raise DataError(
            f"{name}: needs {num_bytes / 2**30:.3g} GiB of memory, more than half of the {free / 2**30:.3g} GiB that "
            f"are free; {advice}"
        )


def _free_memory() -> float:
    """Bytes that the machine, or this process's container, can still give."""
    free = math.inf
    with suppress(OSError, ValueError, IndexError):
        lines = _MEMINFO.read_text().splitlines()
        free = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    for folder, limit, usage in (
        (_CGROUP, "memory.max", "memory.current"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such version of the kernel's interface, or no limit
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(used["inactive_file"])  # counted as used, and given back when needed
            free = min(free, int((folder / limit).read_text()) - int((folder / usage).read_text()) + cached)
    return free
