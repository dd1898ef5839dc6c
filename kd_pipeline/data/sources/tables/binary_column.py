"""Columns of Arrow tables that hold encoded images: which ones do, and their bytes without a copy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline._core.text import printable

__all__ = ["BinaryColumn", "holds_bytes", "is_binary", "why_missing", "why_no_bytes"]


class BinaryColumn:
    """The bytes of each row of a column of binary values, or of structs such as Hugging Face's `{bytes, path}`.

    Args:
        column: a `pyarrow.ChunkedArray` of a type that `holds_bytes`.
    """

    def __init__(self, column: Any) -> None:
        self._chunks = [_Chunk(chunk) for chunk in column.chunks if len(chunk)]
        self._ends = np.cumsum([0, *map(len, self._chunks)])
        self.num_bytes = sum(chunk.num_bytes for chunk in self._chunks)
        """Of the values of all rows."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def chunk_ends(self) -> NDArray[np.int64]:
        """`[C + 1]`, 0 and the end of each chunk."""
        return self._ends

    @property
    def num_missing(self) -> int:
        """Rows without a value."""
        return sum(chunk.num_missing for chunk in self._chunks)

    def at(self, row: int) -> NDArray[np.uint8] | None:
        """The value of a row, a read-only view `[L]`; None where it is null."""
        number = int(np.searchsorted(self._ends, row, side="right")) - 1 if len(self._chunks) > 1 else 0
        return self._chunks[number].at(row - int(self._ends[number]))


class _Chunk:
    def __init__(self, values: Any) -> None:
        pa = require("pyarrow", extra="parquet")
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_struct(values.type):
            # flatten() makes a value null whose struct is.
            values = values.flatten()[values.type.get_field_index("bytes")]
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
        if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
            values = values.cast(pa.large_binary())
        _, offsets, data = values.buffers()
        width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        self._offsets = np.frombuffer(offsets, width)[values.offset : values.offset + len(values) + 1]
        self._data = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        self._data.flags.writeable = False
        self.num_missing = values.null_count
        self._is_there = np.asarray(values.is_valid()) if values.null_count else None
        self.num_bytes = int(self._offsets[-1] - self._offsets[0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def at(self, row: int) -> NDArray[np.uint8] | None:
        if self._is_there is not None and not self._is_there[row]:
            return None
        return self._data[self._offsets[row] : self._offsets[row + 1]]


def is_binary(kind: Any) -> bool:
    """Whether an Arrow type is one of bytes."""
    types = require("pyarrow", extra="parquet").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type is one of bytes, or a struct with a field `bytes`."""
    types = require("pyarrow", extra="parquet").types
    if not types.is_struct(kind):
        return is_binary(kind)
    place = kind.get_field_index("bytes")
    return place >= 0 and is_binary(kind.field(place).type)


def why_no_bytes(kind: Any) -> str:
    """What an Arrow type that does not `holds_bytes` is, and what to do about it."""
    types = require("pyarrow", extra="parquet").types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "it holds text: decode base64 and write bytes, or take kind: file_list if it is the paths of files"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "it holds lists, such as decoded pixels; write encoded images, or the pixels for kind: arrays"
    return f"it holds {kind!s:.100}; write the encoded image as bytes (binary), or a struct of bytes and path"


def why_missing(path: str | None, advice: str) -> str:
    """Why a row whose bytes are null has no image, although it may have a `path`; `advice` is about such rows."""
    if path is None:
        return "the row has no image (null)"
    return (
        f"the row has no image but the path {printable(path)!r:.200}, and files beside the table are not read; {advice}"
    )
