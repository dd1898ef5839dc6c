"""The manifest of a recording: what was recorded, how, and the arrays that hold it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

import numpy as np
from pydantic import Field, ValidationError, model_validator

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import read_regular
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.text import printable
from kd_pipeline.errors import TeacherError

__all__ = ["CHECKSUM", "MANIFEST", "SAMPLE", "Column", "RecordedDtype", "RecordingManifest", "TeacherInfo", "reason_of"]

RecordedDtype = Literal["float32", "float16"]

SAMPLE, CHECKSUM = "sample", "checksum"
"""Columns besides those of the outputs, whose names contain a dot."""
MANIFEST = "manifest.json"
"""Name of the file that describes the others."""
_MAX_INT16_CLASSES = 2**15
_MAX_BYTES = 2**23
"""Of a manifest, which is enough for the names of a hundred thousand classes."""
_MAX_VALUES = 1000
"""In a manifest, besides class names."""
_MAX_DIGITS = 20
_MAX_NAME = 255
"""Of a file, in bytes."""
_MAX_ROW_BYTES = 2**26
_MAX_FILE_BYTES = 2**62

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
    """One of the arrays, `[epochs, num_rows, *shape]`."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape)


class RecordingManifest(Settings):
    """What was recorded, and how; `manifest.json`."""

    version: Literal[1] = 1
    teacher: TeacherInfo
    outputs: dict[str, tuple[_Count, ...]]
    """Shape of each output, without the batch."""
    top_k: int | None = Field(default=None, ge=1)
    """How many logits of an image are kept; None keeps all."""
    dtype: RecordedDtype = "float32"
    """Of the outputs in the files."""
    stream: dict[_Word, _Fields | dict[_Word, _Fields]]
    """Everything that the image at a position of an epoch depends on; see `KDDataLoader.stream_fingerprint`."""
    num_rows: _Count
    """Places of an epoch."""
    epochs: _Count
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
        try:
            return cls._parse(read_regular(path, max_bytes=_MAX_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            raise TeacherError(
                f"{folder} holds no recording: there is no {path}; make one with kd-pipeline record"
            ) from None
        except OSError as exc:
            raise TeacherError(f"{path} cannot be read: {exc.strerror}; copy or record it again") from None
        except (ValueError, RecursionError) as exc:
            raise TeacherError(
                f"{path} is damaged, or was written by a different release ({reason_of(exc)}); record the teacher again"
            ) from None

    def save(self, folder: Path) -> None:
        """Write it to `folder`, atomically.

        Raises:
            TeacherError: its class names are too long to be read again.
            OSError: it cannot be written.
        """
        content = (self.model_dump_json(indent=2) + "\n").encode()
        if len(content) > _MAX_BYTES:
            raise TeacherError(f"the class names are too long to record: at most {_MAX_BYTES} bytes in all are read")
        write_atomic(folder / MANIFEST, content)

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
            if name != "logits" or self.top_k is None:
                columns[f"{name}.values"] = Column(_file(name), values, shape)
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

    @classmethod
    def _parse(cls, raw: bytes) -> Self:
        fields = json.loads(raw, parse_int=_integer)
        _refuse_bulk(fields)
        # Strict JSON mode is strict about types, yet lets lists become tuples.
        return cls.model_validate_json(json.dumps(fields), strict=True)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for name in self.outputs:
            if not name or printable(name) != name or len(_file(name)) > _MAX_NAME:
                raise ValueError(f"the output name {name!r:.80} is empty, too long or not printable")
        if len(logits := self.outputs.get("logits", ())) != 1:
            raise ValueError("outputs should have logits with one dimension")
        num_classes = logits[0]
        if self.teacher.classes is not None and len(self.teacher.classes) != num_classes:
            raise ValueError(f"there are {len(self.teacher.classes)} class names for {num_classes} logits")
        if self.top_k is not None and self.top_k >= num_classes:
            raise ValueError(f"top_k is {self.top_k} for {num_classes} logits")
        if self.epochs_done > self.epochs:
            raise ValueError(f"{self.epochs_done} epochs are done of {self.epochs}")
        if self.row_bytes > _MAX_ROW_BYTES or self.num_bytes > _MAX_FILE_BYTES:
            raise ValueError(
                f"it has {self.row_bytes} bytes for an image and {self.num_bytes} in all, and at most {_MAX_ROW_BYTES} "
                f"and {_MAX_FILE_BYTES} are possible"
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


def _file(output: str) -> str:
    """A plain file name, whatever the output is called."""
    return f"{quote(output, safe='')}.values.bin"


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
