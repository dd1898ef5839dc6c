"""The lines of a file list, read in the format that was found: number, path and label of each."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, NamedTuple, TextIO

from kd_pipeline._core.paths import find_url
from kd_pipeline._core.secret_values import hide_in_text
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.data.sources.files.list_file import ListFile
from kd_pipeline.data.sources.files.list_format import (
    Columns,
    ListFormat,
    find_columns,
    find_mask_column,
    is_comment,
    split_at_space,
)
from kd_pipeline.data.sources.files.plain_lines import split_plain
from kd_pipeline.data.sources.labels import MAX_NAME
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage import scheme_of

__all__ = ["Block", "ListRows", "Row", "check_text"]

Row = tuple[int, str, int | str | None]
"""Line number from 1, path, label."""

_BLOCK = 2**17
"""Bytes of lines that are split at once. Where one of them is not plain, all are parsed."""
_FEW_ROWS = 2000
"""Rows in a block of those that are parsed."""
_MAX_ROW = 2**20
"""Characters of a row."""
_MAX_PATH = 4095
"""Bytes of the longest path that Linux opens."""
_MAX_URL = 2**14
"""Characters of a URL; those of signed ones are thousands."""
_MAX_UNUSED = 1000
"""Names of columns that are not read; without a limit they could be as many as there are lines."""
_MAX_KEYS = 20
"""Combinations of keys that are kept, for the same reason; a line may have a megabyte of them."""
_SPLITS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation", "dev"], "val"),
    **dict.fromkeys(["test", "testing"], "test"),
}


class Block(NamedTuple):
    """Samples that follow each other in a list."""

    paths: Sequence[bytes]
    """In the file system's encoding."""
    labels: Sequence[bytes | str | int | None]
    """In UTF-8, or as in a `Row`."""


