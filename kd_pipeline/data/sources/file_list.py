"""Paths and labels that a CSV or JSONL file lists."""

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
from kd_pipeline.data.sources.index_cache import Index, index_key, load_index, save_index
from kd_pipeline.data.sources.labels import Classes, class_names, odd_names
from kd_pipeline.data.sources.paths import FileSource, Paths
from kd_pipeline.errors import DataError

__all__ = ["FileList"]

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_KINDS = {NoneType: "no label", int: "a class index", str: "a class name"}
_Row = tuple[int, str, int | str | None]
"""Line number from 1, path, label."""


class FileList(FileSource):
    """The paths, and maybe labels, that a `.csv` or `.jsonl` file lists; the files themselves are not looked at.

    A list of a megabyte or more is parsed once, and kept in `~/.cache/kd_pipeline/index` for the next time.

    CSV has the columns `path,label` or `path`, with or without that line at the top; JSONL has objects with the keys
    `path` and `label`. Either all lines have a label or none has. Integers are class indices, texts are class names; in
    CSV whatever reads as an integer is one, so classes named by numbers need JSONL, where `10` and `"10"` differ.

    Args:
        path: the list.
        root: what relative paths are relative to; the folder of the list where None.
        classes: names in label order, or a JSON file that lists them; where None and labels are names, those, sorted.

    Raises:
        DataError: the list cannot be read, is empty, or has a line that does not fit; names file and line.
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
        index = None if key is None else load_index(key)
        if index is None:
            index = _parsed(path, top, names)
            if key is not None and key == index_key(path, top, names):  # nobody has written to the list meanwhile
                save_index(key, index)
        reports = odd_names(index.classes) if index.classes and classes is None else ()
        super().__init__(Paths(top, index.blob, index.ends), index.labels, index.classes, reports)


def _parsed(path: Path, root: str, names: tuple[str, ...] | None) -> Index:
    """What the list says, line by line."""
    paths, labels = Paths(root), _ListedLabels(names, typed=path.suffix == ".jsonl")
    for line, sample, label in _listed(path):
        try:
            paths.extend([_checked_text(sample, "path")])
            labels.add(label)
        except ValueError as exc:
            raise DataError(f"{path}:{line}: {exc}") from exc
    if not len(paths):
        raise DataError(f"{path}: lists no samples; write one path per line")
    return Index(paths.blob, paths.ends, *labels.finish())


class _ListedLabels:
    """Collects the labels of a list line by line: none, class indices, or class names; never a mixture."""

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
        order = sorted(self._code_of)
        label_of_code = np.empty(len(order), dtype=np.int64)
        label_of_code[[self._code_of[name] for name in order]] = np.arange(len(order))
        return label_of_code[labels], tuple(order)


def _listed(path: Path) -> Iterator[_Row]:
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix)
    if rows is None:
        raise DataError(f"{path}: a list of files ends in .csv or .jsonl; rename it to say which of them it is")
    try:
        # Bytes that are not UTF-8 pass as surrogates, so that `_checked_text` can tell the line they are in.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from rows(file)
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
            yield reader.line_num, row[0], _checked_text(row[1].strip(), "label") if num_columns == 2 else None
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
        raise ValueError(f"the label {label!r:.60} is neither an integer nor a text")
    return entry["path"], _checked_text(label, "label") if isinstance(label, str) else label


def _checked_text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"the {what} {value!r:.60} is not a text of at least one character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {what} {value!r:.60} is not UTF-8; save the list as UTF-8") from None
    return value
