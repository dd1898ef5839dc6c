"""Datasets of Hugging Face's `datasets`, read from their memory-mapped Arrow files without decoding by Pillow."""

import logging
import os
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.mapped_memory import page_in, page_in_later
from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.containers import user_location
from kd_pipeline.data.sources.encoded import Encoded, fingerprint_of_bytes
from kd_pipeline.data.sources.labels import Classes, class_names, count_classes, shown_samples
from kd_pipeline.data.sources.masks.masks import Masks, fingerprint_with
from kd_pipeline.data.sources.masks.settings import TableMasks
from kd_pipeline.data.sources.tables.binary_column import BinaryColumn, why_missing
from kd_pipeline.data.sources.tables.hf_features import Features
from kd_pipeline.data.sources.tables.table_columns import find_columns, join_labels, read_labels
from kd_pipeline.errors import DataError, StorageError
from kd_pipeline.storage import scheme_of
from kd_pipeline.storage.parallel import run_in_thread

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["HuggingFace"]

_logger = logging.getLogger("kd_pipeline")

_ADVICE = "Dataset.save_to_disk() writes them into its own files"
_HUB = "hf://datasets/"


class HuggingFace:
    """A dataset that `datasets` opens: a folder of `Dataset.save_to_disk`, of a repository, or a name on the Hub.

    Nothing is copied: images are views of the memory-mapped Arrow files. A dataset that is not in Arrow files yet is
    converted by `datasets` into its own cache, at first; code of a dataset never runs.

    Args:
        path: the folder, or the name of a repository such as `me/flowers`, which `datasets` downloads; or a
            `datasets.Dataset`, whose selection and order of rows are kept.
        name: which configuration of the dataset, if it has several.
        split: such as `train`, or `train[:10%]`; not needed if there is one.
        revision: commit, tag or branch of a repository on the Hub.
        image_column: the column of the images; defaults to the one of type `Image`, or the only one with bytes.
        label_column: the column of class indices or class names; defaults to the one of type `ClassLabel`, or else
            `label`, `labels` or `cls`. Without such a column there are no labels.
        labeled: False reads no labels.
        classes: names in label order, or a file with them; defaults to those of the `ClassLabel`, or to the sorted
            names if labels are names.
        masks: which column has the masks; labels are not read then, and `classes` are those of the pixels.

    Raises:
        DataError: `datasets` cannot load it, a column is missing, several may be meant, or a label is none.
        MissingPackageError: `datasets` is not installed.
    """

    stores: Literal["files", "bytes", "pixels"] = "bytes"

    def __init__(
        self,
        path: "str | os.PathLike[str] | Dataset",
        *,
        name: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        labeled: bool = True,
        classes: Classes | None = None,
        masks: TableMasks | None = None,
    ) -> None:
        if isinstance(path, str | os.PathLike):
            dataset, self._where = _load(path, name, split, revision)
        else:
            dataset, self._where = path, str(path.split or "dataset")
        if not len(dataset):
            raise DataError(f"{self._where}: the dataset has no rows")
        self._table = dataset.data.table
        self._rows = _rows_of(dataset)
        columns = find_columns(
            self._table.schema,
            _features_of(dataset),
            self._where,
            image=image_column,
            label=label_column,
            labeled=labeled and masks is None,
        )
        self._columns, self._images = columns, BinaryColumn(self._table.column(columns.image))
        if self._images.num_missing == len(self._images):
            raise DataError(
                f"{self._where}: no row has an image in the column {columns.image!r}; where there are paths instead, "
                f"the files are not read: {_ADVICE}, and kind: image_folder reads folders of images"
            )
        names = None if classes is None else class_names(classes)
        self.labels, self.classes, found = None, names, list[str]()
        if columns.label is not None:
            part = read_labels(self._table.column(columns.label), self._where, columns.label, rows=self._rows)
            self.labels, self.classes, found = join_labels([part], columns.names, names)
        self.masks: Masks | None = None
        if masks is not None:
            own = HuggingFace(dataset, image_column=masks.column, labeled=False)
            self.masks = Masks(own, masks, classes=self.classes)
        self.num_classes = count_classes(self.labels, self.classes) if self.masks is None else self.masks.num_classes
        self.warnings = tuple(printable(f"{self._where}: {warning}") for warning in found)
        for warning in self.warnings:
            _logger.warning("%s", warning)

    def __len__(self) -> int:
        return len(self._images) if self._rows is None else len(self._rows)

    @property
    def shard_ends(self) -> NDArray[np.int64] | None:
        """`[S + 1]`, 0 and the end of each batch of rows in the Arrow files; None for a selection of rows."""
        return self._images.chunk_ends if self._rows is None else None

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """The images at `indices` `[n]`, as `Source.read` says, in memory by then.

        Raises:
            StorageError: an Arrow file was cut off, or its disk fails.
        """
        rows = self._rows_at(indices)
        found = [self._images.at(row) for row in rows]
        there = [place for place, image in enumerate(found) if image is not None]
        failed = page_in([image for image in found if image is not None])
        if failed is not None:
            raise StorageError(
                self._where, "an Arrow file was cut off, or its disk fails", key=int(indices[there[failed]])
            )
        return [
            UnreadableFileError(why_missing(self._path_at(row), _ADVICE)) if image is None else image
            for row, image in zip(rows, found, strict=True)
        ]

    def expect(self, indices: NDArray[np.int64]) -> None:
        """Let the system read the images at `indices` `[n]` ahead."""
        found = [self._images.at(row) for row in self._rows_at(indices)]
        run_in_thread(partial(page_in_later, [image for image in found if image is not None]))

    def name(self, index: int) -> str:
        """The dataset and the row in it, and the path that the image had: `flowers[17] (n01.jpg)`."""
        path = self._path_at(self._rows_at(np.array([index]))[0])
        return printable(f"{self._where}[{index}]{f' ({path})' if path else ''}")

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, class names and evenly sampled images; see `Source.fingerprint`."""
        return fingerprint_with(fingerprint_of_bytes(self), self.masks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_samples('images', self)})"

    def _rows_at(self, indices: NDArray[np.int64]) -> list[int]:
        """The rows of the table at `indices` `[n]`."""
        rows: list[int] = (indices if self._rows is None else self._rows[indices]).tolist()
        return rows

    def _path_at(self, row: int) -> str | None:
        """The path that the image in a row of the table had."""
        if self._columns.image_path is None:
            return None
        image = self._table.column(self._columns.image)[row]
        try:
            return image["path"].as_py() if image.is_valid else None
        except UnicodeError:  # the name is for a message about something else
            return None


def _load(path: str | os.PathLike[str], name: str | None, split: str | None, revision: str | None) -> tuple[Any, str]:
    """The dataset, and its name for messages."""
    datasets = require("datasets", extra="datasets")
    written = os.fspath(path).removeprefix(_HUB)
    if (scheme := scheme_of(written)) is not None:
        raise DataError(f"datasets are not read from {scheme}:// URLs; take kind: parquet for Parquet files there")
    local = Path(user_location(written))
    if not local.exists() and (local.is_absolute() or written.startswith((".", "~")) or written.count("/") > 1):
        raise DataError(f"{local}: no such folder")
    where = f"{local.name or local}{f'/{split}' if split else ''}"
    try:
        if local.is_dir() and (local / "dataset_dict.json").exists():
            splits = sorted(folder.name for folder in local.iterdir() if (folder / "state.json").exists())
            return datasets.load_from_disk(str(local / _chosen(splits, split, str(local)))), where
        if local.is_dir() and (local / "state.json").exists():
            if split is not None:
                raise DataError(f"{local}: this is one split alone; leave out split")
            return datasets.load_from_disk(str(local)), where
        source = str(local) if local.exists() else written
        builder = datasets.load_dataset_builder(source, name, revision=revision)
        splits = list(builder.info.splits or builder.config.data_files or ())
        if split is None:
            split = _chosen(splits, split, source)
        return datasets.load_dataset(source, name, split=split, revision=revision), where
    except DataError:
        raise
    except Exception as exc:  # every package that datasets uses has its own errors
        reason = str(exc).strip().partition("\n")[0] or type(exc).__name__
        raise DataError(
            f"{written}: datasets cannot load it ({reason:.300}); check path, name, split and revision"
        ) from exc


def _chosen(splits: list[str], split: str | None, where: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise DataError(f"{where}: has the splits {first_few(splits)}; set split to one of them")
    if split not in splits:
        raise DataError(f"{where}: has no split {split!r}{suggest(split, splits)}; it has {first_few(splits)}")
    return split


def _rows_of(dataset: Any) -> NDArray[np.int64] | None:
    """The rows of the table that are the dataset, `[N]`, after `select`, `shuffle` and the like; None for all."""
    mapping = dataset._indices
    return None if mapping is None else np.asarray(mapping.column(0)).astype(np.int64)


def _features_of(dataset: Any) -> Features:
    datasets = require("datasets", extra="datasets")
    features = dataset.features
    return Features(
        images=tuple(column for column, feature in features.items() if isinstance(feature, datasets.Image)),
        class_names={
            column: tuple(feature.names)
            for column, feature in features.items()
            if isinstance(feature, datasets.ClassLabel)
        },
    )
