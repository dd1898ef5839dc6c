"""How a file list is written, found from its first lines: encoding, delimiter, header and columns."""

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from kd_pipeline._core.suggestions import first_few
from kd_pipeline.data.sources.containers import find_container
from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS
from kd_pipeline.data.sources.files.list_file import ListFile
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage.location import join

__all__ = ["Columns", "ListFormat", "find_columns", "find_format", "find_mask_column", "is_comment", "split_at_space"]

Delimiter = Literal[",", "\t", ";", "|", " ", "\n"]
"""A space stands for any whitespace, and a newline for a list without columns, whose lines are paths as they are."""

_DELIMITERS: tuple[Delimiter, ...] = (",", "\t", ";", "|")
_JSON_ENDINGS = (".jsonl", ".ndjson", ".jsonlines")
_TEXT_ENDINGS = ("", ".csv", ".tsv", ".tab", ".psv", ".txt", ".lst", ".list", ".map")
_HEAD_BYTES = 2**16
_MAX_ROWS = 100
_MAX_ACCESSED = 5
"""Files that are looked for on disk to decide between two readings."""

_PATH_NAMES = frozenset([
    "path", "paths", "file", "files", "filename", "filenames", "filepath", "filepaths", "fname", "fpath", "image",
    "images", "img", "imagepath", "imgpath", "imagefile", "imgfile", "imagefilename", "imgfilename", "imagefilepath",
    "imagename", "imgname", "imageid", "imgid", "imageurl", "fullpath", "abspath", "absolutepath", "relpath",
    "relativepath", "picture", "photo", "uri", "url",
])  # fmt: skip
_LABEL_NAMES = frozenset([
    "label", "labels", "class", "classes", "target", "targets", "category", "categories", "classname", "labelname",
    "categoryname", "targetname", "classid", "labelid", "categoryid", "targetid", "classidx", "labelidx", "targetidx",
    "categoryidx", "classindex", "labelindex", "targetindex", "cls", "clsid", "classlabel", "y",
    "gt", "groundtruth", "truth", "imagelabel", "imageclass", "synset", "synsetid", "wnid", "species", "breed",
])  # fmt: skip
"""Names of columns without case, spaces and signs."""
_COUNTER_NAMES = frozenset(["", "index", "idx", "id", "unnamed0", "no", "nr", "row"])
"""Columns that only count the lines, such as the first one that pandas writes."""
_ENDINGS = "|".join(map(re.escape, EXTENSIONS))
_IMAGE = re.compile(rf".*({_ENDINGS})|[a-z][a-z0-9+.-]*://[^\s?]*({_ENDINGS})\?\S*", re.IGNORECASE | re.DOTALL)
"""A file, or a URL with a query."""
_IMAGE_THEN_LABEL = re.compile(rf"(.+?(?:{_ENDINGS})(?:\?\S*)?)\s+(\S.*)", re.IGNORECASE)
_PATH_LIKE = re.compile(rf".*([/\\].*|({_ENDINGS}|\.(gif|avif|heic|jxl|jfif|tga|svg|dng|npy|txt))$)", re.IGNORECASE)
"""What no name of a column looks like."""
_WORDS = re.compile(r"[^\W\d]+([ -][^\W\d]+)*")
"""Words, with `_` as a letter of them: an expression that can read a text in two ways may take forever on it."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a list are read."""

    names: tuple[str, ...]
    """As the header has them."""
    path: int
    label: int | None
    unused: tuple[int, ...] = ()
    """Columns that are neither read nor known to count the lines."""

    @property
    def description(self) -> str:
        """Where paths and labels are read from."""
        label = "no labels" if self.label is None else f"labels from the column {self.names[self.label]!r:.60}"
        return f"paths from the column {self.names[self.path]!r:.60}, {label}"


@dataclass(frozen=True, slots=True)
class ListFormat:
    """How a list is written."""

    encoding: str
    delimiter: Delimiter | None = None
    """None for JSON lines."""
    columns: Columns | None = None
    """From the header; None without one."""
    mask: str | None = None
    """Name of the column of the masks, if the list has one."""
    is_of_masks: bool = False
    """Whether the masks are read, in place of the images."""