class ListRows:
    """Iterates over the samples of a list, once.

    Args:
        path: the list.
        form: how it is written.

    Raises:
        DataError: a line is malformed; names file and line.
    """

    def __init__(self, path: ListFile, form: ListFormat) -> None:
        self._path, self._form = path, form
        self._num_comments = 0
        self._unused: dict[str, None] = {}
        self._splits: dict[int, str] = {}
        self._is_header = form.columns is not None
        """Whether the next row is the header."""
        hints = {",": "commas in quotes", " ": "the label after the path", "\n": "the label after the path"}
        self._cells = _Cells(form.columns, hints.get(form.delimiter or "", "see the first lines"))

    def __iter__(self) -> Iterator[Row]:
        try:
            with self._path.open() as file:
                yield from self._rows(file, self._form.encoding)
        except OSError as exc:
            raise self._unreadable(exc) from exc

    def blocks(self) -> Iterator[Block]:
        """The same samples, many at once, and ten times as fast where lines are plain.

        Raises:
            DataError: a line is malformed. Iterate over the rows of another `ListRows` to find out which one.
        """
        if self._form.delimiter in (None, "\n") or self._form.encoding != "utf-8-sig":
            yield from self._parsed(self)
            return
        try:
            with self._path.open() as file:
                encoding = self._form.encoding
                while lines := self._whole_lines(file):
                    plain = self._split(lines)
                    yield from self._parsed(self._rows(io.BytesIO(lines), encoding)) if plain is None else [plain]
                    encoding = "utf-8"  # a mark of the byte order is one only at the start of a file
        except OSError as exc:
            raise self._unreadable(exc) from exc

    def remarks(self) -> list[str]:
        """What was skipped, a sentence each; to be called after the last line."""
        remarks = []
        if self._num_comments:
            remarks.append(f"{self._path}: skipped {self._num_comments} comment line(s)")
        if self._unused:
            remarks.append(f"{self._path}: not read: {first_few(list(self._unused))}")
        return remarks

    def _unreadable(self, exc: OSError) -> DataError:
        return DataError(f"{self._path}: cannot be read ({exc.strerror}); check the path and its permissions")

    def _whole_lines(self, file: BinaryIO) -> bytes:
        lines = file.read(_BLOCK)
        if len(lines) == _BLOCK and not lines.endswith(b"\n"):
            lines += (rest := file.readline(_MAX_ROW))
            if len(rest) == _MAX_ROW:
                raise DataError(f"{self._path}: has a line of more than {_MAX_ROW} bytes")
        return lines

    def _split(self, lines: bytes) -> Block | None:
        """The samples of whole lines if all are plain, and lines above them have shown how many columns there are."""
        if self._is_header or not self._cells.num or len(lines) > _MAX_ROW:
            return None
        cells = split_plain(lines, self._form.delimiter or "", self._cells.num)
        if cells is None:
            return None
        columns = self._form.columns or Columns((), path=0, label=1 if len(cells) > 1 else None)
        for column in columns.unused:
            for value in set(cells[column]):
                self._check_split(column, value.decode())
        paths = cells[columns.path]
        return Block(paths, [None] * len(paths) if columns.label is None else cells[columns.label])

    def _parsed(self, rows: Iterable[Row]) -> Iterator[Block]:
        rows = iter(rows)
        while few := list(islice(rows, _FEW_ROWS)):
            yield Block([os.fsencode(path) for _, path, _ in few], [label for _, _, label in few])

    def _rows(self, file: BinaryIO, encoding: str) -> Iterator[Row]:
        """The rows of a file, or of some whole lines of one."""
        # Bytes that are not UTF-8 pass as surrogates, to let `check_text` report the line.
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        text = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")
        lines = _Lines(text)
        try:
            match self._form.delimiter:
                case None:
                    yield from self._json_rows(lines)
                case " " | "\n":
                    yield from self._plain_rows(lines)
                case delimiter:
                    yield from self._csv_rows(lines, delimiter)
        except _LongRowError as exc:
            raise DataError(f"{self._path}:{lines.number}: {exc}") from None
        except UnicodeError as exc:
            raise DataError(f"{self._path}: not {encoding} text ({exc}); save the list as UTF-8") from exc
        finally:
            text.detach()  # who opened the file closes it

    def _csv_rows(self, lines: "_Lines", delimiter: str) -> Iterator[Row]:
        reader = csv.reader(lines, strict=True, skipinitialspace=True, delimiter=delimiter)
        try:
            for row in reader:
                lines.start_row()
                if row in ([], [""]):
                    continue
                if is_comment(row[0]):
                    self._num_comments += 1
                elif self._is_header:
                    self._is_header = False
                    self._note_unused(self._form.columns)
                else:
                    yield self._row(reader.line_num, row)
        except (csv.Error, ValueError) as exc:
            raise DataError(f"{self._path}:{reader.line_num}: {exc}") from exc

    def _plain_rows(self, lines: "_Lines") -> Iterator[Row]:
        for text in lines:
            lines.start_row()
            line = text.strip()
            if not line:
                continue
            if is_comment(line):
                self._num_comments += 1
            elif self._is_header:
                self._is_header = False
                self._note_unused(self._form.columns)
            else:
                row = [line] if self._form.delimiter == "\n" else split_at_space(line, self._form.columns)
                try:
                    yield self._row(lines.number, row)
                except ValueError as exc:
                    raise DataError(f"{self._path}:{lines.number}: {exc}") from exc

    def _row(self, line: int, row: list[str]) -> Row:
        path, label = self._cells.of(row)
        for column in () if self._form.columns is None else self._form.columns.unused:
            self._check_split(column, row[column])
        return line, check_text(path, "path"), None if label is None else check_text(label, "label")

    def _json_rows(self, lines: "_Lines") -> Iterator[Row]:
        columns_of: dict[tuple[str, ...], Columns] = {}
        for text in lines:
            lines.start_row()
            if not text.strip():
                continue
            try:
                entry = _json_object(text)
                keys = tuple(entry)
                if keys not in columns_of:
                    if len(columns_of) == _MAX_KEYS:
                        columns_of.clear()
                    columns_of[keys] = self._columns_of(keys)
                    self._note_unused(columns_of[keys])
                columns = columns_of[keys]
                for column in columns.unused:
                    self._check_split(column, entry[keys[column]])
                yield lines.number, check_text(entry[keys[columns.path]], "path"), _json_label(entry, columns)
            except (ValueError, RecursionError) as exc:
                raise DataError(f"{self._path}:{lines.number}: {exc}") from exc

    def _columns_of(self, keys: tuple[str, ...]) -> Columns:
        if self._form.mask is not None and self._form.is_of_masks:
            return find_mask_column(keys, self._form.mask)
        return find_columns(keys, "keys", mask=self._form.mask)

    def _note_unused(self, columns: Columns | None) -> None:
        names = () if columns is None else [columns.names[column] for column in columns.unused]
        for name in names:
            if len(self._unused) < _MAX_UNUSED:
                self._unused.setdefault(f"{name!r:.60}")

    def _check_split(self, column: int, value: object) -> None:
        split = _SPLITS.get(value.strip().casefold()) if isinstance(value, str) else None
        if split is not None and self._splits.setdefault(column, split) != split:
            raise ValueError(
                f"found the split {value!r} where lines above have {self._splits[column]!r}: every line of a list "
                "belongs to the same split; write a list for each"
            )


