"""The weights of an ONNX model: whether each tensor has the data that its shape needs, and where external data is."""

import errno
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from kd_pipeline._core.files import NotAFileError, describe_special
from kd_pipeline._core.optional import require
from kd_pipeline._core.text import printable
from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx.outline import CHUNK, Outline

__all__ = [
    "MAX_DIMS",
    "Ranges",
    "all_tensors",
    "dtype_name",
    "external_ranges",
    "open_external",
    "quoted",
    "read_ranges",
    "shortened",
]

Ranges = Sequence[tuple[int, int]]
"""Start and end of each part of a file that the model uses, in order and apart from each other."""

MAX_DIMS = 64
"""More than any runtime has."""
_MAX_EXTERNAL = 2**36
"""Bytes of external weights, for 16 billion numbers in float32."""
_MAX_SHARED = 2**26
"""Bytes of external weights that tensors may share with each other, besides 16 times what there is."""
_BITS = {
    8: "BOOL INT8 UINT8 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0",
    16: "INT16 UINT16 FLOAT16 BFLOAT16",
    32: "FLOAT INT32 UINT32",
    64: "DOUBLE INT64 UINT64 COMPLEX64",
    128: "COMPLEX128",
    2: "INT2 UINT2",
    4: "INT4 UINT4 FLOAT4E2M1",
}
_NUM_BITS = {name: bits for bits, names in _BITS.items() for name in names.split()}
_DATA_FIELDS = ("float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data")
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_NOT_READ = ("sparse_tensor", "sparse_tensors", "sparse_initializer", "training_info")
"""Fields of ONNX that no runtime here needs for a classifier, and that hold data which is not looked at."""
_MEMORY_LOCATION = "_ORT_MEM_ADDR_"
"""In a location that means an address in the memory of the process, to ONNX Runtime and OpenVINO."""
_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_TEXT = 2000
_quote = reprlib.Repr()
_quote.maxstring = 120


def quoted(text: str) -> str:
    """A string from a file for a message: quoted, escaped and not longer than a line."""
    return _quote.repr(text)


def shortened(error: Exception, copy: Path | None = None, path: Path | None = None) -> str:
    """What a package says about a file, or about its private `copy` of `path`, for a message: it repeats any name."""
    text = printable(error, keep="\n")
    if copy is not None:
        text = text.replace(str(copy), str(path))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def all_tensors(path: Path, message: Any) -> Iterator[Any]:
    """All tensors in a protobuf message: initializers, constants, those in subgraphs and functions.

    Raises:
        TeacherError: it has tensors of a kind that is not read, or text that is none.
    """
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
    for entry, value in message.ListFields():
        if entry.name in _NOT_READ:
            raise TeacherError(f"{path} has {entry.name}, which is not supported; export the teacher without it")
        if entry.message_type is not None:
            for child in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from all_tensors(path, child)
        elif entry.type == entry.TYPE_STRING:
            texts = (value,) if isinstance(value, str | bytes) else value
            if not all(isinstance(text, str) for text in texts):  # protobuf gives the bytes
                raise TeacherError(
                    f"{path}: its {message.DESCRIPTOR.name}.{entry.name} is not UTF-8; export the teacher again"
                )


def external_ranges(path: Path, outline: Outline, tensors: Iterable[Any]) -> Mapping[str, Ranges]:
    """The parts of files that hold weights, by location, sorted, after checking every tensor.

    Raises:
        TeacherError: a tensor has other data than its shape needs, or its external data is not allowed.
    """
    used: dict[str, list[tuple[int, int]]] = {}
    for tensor in tensors:
        try:
            num_elements, bits = _size(tensor)
            if tensor.data_location == tensor.EXTERNAL:
                location, start, end = _external(tensor, math.ceil(num_elements * bits / 8))
                used.setdefault(location, []).append((start, end))
            else:
                _check_data(outline, tensor, num_elements, bits)
        except ValueError as exc:
            raise TeacherError(f"{path}: the weights of {quoted(tensor.name)} {exc}") from exc
    ranges = {location: _merge(used[location]) for location in sorted(used)}
    if path.name in ranges:
        raise TeacherError(f"{path}: it names itself as the file of external weights; export the teacher again")
    asked = sum(end - start for parts in used.values() for start, end in parts)
    there = sum(end - start for parts in ranges.values() for start, end in parts)
    if there > _MAX_EXTERNAL or asked > 16 * there + _MAX_SHARED:
        raise TeacherError(
            f"{path} has {asked} bytes of external weights in {there} bytes of files; allowed are {_MAX_EXTERNAL}, and "
            "16 times what the files hold"
        )
    return ranges