def find_format(
    path: ListFile, root: str, is_file: Callable[[str], bool] = os.path.isfile, mask: str | None = None
) -> ListFormat:
    """The format of a list.

    Args:
        path: the list.
        root: the folder of its relative paths.
        is_file: says whether a path or URL is there.
        mask: name of the column of the masks, if it has one.

    Raises:
        DataError: it is an archive or no text, or its columns may mean more than one thing.
    """
    raw = _read_head(path)
    container = find_container(path.name, raw)
    if container is not None:
        raise DataError(f"{path} is {container.kind}, and a file list is CSV or JSONL text; {container.advice}")
    if path.suffix not in (*_JSON_ENDINGS, *_TEXT_ENDINGS):
        raise DataError(
            f"{path}: a file list is CSV text (.csv, .tsv or .txt) or JSONL (.jsonl), and {path.suffix} is neither; "
            "write one path,label per line into a .csv file"
        )
    encoding = _find_encoding(raw, path)
    text = _first_lines(raw, encoding)
    if path.suffix in _JSON_ENDINGS or text.lstrip().startswith("{"):
        return ListFormat(encoding, mask=mask)

    def exists(name: str) -> bool:
        return is_file(join(root, name))

    head = _Head(text)
    delimiter = _find_delimiter(head, path, exists)
    rows = head.rows(delimiter)
    if not rows or not _is_header(rows, exists):
        if mask is not None:
            raise DataError(f"{path}: the first line does not name the columns; write one such as image,{mask}")
        return ListFormat(encoding, delimiter)
    try:
        return ListFormat(encoding, delimiter, find_columns(rows[0], mask=mask), mask)
    except ValueError as exc:
        raise DataError(f"{path}: the first line looks like a header: {exc}") from None


def find_columns(
    names: Sequence[str], what: Literal["columns", "keys"] = "columns", *, mask: str | None = None
) -> Columns:
    """Which of the columns `names` holds the paths and which the labels; `path` and `label` come before other names.

    Args:
        names: of the header, or the keys of a line of JSON.
        what: how messages call them.
        mask: the one that holds the masks. Labels are not read beside masks.

    Raises:
        ValueError: no column is known to hold paths, two may, labels may be in a column of an unknown name, or there
            are no masks.
    """
    keys = [re.sub(r"[\W_]+", "", name).casefold() for name in names]
    found = f"found the {what} {first_few([f'{name!r:.60}' for name in names])}"
    if mask is not None:
        keys[_column_of(mask, names, found)] = ""
    path = _one_of(keys, "path", _PATH_NAMES, found)
    label = None if mask is not None else _one_of(keys, "label", _LABEL_NAMES, found)
    if path is None:
        raise ValueError(f"{found}, and none is known to hold the paths; name them path and label")
    unused = tuple(
        column for column, key in enumerate(keys) if column not in (path, label) and key not in _COUNTER_NAMES
    )
    if label is None and mask is None and unused:
        raise ValueError(
            f"{found}, and none is known to hold the labels; name that one label, or remove "
            f"{first_few([f'{names[column]!r:.60}' for column in unused])} from a list without labels"
        )
    return Columns(tuple(names), path, label, unused)


def find_mask_column(names: Sequence[str], mask: str) -> Columns:
    """The column `mask` as the one that holds the paths.

    Raises:
        ValueError: there is no such column.
    """
    found = f"found {first_few([f'{name!r:.60}' for name in names])}"
    return Columns(tuple(names), _column_of(mask, names, found), None)


def is_comment(line: str) -> bool:
    """Whether a line starts with `#`, or with `sep=`, which Excel writes to name the delimiter."""
    return line.startswith(("#", "sep="))


def split_at_space(line: str, columns: Columns | None = None) -> list[str]:
    """The cells of a line whose delimiter is whitespace: as many as the header has, else a path and the rest."""
    line = line.strip()
    if columns is not None and (len(columns.names) != 2 or columns.path != 0):
        return line.split(None, 1) if len(columns.names) == 2 else line.split()
    if quoted := re.fullmatch(r'"([^"]+)"(?:\s+(.*))?', line):
        return [cell for cell in quoted.groups() if cell is not None]
    match = _IMAGE_THEN_LABEL.fullmatch(line)
    return list(match.groups()) if match else line.rsplit(None, 1)


def _column_of(mask: str, names: Sequence[str], found: str) -> int:
    columns = [column for column, name in enumerate(names) if name == mask]
    if len(columns) != 1:
        raise ValueError(f"{found}, and {'none' if not columns else 'more than one'} is called {mask!r} (masks.column)")
    return columns[0]


def _one_of(keys: Sequence[str], exact: str, names: frozenset[str], found: str) -> int | None:
    """The column called `exact`, or else the only one whose name is among `names`."""
    for wanted in ({exact}, names):
        columns = [column for column, key in enumerate(keys) if key in wanted]
        if len(columns) > 1:
            raise ValueError(f"{found}, and more than one may be the {exact}; name only the right one {exact}")
        if columns:
            return columns[0]
    return None


def _read_head(path: ListFile) -> bytes:
    try:
        with path.open() as file:
            return file.read(_HEAD_BYTES)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror}); check the path and its permissions") from exc


def _find_encoding(raw: bytes, path: ListFile) -> str:
    if raw.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if 4 * raw.count(b"\0") > len(raw) or raw[:1] == b"\0":
        raise DataError(f"{path}: not UTF-8 text, perhaps UTF-16 without its mark; save the list as UTF-8")
    return "utf-8-sig"  # with or without a byte order mark


def _first_lines(raw: bytes, encoding: str) -> str:
    """The text without the last line, which may be incomplete."""
    text = raw.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "ignore")
    return text.rpartition("\n")[0] if len(raw) == _HEAD_BYTES and "\n" in text else text


