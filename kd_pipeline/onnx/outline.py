"""Reads an ONNX file without its weights, hashed as it is read, and within a bound on the memory it can ask for."""

import hashlib
import math
import secrets
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from kd_pipeline._core.optional import require

__all__ = ["CHUNK", "MAX_BYTES", "Outline", "OutlineError", "read_outline"]

MAX_BYTES = 2**31 - 1
"""Size of the largest message that protobuf reads."""
CHUNK = 2**20
"""Bytes that are hashed, skipped or copied at a time."""

_SMALL = 4096
"""Messages and weights up to this size are kept as they are."""
_MAX_UNSEEN = 2**21
"""Bytes of small messages that are not looked into, as protobuf needs up to 75 times as much memory for them."""
_MAX_MEMORY = 2**26
"""Bytes that the rest may need in one copy, of which there are up to four."""
_MESSAGE_MEMORY, _VALUE_MEMORY = 150, 16
"""Bytes that protobuf needs for a message and a value at least, measured."""
_MAX_DEPTH = 100
"""Messages in one another that protobuf reads."""
_VARINT, _FIXED_64, _SIZED, _FIXED_32 = 0, 1, 2, 5
_PACKED = {"float_data": 4, "double_data": 8, "int32_data": None, "int64_data": None, "uint64_data": None}
"""Bytes of a number by field; None if it varies."""


class OutlineError(ValueError):
    """The bytes are no ONNX model, or one that needs too much memory without its weights."""


@dataclass(frozen=True, slots=True)
class Outline:
    """An ONNX model whose large weights are replaced."""

    model: Any
    """An `onnx.ModelProto`. Large data of a tensor is a token in `raw_data`."""
    sha256: Any
    """The digest object of the whole file, with weights; more may be added."""
    sizes: dict[bytes, tuple[str, int]]
    """By token, the field that held the data, and its number of bytes if it was `raw_data`, else of values."""


def read_outline(stream: BinaryIO, size: int) -> Outline:
    """Read the `size` bytes of `stream` as an ONNX model.

    Raises:
        OutlineError: they are none, or one that needs too much memory. The message goes after "it is no ONNX file: ".
        OSError: the stream cannot be read.
        MissingPackageError: `onnx` is not installed.
    """
    onnx = require("onnx", extra="cpu")
    reader = _Reader(stream)
    content = reader.message(onnx.ModelProto.DESCRIPTOR, size)
    if stream.read(1):
        raise OutlineError("it grew while it was read")
    try:
        model = onnx.load_model_from_string(bytes(content))
    except Exception as exc:  # protobuf's DecodeError, or what onnx converts it to
        raise OutlineError(str(exc)) from exc
    num_bytes = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != num_bytes:
        raise OutlineError(f"it has fields that onnx {onnx.__version__} does not know")
    return Outline(model, reader.sha256, reader.sizes)


@dataclass(slots=True)
class _Reader:
    """Copies protobuf messages from a stream, without large weights."""

    stream: BinaryIO
    position: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)
    sizes: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    unseen: int = 0
    memory: int = 0
    depth: int = 0

    def message(self, kind: Any, size: int) -> bytearray:
        """The next `size` bytes, a message of the descriptor `kind`."""
        self._account(_MESSAGE_MEMORY)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise OutlineError(f"it has {self.depth} messages in one another")
        copy = bytearray()
        end = self.position + size
        while self.position < end:
            tag = self._number(end)
            entry, wire = kind.fields_by_number.get(tag >> 3), tag & 7
            self._account(_VALUE_MEMORY)
            if entry is None:
                raise OutlineError(f"byte {self.position} starts no field of {kind.name} that onnx knows")
            if wire == _SIZED:
                tag, content = self._sized(kind, entry, tag, end)
                copy += _varint(tag) + _varint(len(content)) + content
            elif wire == _VARINT:
                copy += _varint(tag) + _varint(self._number(end))
            elif wire in (_FIXED_32, _FIXED_64):
                copy += _varint(tag) + self._read(4 if wire == _FIXED_32 else 8, end)
            else:
                raise OutlineError(f"byte {self.position} starts no value of {kind.name}")
        self.depth -= 1
        return copy

    def _sized(self, kind: Any, entry: Any, tag: int, end: int) -> tuple[int, bytes | bytearray]:
        """The next field with a size, and its tag; that of `raw_data` and a token for large weights."""
        size = self._number(end)
        if size > end - self.position:
            raise OutlineError(f"{kind.name} ends after {end} bytes, and a part of it after {self.position + size}")
        if size <= _SMALL and self.unseen + size < _MAX_UNSEEN:
            self.unseen += size + 2  # tag and size
            return tag, self._read(size, end)
        if kind.name == "TensorProto" and (entry.name == "raw_data" or entry.name in _PACKED):
            token = secrets.token_bytes(16)  # which the file's author cannot know
            self.sizes[token] = entry.name, self._skip(size, end, entry.name)
            return kind.fields_by_name["raw_data"].number << 3 | _SIZED, token
        if entry.message_type is not None:
            return tag, self.message(entry.message_type, size)
        self._account(size)
        return tag, self._read(size, end)

    def _skip(self, size: int, end: int, name: str) -> int:
        """Skip the data of a tensor: its number of bytes for `raw_data`, else of values."""
        width = _PACKED.get(name, 1)
        num_values = 0
        for start in range(0, size, CHUNK):
            chunk = self._read(min(CHUNK, size - start), end)
            if width is None:  # the last byte of each value has no continuation bit
                num_values += int(np.count_nonzero(np.frombuffer(chunk, np.int8) >= 0))
        return math.ceil(size / width) if width else num_values

    def _number(self, end: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._read(1, end)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise OutlineError(f"byte {self.position} ends no number")

    def _read(self, size: int, end: int) -> bytes:
        content = self.stream.read(size) if self.position + size <= end else b""
        if len(content) != size:
            raise OutlineError(f"it ends within a field, after {self.position} bytes")
        self.sha256.update(content)
        self.position += size
        return content

    def _account(self, num_bytes: int) -> None:
        self.memory += num_bytes
        if self.memory > _MAX_MEMORY:
            raise OutlineError(f"it needs more than {_MAX_MEMORY >> 20} MiB without its weights")


def _varint(value: int) -> bytes:
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    content.append(value)
    return bytes(content)
