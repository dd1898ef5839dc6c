"""The manifest of a recording: what was recorded, how, and the columns that hold it."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.text import printable
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.base import is_logits

__all__ = [
    "CHECKSUM",
    "LOGITS",
    "MANIFEST",
    "MAX_MANIFEST_BYTES",
    "SAMPLE",
    "Column",
    "RecordedDtype",
    "RecordedOutput",
    "RecordingManifest",
    "TeacherInfo",
    "reason_of",
]

RecordedDtype = Literal["float32", "float16", "int8"]

LOGITS = "logits"
"""Name of a classifier's output."""

SAMPLE, CHECKSUM = "sample", "checksum"
"""Columns besides those of the outputs, whose names contain a dot."""
MANIFEST = "manifest.json"
"""Name of the file that describes the others."""
_DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1"}
_MAX_INT16_CLASSES = 2**15
MAX_MANIFEST_BYTES = 2**23
"""Of the file, which is enough for the names of a hundred thousand classes."""
_MAX_VALUES = 1000
"""In a manifest, besides class names."""
_MAX_DIGITS = 20
_MAX_NAME = 200
"""Characters of an output's name."""
_MAX_ROW_BYTES = 2**26
_MAX_EPOCH_BYTES = 2**60
_MAX_PARTS = 2**20
"""Of an epoch."""

_Word = Annotated[str, Field(pattern=r"^[\w.+-]+$", max_length=200)]
_Count = Annotated[int, Field(ge=1, lt=2**40)]
_Scalar = bool | int | float | Annotated[str, Field(max_length=1000)] | None
_Value = _Scalar | tuple[_Scalar, ...]
_Fields = _Value | dict[_Word, _Value]


