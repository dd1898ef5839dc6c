"""Paths and labels listed in a CSV or JSONL file."""

import csv
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.data.sources.index_cache import ListIndex, index_key, load_index, save_index
from kd_pipeline.data.sources.labels import Classes, class_names, name_warnings
from kd_pipeline.data.sources.paths import FileSource, PathTable
from kd_pipeline.errors import DataError

__all__ = ["FileList"]

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_KINDS = {NoneType: "no label", int: "a class index", str: "a class name"}
_Row = tuple[int, str, int | str | None]
"""Line number from 1, path, label."""


class FileList(FileSource):
    """The paths, and optionally labels, in a `.csv` or `.jsonl` file; the listed files themselves are not accessed.

    A list of a megabyte or more is parsed once and cached in `~/.cache/kd_pipeline/index`.

    CSV has the columns `path,label` or `path`, with or without a header; JSONL has objects with the keys `path` and
    `label`. Either every line has a label or none has. Integers are class indices, strings are class names. In CSV
    everything that reads as an integer is one, so classes named by numbers need JSONL, where `10` and `"10"` differ.

    Args:
        path: the list.
        root: base of relative paths; defaults to the folder of the list.
        classes: names in label order, or a JSON file with them; defaults to the sorted names in the list, if any.

    Raises:
        DataError: the list cannot be read, is empty, or has a malformed line; names file and line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        classes: Classes | None = None,
    ) -> None:
        path = Path(path).expanduser()
        top = os.path.abspath(path.parent if root is None else os.path.expanduser(root))
        names = None if classes is None else class_names(classes)
        key = index_key(path, top, names)
        index = None if key is None else load_index(key, top)
        if index is None:
            index = _parse(path, top, names)
            if key is not None and key == index_key(path, top, names):  # the list was not edited during parsing
                save_index(key, index)
        warnings = name_warnings(index.classes) if index.classes and classes is None else ()
        super().__init__(index.paths, index.labels, index.classes, warnings)


def _parse(path: Path, root: str, names: tuple[str, ...] | None) -> ListIndex:
    paths, labels = PathTable(root), _LabelColumn(names, typed=path.suffix == ".jsonl")
    for line, sample, label in _rows(path):
        try:
            paths.extend([_check_text(sample, "path")])
            labels.add(label)
        except ValueError as exc:
            raise DataError(f"{path}:{line}: {exc}") from exc
    if not len(paths):
        raise DataError(f"{path}: lists no samples; write one path per line")
    return ListIndex(paths, *labels.finish())


class _LabelColumn:
    """Collects the labels of a list line by line; all must be None, all class indices, or all class names."""

    def __init__(self, names: tuple[str, ...] | None, *, typed: bool) -> None:
        self._names, self._typed = names, typed
        self._kind: type | None = None
        self._codes = array("q")
        self._code_of = {name: code for code, name in enumerate(names or ())}
        numbers = (name for code, name in enumerate(names or ()) if _INTEGER.fullmatch(name) and name != str(code))
        self._number_name = next(numbers, None)

    def add(self, label: int | str | None) -> None:
        if isinstance(label, str) and not self._typed and _INTEGER.fullmatch(label):
            label = int(label)
            if self._number_name is not None:
                raise ValueError(
                    f"the label {label} may be a class index or a name, as a class is named {self._number_name!r}; "
                    f'write the list as .jsonl, with {label} for the index and "{label}" for the name'
                )
        self._kind = self._kind or type(label)
        if type(label) is not self._kind:
            raise ValueError(
                f"found {_KINDS[type(label)]} ({label!r}) where the lines above have {_KINDS[self._kind]}; "
                "use the same on every line"
            )
        if isinstance(label, int):
            limit = len(self._names) if self._names else 2**31
            if not 0 <= label < limit:
                raise ValueError(f"the label {label} is not a class index from 0 to {limit - 1}")
            self._codes.append(label)
        elif label is not None:
            if self._names and label not in self._code_of:
                raise ValueError(f"{label!r} is not among the {len(self._names)} classes{suggest(label, self._names)}")
            self._codes.append(self._code_of.setdefault(label, len(self._code_of)))

    def finish(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
        """Labels `[N]` and class names in label order."""
        if self._kind is NoneType:
            return None, self._names
        labels = np.array(self._codes, dtype=np.int64)
        if self._kind is int or self._names:
            return labels, self._names
        names = sorted(self._code_of)
        label_of_code = np.empty(len(names), dtype=np.int64)
        label_of_code[[self._code_of[name] for name in names]] = np.arange(len(names))
        return label_of_code[labels], tuple(names)


def _rows(path: Path) -> Iterator[_Row]:
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix)
    if read is None:
        raise DataError(f"{path}: a file list ends in .csv or .jsonl; rename it to say which one it is")
    try:
        # Bytes that are not UTF-8 pass as surrogates, to let `_check_text` report the line.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from read(file)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror}); check the path and its permissions") from exc


def _csv_rows(file: TextIO) -> Iterator[_Row]:
    reader = csv.reader(file, strict=True, skipinitialspace=True)
    num_columns = None
    try:
        for row in reader:
            if row in ([], [""]):
                continue
            if num_columns is None:
                num_columns = min(len(row), 2)
                if [column.strip().lower() for column in row] == ["path", "label"][:num_columns]:
                    continue
            if len(row) != num_columns:
                raise ValueError(
                    f"found {len(row)} columns, expected {num_columns}: path,label or path alone, commas in quotes"
                )
            yield reader.line_num, row[0], _check_text(row[1].strip(), "label") if num_columns == 2 else None
    except (csv.Error, ValueError) as exc:
        raise DataError(f"{file.name}:{reader.line_num}: {exc}") from exc


def _jsonl_rows(file: TextIO) -> Iterator[_Row]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            yield line, *_json_sample(text)
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{file.name}:{line}: {exc}") from exc


def _json_sample(text: str) -> tuple[str, int | str | None]:
    try:
        entry = json.loads(text)
    except ValueError as exc:
        raise ValueError(f'not JSON ({exc}); write {{"path": "cat/1.jpg", "label": "cat"}}') from exc
    if not isinstance(entry, dict) or "path" not in entry or entry.keys() - {"path", "label"}:
        raise ValueError(f"expected an object with the keys path and label, found {text.strip():.60}")
    label = entry.get("label")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError(f"the label {label!r:.60} is neither an integer nor a string")
    return entry["path"], _check_text(label, "label") if isinstance(label, str) else label


def _check_text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"the {what} {value!r:.60} is not a string of at least one character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {what} {value!r:.60} is not UTF-8; save the list as UTF-8") from None
    return value
