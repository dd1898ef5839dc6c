"""What is where in Parquet files: row groups, labels and columns, read once without images and kept in the cache."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.version import __version__
from kd_pipeline.data.sources.index_file import load_index_file, save_index_file
from kd_pipeline.data.sources.pixels.stored_arrays import check_fits
from kd_pipeline.data.sources.tables.hf_features import Features, features_of_schema
from kd_pipeline.data.sources.tables.parquet_files import ParquetFiles, leaves_of
from kd_pipeline.data.sources.tables.table_columns import Columns, find_columns, join_labels, read_labels
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage import FileStat

__all__ = ["ColumnChoice", "ParquetIndex", "each_in_threads", "open_index"]

_FORMAT_VERSION = 1
"""To be raised whenever what an index holds changes."""
_GROUPS = ("files", "numbers", "rows", "sizes")

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ColumnChoice:
    """What the user said about the columns."""

    image: str | None = None
    label: str | None = None
    labeled: bool = True
    classes: tuple[str, ...] | None = None
    """Class names in label order."""


@dataclass(frozen=True, slots=True)
class ParquetIndex:
    """The row groups of all files, in order, and the labels of all rows."""

    columns: Columns
    files: NDArray[np.int64]
    """`[G]`, the file of each row group."""
    numbers: NDArray[np.int64]
    """`[G]`, its number in the file."""
    rows: NDArray[np.int64]
    """`[G]`, its rows, at least 1."""
    sizes: NDArray[np.int64]
    """`[G]`, bytes of its images in memory."""
    labels: NDArray[np.int64] | None
    """`[N]`."""
    classes: tuple[str, ...] | None
    """Class names in label order."""
    remarks: tuple[str, ...]
    """What looks suspicious about the labels."""


def open_index(
    paths: Sequence[str], stats: Sequence[FileStat], files: ParquetFiles, card: Features, choice: ColumnChoice, num: int
) -> ParquetIndex:
    """The index of Parquet files, from the cache if they are what they were.

    Args:
        paths: the files, from / on or URLs.
        stats: what they are.
        files: reads them.
        card: what the dataset's README.md says about the columns.
        choice: what the user says.
        num: files that are read at the same time.

    Raises:
        DataError: a file is none, has other columns than the first, or its labels are wrong.
        StorageError: a file cannot be read.
    """
    features = [list(card.images), dict(card.class_names)]
    inputs = [__version__, _FORMAT_VERSION, "parquet", list(paths), list(map(list, stats)), features, asdict(choice)]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    index = load_index_file(key, (*_GROUPS, "labels"), _parse, what="Parquet files are indexed again")
    if index is None:
        index = _build(files, card, choice, num)
        _save(key, index)
    return index


def each_in_threads(function: Callable[[S], T], items: Iterable[S], num_threads: int) -> list[T]:
    """What `function` returns for each of `items`; the first error ends it."""
    threads = ThreadPoolExecutor(num_threads, "kd_pipeline-parquet")
    try:
        return list(threads.map(function, items))
    finally:
        threads.shutdown(cancel_futures=True)


def _build(files: ParquetFiles, card: Features, choice: ColumnChoice, num_threads: int) -> ParquetIndex:
    where = list(map(shown, files.paths))
    schema = files.schema(0)
    own = features_of_schema(schema.metadata)
    features = Features(own.images or card.images, own.class_names or card.class_names)
    columns = find_columns(schema, features, where[0], image=choice.image, label=choice.label, labeled=choice.labeled)

    def read(file: int) -> Any:
        footer = files.footer(file)
        groups = _groups_of(footer, columns, where[file], where[0])
        if columns.label is None:
            return groups, None
        labels = read_labels(files.read(file, [columns.label]).column(0), where[file], columns.label)
        if len(labels.codes) != groups[0].sum():
            raise DataError(f"{where[file]}: has {len(labels.codes)} labels for {groups[0].sum()} rows; copy it again")
        return groups, labels

    found = each_in_threads(read, range(len(where)), num_threads)
    rows, sizes, missing = (np.concatenate([groups[part] for groups, _ in found]) for part in range(3))
    counts = [len(groups[0]) for groups, _ in found]
    is_used = rows > 0
    if not is_used.any():
        raise DataError(f"{where[0]}: {'no file has' if len(where) > 1 else 'it has no'} rows")
    # A damaged footer may claim any number.
    check_fits(where[0], 16 * int(rows.sum()), "its footer may be damaged")
    check_fits(where[0], int(sizes.max()), "write smaller row groups, such as row_group_size=100")
    if (missing == rows).all():
        raise DataError(
            f"{where[0]}: no row has an image, as {columns.image_bytes!r} is null in all{_paths_only(columns)}"
        )
    labels, classes = None, choice.classes
    remarks: list[str] = []
    if columns.label is not None:
        labels, classes, remarks = join_labels([part for _, part in found], columns.names, choice.classes)
    return ParquetIndex(
        columns=columns,
        files=np.repeat(np.arange(len(where)), counts)[is_used],
        numbers=np.concatenate([np.arange(count) for count in counts])[is_used],
        rows=rows[is_used],
        sizes=sizes[is_used],
        labels=labels,
        classes=classes,
        remarks=tuple(remarks),
    )


def _paths_only(columns: Columns) -> str:
    if columns.image_path is None:
        return ""
    return (
        "; where there are paths instead, the files are not read: Dataset.to_parquet() writes them into the table, and "
        "kind: file_list reads a list of paths"
    )


def _groups_of(
    footer: Any, columns: Columns, where: str, first: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows, bytes of the images, and rows without an image if that is known, of the row groups of a file."""
    leaves = leaves_of(footer)
    for column in (columns.image_bytes, columns.label):
        if column is not None and column not in leaves:
            raise DataError(
                f"{where}: no column {column!r}, which {first} has; its columns are {', '.join(leaves):.300}. Name "
                "files of one table"
            )
    place = leaves.index(columns.image_bytes)
    rows, sizes, missing = (np.zeros(footer.num_row_groups, np.int64) for _ in range(3))
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunk = group.column(place)
        rows[number], sizes[number] = group.num_rows, chunk.total_uncompressed_size
        if rows[number] < 0 or sizes[number] < 0 or chunk.num_values != group.num_rows:
            raise DataError(f"{where}: the footer says nonsense about row group {number}; copy the file again")
        statistics = chunk.statistics
        missing[number] = statistics.null_count if statistics is not None and statistics.has_null_count else 0
    return rows, sizes, missing