@contextmanager
def open_external(path: Path, location: str) -> Iterator[BinaryIO]:
    """Open a file with weights of the model `path`, in its folder, following no link.

    Raises:
        OSError: it cannot be opened; `strerror` goes after "cannot be read: ".
    """
    *folders, name = PurePosixPath(location).parts
    descriptor = os.open(path.parent, _FOLDER)
    try:
        for folder in folders:
            _refuse_link(folder, descriptor)
            child = os.open(folder, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = child
        _refuse_link(name, descriptor)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = os.open(name, flags, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    with os.fdopen(opened, "rb") as stream:
        if kind := describe_special(os.fstat(opened).st_mode):
            raise NotAFileError(errno.EINVAL, f"this is {kind} and no file", location)
        yield stream


def read_ranges(stream: BinaryIO, ranges: Ranges) -> Iterator[tuple[int, bytes]]:
    """The parts `ranges` of a file in chunks, each with its position.

    Raises:
        OSError: the file is shorter, or cannot be read.
    """
    size = os.fstat(stream.fileno()).st_size
    if ranges and ranges[-1][1] > size:
        raise OSError(errno.EINVAL, f"it has {size} bytes, and the model needs {ranges[-1][1]}")
    for start, end in ranges:
        stream.seek(start)
        for position in range(start, end, CHUNK):
            chunk = stream.read(min(CHUNK, end - position))
            if len(chunk) != min(CHUNK, end - position):
                raise OSError(errno.EAGAIN, "it was cut off while it was read")
            yield position, chunk


def _refuse_link(name: str, folder: int) -> None:
    """Before it is opened: which also has an effect for some devices."""
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    kind = describe_special(mode)
    if kind == "a link":
        raise NotAFileError(errno.ELOOP, "links are not followed; put the file itself there", name)
    if kind is not None and kind != "a directory":
        raise NotAFileError(errno.EINVAL, f"this is {kind} and no file", name)


def _size(tensor: Any) -> tuple[int, int]:
    """The number of elements and the bits of each."""
    if tensor.HasField("segment"):
        raise ValueError("are a segment of others, which is not supported; export the teacher again")
    if len(tensor.dims) > MAX_DIMS:
        raise ValueError(f"have {len(tensor.dims)} dimensions, more than {MAX_DIMS}; export the teacher again")
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"have the negative size {min(tensor.dims)}; export the teacher again")
    name = dtype_name(tensor.data_type)
    if name not in _NUM_BITS and (name != "STRING" or tensor.data_location == tensor.EXTERNAL):
        raise ValueError(f"have the type {name}, which is not supported; export the teacher in float32")
    return math.prod(tensor.dims), _NUM_BITS.get(name, 0)


def dtype_name(number: int) -> str:
    """The name of an `onnx.TensorProto.DataType`; the number itself if onnx does not know it."""
    types = require("onnx", extra="cpu").TensorProto.DataType
    return str(types.Name(number)) if number in types.values() else str(number)


def _check_data(outline: Outline, tensor: Any, num_elements: int, bits: int) -> None:
    """Raise unless the tensor holds the data that its shape needs, once."""
    if tensor.external_data:
        raise ValueError("are in the file, and in another one too; export the teacher again")
    fields = {name: len(getattr(tensor, name)) for name in _DATA_FIELDS if getattr(tensor, name)}
    if tensor.raw_data:
        name, size = outline.sizes.get(tensor.raw_data, ("raw_data", len(tensor.raw_data)))
        if fields:
            raise ValueError("are in the file twice; export the teacher again")
        fields = {name: size}
    helper = require("onnx", extra="cpu").helper
    own_field = helper.tensor_dtype_to_field(tensor.data_type)
    needed = {"raw_data": math.ceil(num_elements * bits / 8)} if bits else {}
    packed = math.ceil(num_elements * bits / 8) if 0 < bits < 8 else num_elements
    is_complex = tensor.data_type in (tensor.COMPLEX64, tensor.COMPLEX128)
    needed[own_field] = 2 * num_elements if is_complex else packed
    if not fields and num_elements == 0:
        return
    if len(fields) != 1 or any(needed.get(name) != size for name, size in fields.items()):
        found = ", ".join(f"{size} in {name}" for name, size in fields.items()) or "nothing"
        wanted = " or ".join(f"{size} in {name}" for name, size in needed.items())
        raise ValueError(
            f"of the shape {quoted_shape(tensor.dims)} need {wanted}, and the file has {found}; export the "
            "teacher again"
        )


def quoted_shape(dims: Sequence[int]) -> str:
    """A shape for a message."""
    return f"[{', '.join(map(str, dims))}]"


def _external(tensor: Any, num_bytes: int) -> tuple[str, int, int]:
    """Location, start and end of external data."""
    if tensor.raw_data or any(getattr(tensor, name) for name in _DATA_FIELDS):
        raise ValueError("are in the file, and in another one too; export the teacher again")
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _EXTERNAL_KEYS or entry.key in entries:
            raise ValueError(
                f"have the entry {quoted(entry.key)} {'twice' if entry.key in entries else 'in their external data'}; "
                "allowed are one each of location, offset, length and checksum, export the teacher again"
            )
        entries[entry.key] = entry.value
    location = _location(entries.get("location", ""))
    start = _number(entries, "offset", 0)
    length = _number(entries, "length", num_bytes)
    if length != num_bytes:
        raise ValueError(
            f"of the shape {quoted_shape(tensor.dims)} need {num_bytes} bytes, and {length} are in {quoted(location)}; "
            "export the teacher again"
        )
    return location, start, start + length


def _location(text: str) -> str:
    """A location in the simplest form."""
    parts = PurePosixPath(text).parts
    is_special = any(part in text for part in ("\0", "\\", "*", _MEMORY_LOCATION))
    if not parts or text.startswith("/") or ".." in parts or is_special or not text.isprintable():
        raise ValueError(
            f"are in {quoted(text)}; allowed is a file in the model's folder, named without '..', '*' and backslashes: "
            "keep external data next to the model"
        )
    return str(PurePosixPath(text))


def _number(entries: Mapping[str, str], key: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"have the {key} {quoted(text)}, which is no number of bytes; export the teacher again")
    return int(text)


def _merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return tuple(merged)
