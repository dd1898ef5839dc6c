"""Parquet files in a store: their footers, and columns of their row groups, whose chunks are read at once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any

import numpy as np

from kd_pipeline._core.optional import require
from kd_pipeline.data.sources.containers import find_container
from kd_pipeline.data.sources.tables.group_cache import GroupCache
from kd_pipeline.errors import DataError, StorageError, shown
from kd_pipeline.storage import ByteRange, FileStat, Store, read_ranges, scheme_of

__all__ = ["ParquetFiles", "leaves_of"]

_MAX_FOOTERS = 256
"""Footers that are kept; each may have thousands of column chunks."""


class ParquetFiles:
    """Reads columns of Parquet files, from any thread.

    Args:
        paths: the files.
        stats: what they were when they were found; a file that has changed since is an error.
        store: reads them.
    """

    def __init__(self, paths: Sequence[str], stats: Sequence[FileStat], store: Store) -> None:
        self.paths, self._stats, self._store = paths, stats, store
        sizes = np.ones(len(paths), np.int64)
        self._footers = GroupCache(self._read_footer, sizes, max_bytes=_MAX_FOOTERS, num_threads=1)

    def footer(self, file: int) -> Any:
        """The `pyarrow.parquet.FileMetaData` of a file.

        Raises:
            DataError: it is no Parquet file, or was cut off.
            StorageError: it cannot be read, or has changed.
        """
        return self._footers.get(file)

    def schema(self, file: int) -> Any:
        """The `pyarrow.Schema` of a file.

        Raises:
            DataError: it is none.
        """
        footer = self.footer(file)
        try:
            schema = footer.schema.to_arrow_schema()
            str(schema)  # names that are no text are an error only when they are looked at
            return schema
        except Exception as exc:  # Arrow raises several kinds of errors on damaged files
            raise DataError(
                f"{shown(self.paths[file])}: the columns of this Parquet file cannot be read ({_first_line(exc)}); "
                "copy it again"
            ) from exc

    def read(self, file: int, columns: Sequence[str], group: int | None = None) -> Any:
        """The columns of row group `group` of a file, or of the whole file, as a `pyarrow.Table`.

        Raises:
            StorageError: they cannot be read, are damaged, or the file has changed.
        """
        parquet = require("pyarrow.parquet", extra="parquet")
        footer = self.footer(file)
        # The system caches local files, which are compared here as they might be written in place.
        if scheme_of(self.paths[file]) is None:
            self._refuse_changed(file)
        groups = range(footer.num_row_groups) if group is None else (group,)
        ranges = [
            ByteRange(self.paths[file], start, length, self._stats[file])
            for start, length in _chunks_of(footer, columns, groups)
        ]
        chunks: dict[int, bytes] = {}
        for wanted, content in zip(ranges, read_ranges(self._store, ranges), strict=True):
            if isinstance(content, StorageError):
                raise content
            chunks[wanted.start] = content
        with self._damage_named(file, group), self._open(file, chunks) as source:
            opened = parquet.ParquetFile(source, metadata=footer, pre_buffer=False, page_checksum_verification=True)
            return opened.read_row_groups(list(groups), columns=list(columns), use_threads=False)

    def _read_footer(self, file: int) -> Any:
        parquet = require("pyarrow.parquet", extra="parquet")
        path = self.paths[file]
        try:
            with self._open(file) as source:
                footer = parquet.read_metadata(source)
            _check_chunks(footer, self._stats[file].num_bytes)
            return footer
        except StorageError:
            raise
        except Exception as exc:  # Arrow raises several kinds of errors on damaged files
            self._refuse_changed(file)
            container = find_container("", self._head(file))  # what it is by its name is known
            what = "" if container is None or self._head(file).startswith(b"PAR1") else f"; it is {container.kind}"
            raise DataError(
                f"{shown(path)}: cannot be read as a Parquet file ({_first_line(exc)}){what}; if it was cut off, copy "
                "it again"
            ) from exc

    def _head(self, file: int) -> bytes:
        return self._store.read(self.paths[file], 0, min(512, self._stats[file].num_bytes))

    @contextmanager
    def _open(self, file: int, chunks: Mapping[int, bytes] | None = None) -> Iterator[Any]:
        pa = require("pyarrow", extra="parquet")
        stored = _StoredFile(self._store, self.paths[file], self._stats[file], chunks or {})
        with pa.PythonFile(stored, mode="r") as source:
            yield source

    @contextmanager
    def _damage_named(self, file: int, group: int | None) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as exc:  # Arrow raises several kinds of errors on damaged files
            self._refuse_changed(file)
            where = "" if group is None else f"row group {group} "
            raise StorageError(
                self.paths[file], f"{where}cannot be decoded ({_first_line(exc)}); copy the file again"
            ) from exc

    def _refuse_changed(self, file: int) -> None:
        found, expected = self._store.stat(self.paths[file]), self._stats[file]
        if found != expected:
            was, now = expected.num_bytes, found.num_bytes
            what = f"{was} bytes then, {now} now" if was != now else "its time or version is another"
            raise StorageError(
                self.paths[file],
                f"it has changed since it was opened ({what}); put the old file back, or start again",
            )


def leaves_of(footer: Any) -> list[str]:
    """The columns that hold values in a file with this footer, such as `image.bytes`."""
    return [footer.schema.column(number).path for number in range(len(footer.schema))]


def _check_chunks(footer: Any, num_bytes: int) -> None:
    """Raise an error if what the footer of a file of `num_bytes` says about a column chunk is damaged.

    Arrow's reader does so, but where Python asks for such a chunk, Arrow ends the process. So the reader is asked
    first, with nothing to read from.
    """
    pa, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
    with pa.PythonFile(_NoFile(num_bytes), mode="r") as source:
        opened = parquet.ParquetFile(source, metadata=footer, pre_buffer=True)
        try:
            opened.read_row_groups(range(footer.num_row_groups), use_threads=False)
        except _NothingThereError as exc:
            # Arrow keeps the error, whose frames keep Arrow's reader and all that their callers hold.
            clear_frames(exc.__traceback__)
        finally:
            del opened


class _NothingThereError(Exception):
    pass


class _NoFile:
    """What `pyarrow.PythonFile` reads nothing from, although it has a size."""

    closed = False

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def read(self, num_bytes: int = -1) -> bytes:
        raise _NothingThereError

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing is open."""