class TeacherInfo(Settings):
    """The teacher that was recorded."""

    fingerprint: str = Field(pattern="^[0-9a-f]{1,128}$")
    backend: _Word
    precision: _Word
    runtimes: tuple[Annotated[str, Field(pattern=r"^\w+ \w+$", max_length=200)], ...] = ()
    """See `Teacher.runtimes`."""
    classes: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Column:
    """One of the arrays, `[num_rows, *shape]` in each epoch."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape)


class RecordedOutput(Settings):
    """How an output of the teacher is stored."""

    shape: tuple[_Count, ...] = Field(min_length=1, max_length=3)
    """Of an image: a vector `[D]`, tokens `[L, D]` or a map `[C, h, w]`."""
    dtype: RecordedDtype = "float32"
    """Of its numbers in the files. `int8` has a float32 scale for each vector, token or position of a map."""
    top_k: int | None = Field(default=None, ge=1)
    """How many logits of an image are kept; None keeps all."""
    num_prefix_tokens: int | None = Field(default=None, ge=0)
    """Of tokens; see `TensorSpec`."""
    teacher_grid: tuple[_Count, _Count] | None = None
    """Height and width of the teacher's map, or the grid of its tokens, that was resized to this map; else None."""

    @property
    def spec(self) -> TensorSpec:
        """Of the outputs that are replayed."""
        return TensorSpec((None, *self.shape), torch.float32, self.num_prefix_tokens)

    @property
    def is_exact(self) -> bool:
        """Whether what is replayed is what the teacher returned, bit for bit."""
        return self.dtype == "float32" and self.top_k is None and self.teacher_grid is None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of what has one scale each: nothing for a vector, `[L]` for tokens and `[h, w]` for a map."""
        return self.shape[1:] if len(self.shape) == 3 else self.shape[:-1]

    def columns(self, name: str) -> dict[str, "Column"]:
        """The arrays of the output called `name`, by the name of the column."""
        values = Column(np.dtype(_DTYPES[self.dtype]), self.shape)
        if self.dtype == "int8":
            scale = Column(np.dtype("<f4"), self.row_shape)
            return {f"{name}.values": values, f"{name}.scale": scale}
        if self.top_k is None:
            return {f"{name}.values": values}
        classes = np.dtype("<i2" if self.shape[0] <= _MAX_INT16_CLASSES else "<i4")
        return {
            f"{name}.values": replace(values, shape=(self.top_k,)),
            f"{name}.classes": Column(classes, (self.top_k,)),
            f"{name}.rest": Column(values.dtype, ()),
        }

    def check(self, name: str) -> None:
        """Refuse what no output called `name` can be.

        Raises:
            ValueError: says what is wrong.
        """
        if not name or printable(name) != name or len(name) > _MAX_NAME:
            raise ValueError(f"the output name {name!r:.80} is empty, too long or not printable")
        if is_logits(name):
            if len(self.shape) not in (1, 3):
                raise ValueError(f"the logits {name!r} should have one dimension or three, got {list(self.shape)}")
            if len(self.shape) == 3 and self.top_k is not None:
                raise ValueError(f"top_k is for logits of an image, and {name!r} are of its pixels; leave it out")
            if self.dtype == "int8":
                raise ValueError(f"the logits {name!r} are stored as float32 or float16, not as int8")
        elif self.top_k is not None:
            raise ValueError(f"top_k is for logits, and {name!r} are none")
        if self.top_k is not None and self.top_k >= self.shape[0]:
            raise ValueError(f"top_k is {self.top_k} for {self.shape[0]} logits")
        if (prefix := self.num_prefix_tokens) is not None and (len(self.shape) != 2 or prefix >= self.shape[0]):
            raise ValueError(f"num_prefix_tokens is {prefix} for {name!r} with the shape {list(self.shape)}")
        if self.teacher_grid is not None and len(self.shape) != 3:
            raise ValueError(f"teacher_grid is for maps, and {name!r} has the shape {list(self.shape)}")


class RecordingManifest(Settings):
    """What was recorded, and how; `manifest.json`."""

    version: Literal[1] = 1
    teacher: TeacherInfo
    outputs: dict[str, RecordedOutput] = Field(min_length=1)
    """The recorded outputs by name."""
    stream: dict[_Word, _Fields | dict[_Word, _Fields]]
    """Everything that the image at a position of an epoch depends on; see `KDDataLoader.stream_fingerprint`."""
    num_rows: _Count
    """Positions of an epoch."""
    part_rows: _Count
    """Positions of a part; the last one of an epoch may have fewer."""

    @classmethod
    def parse(cls, content: bytes, path: str | Path) -> "RecordingManifest":
        """The manifest with this content, which was read from `path`.

        Raises:
            TeacherError: it is damaged or from a different release.
        """
        try:
            return cls._parse(content)
        except (ValueError, RecursionError) as exc:
            raise TeacherError(
                f"{path} is damaged, or was written by a different release ({reason_of(exc)}); record the teacher again"
            ) from None

    @property
    def view(self) -> str:
        """The view that the outputs are for."""
        fields = self.stream.get("view")
        return str(fields.get("name", IMAGES)) if isinstance(fields, dict) else IMAGES

    @property
    def content(self) -> bytes:
        """Of its file.

        Raises:
            TeacherError: its class names are too long to be read again.
        """
        content = (self.model_dump_json(indent=2) + "\n").encode()
        if len(content) > MAX_MANIFEST_BYTES:
            raise TeacherError(
                f"the class names are too long to record: at most {MAX_MANIFEST_BYTES} bytes in all are read"
            )
        return content

    @property
    def part_starts(self) -> range:
        """First position of each part of an epoch."""
        return range(0, self.num_rows, self.part_rows)

    def part_stop(self, start: int) -> int:
        """The position after the last of the part that starts at `start`."""
        return min(start + self.part_rows, self.num_rows)

    @property
    def columns(self) -> dict[str, Column]:
        """The arrays by name: sample, checksum, and `<output>.values` for each output.

        The sample is its index plus one: zeros, as a failing disk may leave them, are none.

        In int8 an output also has `<output>.scale`. With `top_k`, logits also have `<output>.classes`, and
        `<output>.rest`: the log of the summed exponentials of all logits that are not kept.
        """
        columns = {SAMPLE: Column(np.dtype("<i4" if self.num_rows < 2**31 else "<i8"), ())}
        columns[CHECKSUM] = Column(np.dtype("<u4"), ())
        for name, output in self.outputs.items():
            columns |= output.columns(name)
        return columns

    @property
    def output_bytes(self) -> dict[str, int]:
        """Bytes of each output for one image of one epoch."""
        return {
            name: sum(column.row_bytes for column in output.columns(name).values())
            for name, output in self.outputs.items()
        }

    @property
    def row_bytes(self) -> int:
        """Bytes for one image of one epoch."""
        return sum(column.row_bytes for column in self.columns.values())

    @property
    def epoch_bytes(self) -> int:
        """Bytes of a complete epoch."""
        return self.row_bytes * self.num_rows

    @classmethod
    def _parse(cls, raw: bytes) -> Self:
        fields = json.loads(raw, parse_int=_integer)
        _refuse_bulk(fields)
        # Strict JSON mode is strict about types, yet lets lists become tuples.
        return cls.model_validate_json(json.dumps(fields), strict=True)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for name, output in self.outputs.items():
            output.check(name)
        logits = self.outputs.get(LOGITS)
        if logits is not None and self.teacher.classes is not None and len(self.teacher.classes) != logits.shape[0]:
            raise ValueError(f"there are {len(self.teacher.classes)} class names for {logits.shape[0]} logits")
        if self.num_rows > _MAX_PARTS * self.part_rows:
            raise ValueError(f"part_rows is {self.part_rows} for {self.num_rows} rows; at most {_MAX_PARTS} parts are")
        if self.row_bytes > _MAX_ROW_BYTES or self.epoch_bytes > _MAX_EPOCH_BYTES:
            raise ValueError(
                f"it has {self.row_bytes} bytes for an image and {self.epoch_bytes} for an epoch, and at most "
                f"{_MAX_ROW_BYTES} and {_MAX_EPOCH_BYTES} are possible"
            )
        return self


def reason_of(exc: ValueError | RecursionError) -> str:
    """What is wrong with a manifest, in a line."""
    if isinstance(exc, RecursionError):
        return "it is nested too deeply"
    if not isinstance(exc, ValidationError):
        return printable(exc)
    error = exc.errors(include_url=False)[0]
    text = error["msg"].removeprefix("Value error, ")
    return printable(": ".join(filter(None, [".".join(map(str, error["loc"])), text])))


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _refuse_bulk(fields: Any) -> None:
    """Refuse JSON with many values that are no class names: pydantic makes a report of each one that is wrong."""
    teacher = fields.get("teacher") if isinstance(fields, dict) else None
    classes = teacher.get("classes") if isinstance(teacher, dict) else None
    has_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    values = [fields]
    for value in values:  # which grows meanwhile
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list) and not (value is classes and has_names):
            values.extend(value)
        if len(values) > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES} values besides class names")
