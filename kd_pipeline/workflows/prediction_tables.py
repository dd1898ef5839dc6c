"""The table of what the student and the teacher predict for each sample of a split: `predictions_val.csv`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline.data.sources.files.paths import FileSource
from kd_pipeline.evaluation.predictions import PredictionRow, Predictions, to_csv
from kd_pipeline.loader.batch_loader import AnyLoader

__all__ = ["PredictionTable", "prediction_tables", "write_tables"]

_logger = logging.getLogger("kd_pipeline")


@dataclass(frozen=True, slots=True)
class PredictionTable:
    """The predictions for the samples of one split, of a classifier and with labels."""

    rows: Sequence[PredictionRow]
    classes: Sequence[str] | None
    """Names in label order."""
    path_of: Callable[[int], str] | None
    """Returns the file of a sample by its index; None if the samples are not in files of their own."""


def prediction_tables(
    predictions: Mapping[str, Predictions], open_loader: Callable[[str], AnyLoader]
) -> dict[str, PredictionTable]:
    """The tables by split, of all ranks; call it on all of them."""
    found = {}
    for split, collected in predictions.items():
        if split == "train":  # some of its images may be evaluated for the features' sake
            continue
        loader = open_loader(split)
        if loader.shard.world_size > 1:
            collected.gather()
        if rows := collected.rows():
            found[split] = PredictionTable(rows, loader.classes, _path_of(loader))
    return found


def write_tables(folder: Path, tables: Mapping[str, PredictionTable]) -> None:
    """Write `predictions_<split>.csv`; one that cannot be written is a warning."""
    for split, table in tables.items():
        try:
            write_atomic(folder / f"predictions_{split}.csv", _text(table))
        except OSError as exc:
            _logger.warning("predictions_%s.csv was not written: %s", split, exc.strerror or exc)


def _text(table: PredictionTable) -> bytes:
    text = to_csv(table.rows, table.classes, table.path_of)
    return text.encode("utf-8", errors="backslashreplace")  # a path may be no text


def _path_of(loader: AnyLoader) -> Callable[[int], str] | None:
    source = getattr(loader, "source", None)  # of batches of the user's own, there is none
    is_of_files = isinstance(source, FileSource) or getattr(source, "stores", None) == "files"
    return source.name if source is not None and is_of_files else None