def _save(key: str, index: ParquetIndex) -> None:
    labels = np.empty(0, np.int32) if index.labels is None else index.labels.astype(np.int32)
    header = {
        "columns": asdict(index.columns),
        "is_labeled": index.labels is not None,
        "classes": index.classes,
        "remarks": index.remarks,
    }
    parts = {name: getattr(index, name).data.cast("B") for name in _GROUPS}
    save_index_file(key, header, parts | {"labels": labels.data.cast("B") if len(labels) else b""})


def _parse(header: dict[str, Any], parts: list[memoryview]) -> ParquetIndex:
    """The index in a file of the cache.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    columns, classes = header["columns"], header["classes"]
    names = columns.pop("names")
    files, numbers, rows, sizes = (np.frombuffer(part, np.int64) for part in parts[:-1])
    labels = np.frombuffer(parts[-1], np.int32).astype(np.int64) if header["is_labeled"] else None
    if not len(files) == len(numbers) == len(rows) == len(sizes) or not len(rows) or rows.min() < 1:
        raise ValueError("the row groups are damaged")
    if labels is not None and (len(labels) != rows.sum() or labels.min() < 0):
        raise ValueError("the labels are damaged")
    return ParquetIndex(
        columns=Columns(**columns, names=None if names is None else tuple(names)),
        files=files,
        numbers=numbers,
        rows=rows,
        sizes=sizes,
        labels=labels,
        classes=None if classes is None else tuple(classes),
        remarks=tuple(header["remarks"]),
    )
