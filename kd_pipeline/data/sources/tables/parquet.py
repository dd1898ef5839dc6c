"""Images in Parquet files, read in place: encoded images in a column, a class in another."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.text import printable
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.containers import user_location
from kd_pipeline.data.sources.encoded import Encoded
from kd_pipeline.data.sources.fingerprint import label_digest, sampling_step
from kd_pipeline.data.sources.labels import Classes, class_names, count_classes, shown_samples
from kd_pipeline.data.sources.masks.masks import Masks, fingerprint_with
from kd_pipeline.data.sources.masks.settings import TableMasks
from kd_pipeline.data.sources.tables.binary_column import BinaryColumn, why_missing
from kd_pipeline.data.sources.tables.dataset_files import find_dataset_files
from kd_pipeline.data.sources.tables.group_cache import GroupCache
from kd_pipeline.data.sources.tables.parquet_files import ParquetFiles
from kd_pipeline.data.sources.tables.parquet_index import ColumnChoice, each_in_threads, open_index
from kd_pipeline.errors import DataError, StorageError, shown
from kd_pipeline.storage import StoreSettings, open_store, scheme_of, stat_all

__all__ = ["Parquet"]

_logger = logging.getLogger("kd_pipeline")

_GIB = 2**30
_VIEWED = 8
"""Images are views where their row groups have less than this part of the memory together, else copies: several groups
of batches are held at once, and a view holds all images of its row group."""
_WINDOW, _FEW = 256, 3
"""Row groups that are read before it is looked at whether that pays off, and images that each should give by then."""
_MIN_ROWS = 8
"""Smaller row groups are as good as single images."""
_PATHS_KEPT = 64
"""Row groups whose paths are kept for messages."""


class Parquet:
    """The images in Parquet files, in the order of the files and of the rows in each.

    The images are bytes, or Hugging Face's structs of bytes and path, as `datasets` writes them. Opening reads the
    footers and the labels, which are kept in `~/.cache/kd_pipeline/index`; a row group is decoded when one of its
    images is needed first, and kept in memory until all its images were read or others need the room.

    Args:
        path: a file, a glob, a range such as `train-{00000..00004}.parquet`, a folder of such files or of a dataset
            repository, or several files; local paths or URLs.
        split: which split of a folder, by its README.md or the names of the files; not needed if there is one.
        image_column: the column of the images; defaults to the one that Hugging Face's metadata says, or the only one
            with bytes.
        label_column: the column of class indices or class names; defaults to the one that Hugging Face's metadata says,
            or else `label`, `labels` or `cls`. Without such a column there are no labels.
        labeled: False reads no labels.
        classes: names in label order, or a file with them; defaults to those in Hugging Face's metadata, or to the
            sorted names if labels are names.
        masks: which column has the masks; labels are not read then, and `classes` are those of the pixels.
        memory: bytes of decoded row groups that are kept.
        storage: how URLs are read.

    Raises:
        DataError: a file is none, a column is missing, several may be meant, or a label is none.
        StorageError: a file is not there or cannot be read. `read` raises it also for a file that has changed.
        MissingPackageError: pyarrow is not installed.
    """

    stores: Literal["files", "bytes", "pixels"] = "bytes"

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        labeled: bool = True,
        classes: Classes | None = None,
        masks: TableMasks | None = None,
        memory: int = _GIB,
        storage: StoreSettings | None = None,
    ) -> None:
        given = _locations(path)
        self._store = open_store(given[0], storage)
        found = find_dataset_files(given, self._store, split)
        paths = [each if scheme_of(each) else os.path.abspath(each) for each in found.paths]
        stats = stat_all(self._store, paths)
        num_bytes, is_remote = sum(stat.num_bytes for stat in stats), scheme_of(paths[0]) is not None
        self._is_kept = is_remote and num_bytes <= (storage or StoreSettings()).cache_bytes
        """Whether whole files are downloaded to the cache, from which they are read in later epochs."""
        if self._is_kept:
            self._store = open_store(given[0], storage, whole=True)
        self._files = ParquetFiles(paths, stats, self._store)
        labeled = labeled and masks is None
        choice = ColumnChoice(image_column, label_column, labeled, None if classes is None else class_names(classes))
        index = open_index(paths, stats, self._files, found.features, choice, self._store.num_threads)
        self._index, self.labels, self.classes = index, index.labels, index.classes
        self.masks: Masks | None = None
        if masks is not None:
            own = Parquet(path, split=split, image_column=masks.column, labeled=False, memory=memory, storage=storage)
            self.masks = Masks(own, masks, classes=self.classes)
        self.num_classes = count_classes(self.labels, self.classes) if self.masks is None else self.masks.num_classes
        self._ends = np.cumsum(np.concatenate([[0], index.rows]))
        """`[G + 1]`, 0 and the end of each row group."""
        self._memory = memory
        self._num_threads = self._store.num_threads if is_remote else min(num_cores(), 8)
        self._groups = GroupCache(self._decode, index.sizes, max_bytes=memory, num_threads=self._num_threads)
        self._num_taken = np.zeros(len(index.rows), np.int64)
        """`[G]`, rows that were read of each row group since it was decoded."""
        self._paths_of = lru_cache(_PATHS_KEPT)(self._read_paths)
        self._where = shown(given[0]) + (f" and {len(given) - 1} more" if len(given) > 1 else "")
        self._num_missed = self._num_read = 0
        self._is_told = False
        self.warnings = tuple(printable(f"{self._where}: {warning}") for warning in self._remarks())
        for warning in self.warnings:
            _logger.warning("%s", warning)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def shard_ends(self) -> NDArray[np.int64]:
        """`[S + 1]`, 0 and the end of each file's samples."""
        last = np.flatnonzero(np.diff(self._index.files, append=-1))
        return np.concatenate([[0], self._ends[last + 1]])

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """The images at `indices` `[n]`, as `Source.read` says."""
        groups = self._group_of(indices)
        rows_of: dict[int, list[int]] = {}
        for place, group in enumerate(groups.tolist()):
            rows_of.setdefault(group, []).append(place)
        is_copied = int(self._index.sizes[list(rows_of)].sum()) * _VIEWED > self._memory
        images: Encoded = [np.empty(0, np.uint8)] * len(indices)
        take = partial(self._take, images, indices, rows_of, is_copied)
        missed = [group for group in rows_of if group not in self._groups]
        for group in rows_of.keys() - missed:
            take(group)
        if len(missed) == 1:
            take(missed[0])
        elif missed:
            each_in_threads(take, missed, min(len(missed), self._num_threads))
        self._notice_rereading(len(missed), len(indices))
        return images

    def expect(self, indices: NDArray[np.int64]) -> None:
        """Decode the row groups of `indices` `[n]` ahead, in the order in which they come, as the memory allows.

        Of remote files that fit into the cache together, download whole files instead.
        """
        groups = list(dict.fromkeys(self._group_of(indices).tolist()))
        if self._is_kept:
            files = dict.fromkeys(self._index.files[groups].tolist())
            self._store.prefetch([self._files.paths[file] for file in files])
        else:
            self._groups.expect(groups)

    def name(self, index: int) -> str:
        """The file and the row in it, and the path that the image had: `train-00000.parquet[17] (n01.jpg)`."""
        group = int(self._group_of(np.array([index]))[0])
        file, row = int(self._index.files[group]), index - int(self.shard_ends[self._shard_of(index)])
        path = self._paths_of(group)[index - int(self._ends[group])] if self._index.columns.image_path else None
        return printable(f"{self._names[file]}[{row}]{f' ({path})' if path else ''}")

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, class names, sizes, and the images of evenly sampled row groups; see `Source.fingerprint`.

        Of large data whole row groups are sampled, as a single image takes as long to read.
        """
        digest = label_digest(self.labels, self.classes)
        digest.update(self._index.rows.astype("<i8").tobytes())
        for group in range(0, len(self._index.rows), sampling_step(int(self._index.sizes.sum()))):
            images = self._decode(group)
            for row in range(len(images)):
                image = images.at(row)
                digest.update((-1 if image is None else len(image)).to_bytes(8, "little", signed=True))
                digest.update(b"" if image is None else image.data)
        return fingerprint_with(digest.hexdigest(), self.masks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_samples('images', self)})"

    def _group_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._ends, indices, side="right") - 1

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.shard_ends, index, side="right")) - 1

    @cached_property
    def _fits(self) -> bool:
        """Whether all row groups can be kept for the next epoch."""
        return int(self._index.sizes.sum()) <= self._memory

    @cached_property
    def _names(self) -> list[str]:
        """Of the files, for messages: without the folder that all are in."""
        paths = [shown(path) for path in self._files.paths]
        first, last = min(paths), max(paths)  # what these have in common, all have
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        start = first.rfind("/", 0, same) + 1
        return [path[start:] for path in paths]

    def _decode(self, group: int) -> BinaryColumn:
        self._num_taken[group] = 0
        columns = [self._index.columns.image_bytes]
        file, number = int(self._index.files[group]), int(self._index.numbers[group])
        images = BinaryColumn(self._files.read(file, columns, number).column(0))
        if len(images) != self._index.rows[group]:
            reason = f"row group {number} has {len(images)} images and not {self._index.rows[group]} as its footer says"
            raise StorageError(self._files.paths[file], f"{reason}; copy the file again")
        return images

    def _read_paths(self, group: int) -> list[str | None]:
        """The paths that the images of a row group had; None for those that cannot be read now."""
        try:
            columns = [str(self._index.columns.image_path)]
            table = self._files.read(int(self._index.files[group]), columns, int(self._index.numbers[group]))
            return [None if row is None else row["path"] for row in table.column(0).to_pylist()]
        except (DataError, UnicodeError):  # the name is for a message about something else
            return [None] * int(self._index.rows[group])

    def _take(
        self, images: Encoded, indices: NDArray[np.int64], rows_of: dict[int, list[int]], is_copied: bool, group: int
    ) -> None:
        """Put the images of a row group into their places in `images`."""
        found, start = self._groups.get(group), int(self._ends[group])
        for place in rows_of[group]:
            image = found.at(int(indices[place]) - start)
            if image is None:
                images[place] = UnreadableFileError(self._why_missing(group, int(indices[place]) - start))
            else:
                images[place] = image.copy() if is_copied else image
        self._num_taken[group] += len(rows_of[group])
        if self._num_taken[group] >= self._index.rows[group] and not self._fits:
            self._groups.drop(group)  # memory that was in use lately is faster than what the system has to provide

    def _why_missing(self, group: int, row: int) -> str:
        path = self._paths_of(group)[row] if self._index.columns.image_path else None
        return why_missing(path, "Dataset.to_parquet() writes them into it")

    def _remarks(self) -> list[str]:
        remarks = list(self._index.remarks)
        largest = int(self._index.sizes.max())
        if largest > self._memory // 2:
            remarks.append(
                f"a row group has {_size(largest)} of images, and memory is {_size(self._memory)}; set memory to at "
                "least four times the former, or write smaller row groups (row_group_size=100)"
            )
        return remarks

    def _notice_rereading(self, num_missed: int, num_read: int) -> None:
        """Warn once if row groups are decoded for a few images each, because others need their room in memory."""
        self._num_missed, self._num_read = self._num_missed + num_missed, self._num_read + num_read
        if self._num_missed < _WINDOW:
            return
        per_group, rows = self._num_read / self._num_missed, len(self) / len(self._index.rows)
        self._num_missed = self._num_read = 0
        if self._is_told or rows < _MIN_ROWS or per_group > _FEW or self._fits:
            return
        self._is_told = True
        total = int(self._index.sizes.sum())
        buffer = max(1, int(self._memory // 2 * len(self) // total))
        _logger.warning(
            "%s: reading is slow, as each row group of %.0f images is decoded for %.1f of them before others need its "
            "room: all images have %s, and memory is %s. Set shuffle: {kind: shards, buffer: %d} or a smaller buffer, "
            "which needs each row group once in an epoch, or raise memory",
            self._where, rows, per_group, _size(total), _size(self._memory), buffer,
        )  # fmt: skip


def _locations(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    paths = [str(user_location(each)) for each in given]
    if not paths:
        raise DataError("path is an empty list; name at least one file")
    other = next((each for each in paths if scheme_of(each) != scheme_of(paths[0])), None)
    if other is not None:
        raise DataError(f"{shown(paths[0])} and {shown(other)} are in different stores; copy all files to one of them")
    return paths


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.3g} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.3g} MiB"