class _Head:
    """The first lines of a list, split in any way."""

    def __init__(self, text: str) -> None:
        self._text = text
        lines = (line.strip() for line in io.StringIO(text, newline=None))
        self.lines = list(islice((line for line in lines if line and not is_comment(line)), _MAX_ROWS))
        """Neither empty nor a comment."""

    def rows(self, delimiter: Delimiter) -> list[list[str]]:
        """The cells of each line; wrong quotes are no errors here."""
        if delimiter == "\n":
            return [[line] for line in self.lines]
        if delimiter == " ":
            is_header = bool(self.lines) and _has_path_name(self.lines[0].split())
            rows = [split_at_space(line) for line in self.lines]
            return [self.lines[0].split(), *rows[1:]] if is_header else rows
        reader = csv.reader(io.StringIO(self._text, newline=""), delimiter=delimiter, skipinitialspace=True)
        stripped = ([cell.strip() for cell in row] for row in reader)
        return list(islice((row for row in stripped if any(row) and not is_comment(row[0])), _MAX_ROWS))


def _find_delimiter(head: _Head, path: ListFile, exists: Callable[[str], bool]) -> Delimiter:
    """What separates the columns, by the first rule that decides."""
    lines, words = head.lines, [line.split() for line in head.lines]
    rows_of = {each: head.rows(each) for each in _DELIMITERS}
    rows_of = {each: rows for each, rows in rows_of.items() if 2 * sum(len(row) > 1 for row in rows) >= len(rows) > 0}
    # 1. A header with the name of a column of paths.
    for each, rows in rows_of.items():
        if len(rows[0]) > 1 and _has_path_name(rows[0]):
            return each
    if words and len(words[0]) > 1 and _has_path_name(words[0]):
        return " "
    # 2. Image files in the first column.
    counts: dict[Delimiter, int] = {
        each: sum(len(row) > 1 and _is_image(row[0]) for row in rows) for each, rows in rows_of.items()
    }
    counts[" "] = sum(_is_image_and_label(line) for line in lines)
    best = max(counts, key=counts.__getitem__)
    if lines and 2 * counts[best] >= len(lines):
        return best
    # 3. Lines that are files as they are, whatever is in their names.
    divisible = [line for line in lines if re.search(r"[,\t;| ]", line)]
    if any(map(exists, divisible[:_MAX_ACCESSED])):
        return "\n" if any("," in line for line in lines) else ","
    # 4. Image files in another column: the first one holds labels, or counts the lines.
    for each, rows in rows_of.items():
        if 2 * sum(any(map(_is_image, row[1:])) for row in rows) > len(rows):
            _refuse_order(path, each, rows[-1])
    if words and all(len(row) == 2 and _is_image(row[1]) and (row[0].isdigit() or exists(row[1])) for row in words):
        _refuse_order(path, " ", words[-1])
    # 5. Files without a known extension.
    if rows_of:
        return next(iter(rows_of))
    if words and all(len(row) == 2 and not _is_image(row[1]) for row in words):
        return " "
    return ","


def _is_image(cell: str) -> bool:
    return _IMAGE.fullmatch(cell) is not None


def _is_image_and_label(line: str) -> bool:
    match = _IMAGE_THEN_LABEL.fullmatch(line)
    return match is not None and not _is_image(match[2])


def _refuse_order(path: ListFile, delimiter: Delimiter, row: Sequence[str]) -> None:
    """Raise an error about a list without a header whose first column holds no paths."""
    at = next(column for column, cell in enumerate(row) if column and _is_image(cell))
    others = ["other"] * (len(row) - 2)
    labeled, counted = (
        delimiter.join([first, *rest[: at - 1], "path", *rest[at - 1 :]])
        for first, rest in (("label", others), ("index", ["label", *others][: len(others)]))
    )
    first, image = shown(row[0]), shown(row[at])
    raise DataError(
        f"{path}: column 1 ({first!r:.40}) holds no image files and column {at + 1} ({image!r:.60}) does; write a "
        f"first line that names the columns: {labeled!r} if column 1 is the label, {counted!r} if it counts the lines"
    )


def _has_path_name(cells: Sequence[str]) -> bool:
    """Whether one of the cells names a column of paths, and none is a path."""
    is_named = any(re.sub(r"[\W_]+", "", cell).casefold() in _PATH_NAMES for cell in cells)
    return is_named and not any(map(_PATH_LIKE.fullmatch, cells))


def _is_header(rows: Sequence[Sequence[str]], exists: Callable[[str], bool]) -> bool:
    """Whether the first line names the columns: by its words, or because the lines below hold files and it does not."""
    first, rest = rows[0], rows[1:]
    if _has_path_name(first):
        return True
    if not rest or any(map(_PATH_LIKE.fullmatch, first)) or exists(first[0]):
        return False
    for column in range(len(first)):
        cells = [row[column] for row in rest if len(row) > column]
        if cells and all(map(_is_image, cells)):
            return True
    return _WORDS.fullmatch(first[0]) is not None and all(exists(row[0]) for row in rest[:_MAX_ACCESSED])