class _LongRowError(Exception):
    """A row has no end, or one that no honest row has; not a ValueError, as it may come from any line's reader."""


class _Lines:
    """The lines of a list, without reading one that has no end."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._left = _MAX_ROW
        self.number = 0
        """Of the line that was read last, from 1."""

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(self._left + 1):
            self.number += 1
            self._left -= len(line)
            if self._left < 0:
                raise _LongRowError(
                    f"a row of more than {_MAX_ROW} characters; write one path and its label per line, and close quotes"
                )
            yield line

    def start_row(self) -> None:
        """Allow the next row its full length; a row of CSV may have several lines, by quotes."""
        self._left = _MAX_ROW


class _Cells:
    """Takes path and label from the cells of a line; without a header the first line decides how many there are."""

    def __init__(self, columns: Columns | None, hint: str) -> None:
        self.columns = columns
        self._hint = hint
        self.num = None if columns is None else len(columns.names)
        """How many a line has; None if no line decided it yet."""

    def of(self, row: list[str]) -> tuple[str, str | None]:
        """Path and label."""
        if self.columns is None:
            while len(row) > (self.num or 2) and not row[-1].strip():
                row = row[:-1]
            self.num = self.num or min(len(row), 2)
        if len(row) != self.num:
            raise ValueError(f"found {len(row)} columns, expected {self.num}: {self._expected(len(row))}")
        if self.columns is None:
            return row[0].rstrip(), row[1].strip() if len(row) == 2 else None
        label = None if self.columns.label is None else row[self.columns.label].strip()
        return row[self.columns.path].rstrip(), label

    def _expected(self, num_found: int) -> str:
        if self.columns is not None:
            return f"{first_few([f'{name!r:.60}' for name in self.columns.names])}; {self._hint}"
        header = ", or a first line that names all columns, such as path,label,other" if num_found > 2 else ""
        return f"path,label or path alone, {self._hint}{header}"


def _json_object(text: str) -> dict[str, object]:
    try:
        entry = json.loads(text)
    except ValueError as exc:
        raise ValueError(f'not JSON ({exc}); write {{"path": "cat/1.jpg", "label": "cat"}} on a line') from exc
    if not isinstance(entry, dict):
        advice = "; write an object on each line" if isinstance(entry, list) else ""
        raise ValueError(
            f"expected an object with the keys path and label, found {hide_in_text(text.strip())!r:.60}{advice}"
        )
    return entry


def _json_label(entry: dict[str, object], columns: Columns) -> int | str | None:
    label = None if columns.label is None else entry[columns.names[columns.label]]
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        advice = "; a sample has one class" if isinstance(label, list | dict) else ""
        if isinstance(label, float) and label.is_integer():
            advice = f"; write {label:.0f}"
        raise ValueError(f"the label {label!r:.60} is neither an integer nor a string{advice}")
    return check_text(label.strip(), "label") if isinstance(label, str) else label


def check_text(value: object, what: str) -> str:
    """`value`, if it is a string that a path or a label can be.

    Raises:
        ValueError: it is empty, no string, not UTF-8, too long, or the URL of a local file.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        advice = "; write one, or remove the line" if value == "" else ""
        raise ValueError(f"the {what} {value!r:.60} is not a string of at least one character{advice}")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(
            f"the {what} {value!r:.60} is not UTF-8; save the list as UTF-8: iconv -f latin1 -t utf8 OLD > NEW"
        ) from None
    scheme = scheme_of(value) if what == "path" and "://" in value else None
    if scheme is not None and num_bytes > _MAX_URL:
        raise ValueError(f"the URL {shown(value)!r:.60}... has {num_bytes} bytes, and at most {_MAX_URL} are read")
    if what == "path" and scheme is None and num_bytes > _MAX_PATH:
        raise ValueError(
            f"the path {value!r:.60}... has {num_bytes} bytes, and no file's path has more than {_MAX_PATH}"
        )
    if what == "label" and len(value) > MAX_NAME:
        raise ValueError(f"the label {value!r:.60}... has {len(value)} characters, and a name has at most {MAX_NAME}")
    if scheme == "file":
        raise ValueError(find_url(value))
    return value
