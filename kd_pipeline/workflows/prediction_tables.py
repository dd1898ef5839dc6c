"""What the student and the teacher predict for each sample: `predictions_val.csv`, and a picture of the extremes."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.files.paths import FileSource
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation.predictions import COLUMNS, PredictionRow, Predictions, cells, to_csv
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.report.grid import save_samples
from kd_pipeline.training.result_media import Confusion, LoggedTable, ResultMedia

__all__ = ["PredictionTable", "media_of", "prediction_tables", "write_tables"]

_logger = logging.getLogger("kd_pipeline")

_MAX_LOGGED = 10_000
"""Rows of a table that loggers get, as many as W&B takes."""
_PICTURES = ("first_batch.png", "curves.png", "confusion_*.png", "samples_*.png", "predictions_*.png")
"""Those of a run, in the order in which they are logged."""


@dataclass(frozen=True, slots=True)
class PredictionTable:
    """The predictions for the samples of one split, of a classifier and with labels."""

    rows: Sequence[PredictionRow]
    classes: Sequence[str] | None
    """Names in label order."""
    path_of: Callable[[int], str] | None
    """Returns the file of a sample by its index; None if the samples are not in files of their own."""
    hardest: Sequence[tuple[int, Tensor]]
    """The indices and images `[3, H, W]` with the largest loss, the largest first."""
    easiest: Sequence[tuple[int, Tensor]]
    """Those with the smallest loss."""
    transform: Any
    """Of the images; None if it is not known."""

    def logged(self) -> LoggedTable:
        """The rows that loggers get, the largest loss first."""
        hardest = sorted(self.rows, key=lambda row: -row.loss if row.loss == row.loss else -math.inf)[:_MAX_LOGGED]
        return LoggedTable(COLUMNS, [*cells(hardest, self.classes, self.path_of)])


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
            found[split] = PredictionTable(
                rows,
                loader.classes,
                _path_of(loader),
                hardest=collected.hardest,
                easiest=collected.easiest,
                transform=getattr(loader, "transform", None),
            )
    return found


def write_tables(folder: Path, tables: Mapping[str, PredictionTable]) -> None:
    """Write `predictions_<split>.csv` and `samples_<split>.png`; one that cannot be written is a warning."""
    for split, table in tables.items():
        try:
            write_atomic(folder / f"predictions_{split}.csv", _text(table))
            _draw_samples(folder / f"samples_{split}.png", table)
        except (OSError, ConfigError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            _logger.warning("the predictions for %s were not written: %s", split, reason)


def media_of(folder: Path, evaluations: Mapping[str, Evaluation], tables: Mapping[str, PredictionTable]) -> ResultMedia:
    """What loggers get of the files in the folder of a run and of its results."""
    names = [path for pattern in _PICTURES for path in sorted(folder.glob(pattern))]
    confusions = {
        f"confusion_{split}": Confusion(each.confusion, each.classes or [*map(str, range(len(each.confusion)))])
        for split, each in evaluations.items()
        if each.confusion is not None
    }
    return ResultMedia(
        {path.stem: path for path in names},
        confusions,
        {f"predictions_{split}": table.logged() for split, table in tables.items()},
    )


def _draw_samples(path: Path, table: PredictionTable) -> None:
    """Draw the images with the largest loss, then those with the smallest."""
    row_of = {row.index: row for row in table.rows}
    drawn = dict([*table.hardest, *reversed(table.easiest)])  # of a small split, some are both
    chosen = [(index, image) for index, image in drawn.items() if index in row_of]
    if not chosen:
        return
    captions = [_caption(row_of[index], table.classes) for index, _ in chosen]
    save_samples(torch.stack([image for _, image in chosen]), captions, path, transform=table.transform)


def _caption(row: PredictionRow, classes: Sequence[str] | None) -> list[tuple[str, bool | None]]:
    _, _, label, student, student_share, teacher, teacher_share, loss = next(cells([row], classes))
    lines: list[tuple[str, bool | None]] = [(f"{_short(label)}  loss {loss:.3g}", None)]
    for name, top, share in (("student", student, student_share), ("teacher", teacher, teacher_share)):
        if isinstance(share, float):
            lines.append((f"{name} {_short(top)} {share:.0%}", top == label))
    return lines


def _short(name: int | float | str) -> str:
    text = printable(str(name))
    return text if len(text) <= 8 else f"{text[:7]}…"


def _text(table: PredictionTable) -> bytes:
    text = to_csv(table.rows, table.classes, table.path_of)
    return text.encode("utf-8", errors="backslashreplace")  # a path may be no text


def _path_of(loader: AnyLoader) -> Callable[[int], str] | None:
    source = getattr(loader, "source", None)  # of batches of the user's own, there is none
    is_of_files = isinstance(source, FileSource) or getattr(source, "stores", None) == "files"
    return source.name if source is not None and is_of_files else None