class _StoredFile:
    """What `pyarrow.PythonFile` reads from: the chunks that were read, by offset, or a range of the store."""

    closed = False

    def __init__(self, store: Store, path: str, stat: FileStat, chunks: Mapping[int, bytes]) -> None:
        self._store, self._path, self._stat, self._chunks = store, path, stat, chunks
        self._position = 0

    def read(self, num_bytes: int = -1) -> bytes:
        left = self._stat.num_bytes - self._position
        length = left if num_bytes < 0 else max(0, min(num_bytes, left))
        content = self._chunks.get(self._position) if length else b""
        if content is None or len(content) != length:
            content = self._store.read(self._path, self._position, length, expected=self._stat)
        self._position += length
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._stat.num_bytes)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing is open."""


def _chunks_of(footer: Any, columns: Sequence[str], groups: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Start and length of the column chunks that hold `columns`, or fields of them."""
    places = [
        place
        for place, leaf in enumerate(leaves_of(footer))
        if any(leaf == column or leaf.startswith(f"{column}.") for column in columns)
    ]
    for group in groups:
        for place in places:
            chunk = footer.row_group(group).column(place)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            yield start, chunk.total_compressed_size


def _first_line(exc: Exception) -> str:
    return f"{str(exc).strip().partition(chr(10))[0] or type(exc).__name__:.200}"
