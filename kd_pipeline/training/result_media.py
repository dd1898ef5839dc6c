"""What loggers get at the end of a stage besides numbers: pictures, confusion matrices and tables of predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from kd_pipeline._core.optional import require
from kd_pipeline._core.text import printable

__all__ = ["Confusion", "LoggedTable", "MediaLogger", "ResultMedia", "log_media"]

_loggers = require("lightning.pytorch.loggers", extra="train")

_MAX_CELLS = 10_000
"""Of a confusion matrix as W&B stores it, a row for each; larger ones are pictures alone."""
_MAX_TEXT_ROWS = 50
"""Of a table in TensorBoard, which has texts only."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """A confusion matrix."""

    counts: Sequence[Sequence[int]]
    """`[K][K]`: rows are labels, columns predictions."""
    classes: Sequence[str]
    """Names of the K classes."""


@dataclass(frozen=True, slots=True)
class LoggedTable:
    """A table with the names of its columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[int | float | str]]


@dataclass(frozen=True, slots=True)
class ResultMedia:
    """All of it by name, such as `confusion_val`."""

    pictures: Mapping[str, Path] = field(default_factory=dict)
    """PNG files."""
    confusions: Mapping[str, Confusion] = field(default_factory=dict)
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)


class MediaLogger(Protocol):
    """Logs one of them by the logger's own means."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG file."""

    def confusion(self, name: str, matrix: Confusion, step: int) -> None:
        """Log a confusion matrix, whose picture is logged too."""

    def table(self, name: str, table: LoggedTable, step: int) -> None:
        """Log a table."""


def log_media(logger: Any, media: ResultMedia, step: int) -> None:
    """Log all of `media` to one of Lightning's loggers, if it takes more than numbers."""
    kinds: tuple[tuple[type, Any], ...] = (
        (_loggers.TensorBoardLogger, _TensorBoardMedia),
        (_loggers.WandbLogger, _WandbMedia),
        (_loggers.CometLogger, _CometMedia),
        (_loggers.MLFlowLogger, _MlflowMedia),
    )
    kind = next((own for lightnings, own in kinds if isinstance(logger, lightnings)), None)
    if kind is None:
        return
    opened: MediaLogger = kind(logger)
    for name, path in media.pictures.items():
        opened.picture(name, path, step)
    for name, matrix in media.confusions.items():
        opened.confusion(name, matrix, step)
    for name, table in media.tables.items():
        opened.table(name, table, step)


class _TensorBoardMedia:
    """Pictures, and a table as text, as TensorBoard has no tables; a confusion matrix is its picture."""

    def __init__(self, logger: Any) -> None:
        self._writer = logger.experiment

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def confusion(self, name: str, matrix: Confusion, step: int) -> None:
        pass

    def table(self, name: str, table: LoggedTable, step: int) -> None:
        lines = [table.columns, ["---"] * len(table.columns), *table.rows[:_MAX_TEXT_ROWS]]
        cells = [[printable(str(cell)).replace("|", "\\|") for cell in line] for line in lines]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)


class _WandbMedia:
    """Pictures, tables, and the chart that W&B has for confusion matrices."""

    def __init__(self, logger: Any) -> None:
        self._wandb, self._run = require("wandb", extra="loggers"), logger.experiment

    def picture(self, name: str, path: Path, step: int) -> None:
        self._log(name, self._wandb.Image(str(path)), step)

    def confusion(self, name: str, matrix: Confusion, step: int) -> None:
        classes = matrix.classes
        if len(classes) ** 2 > _MAX_CELLS:
            return
        # As `wandb.plot.confusion_matrix` does, which takes every sample instead of the counts.
        columns = {name: name for name in ("Actual", "Predicted", "nPredictions")}
        cells = [
            [label, prediction, count]
            for label, counts in zip(classes, matrix.counts, strict=True)
            for prediction, count in zip(classes, counts, strict=True)
        ]
        counted = self._wandb.Table(columns=[*columns], data=cells)
        chart = self._wandb.plot_table("wandb/confusion_matrix/v1", counted, columns, {"title": name})
        self._log(f"{name}_chart", chart, step)

    def table(self, name: str, table: LoggedTable, step: int) -> None:
        self._log(name, self._wandb.Table(columns=[*table.columns], data=[[*row] for row in table.rows]), step)

    def _log(self, name: str, value: Any, step: int) -> None:
        self._run.log({name: value, "trainer/global_step": step})


class _CometMedia:
    """Pictures, tables, and Comet's own confusion matrices."""

    def __init__(self, logger: Any) -> None:
        self._experiment = logger.experiment

    def picture(self, name: str, path: Path, step: int) -> None:
        self._experiment.log_image(str(path), name=name, step=step)

    def confusion(self, name: str, matrix: Confusion, step: int) -> None:
        self._experiment.log_confusion_matrix(
            matrix=[[*counts] for counts in matrix.counts],
            labels=[*matrix.classes],
            title=name,
            file_name=f"{name}.json",
            max_categories=max(25, min(len(matrix.classes), 100)),
            step=step,
        )

    def table(self, name: str, table: LoggedTable, step: int) -> None:
        rows = [[*row] for row in table.rows]
        self._experiment.log_table(f"{name}.csv", tabular_data=rows, headers=[*table.columns])


class _MlflowMedia:
    """Artifacts of the run: pictures, and tables as MLflow's interface shows them."""

    def __init__(self, logger: Any) -> None:
        self._client, self._run = logger.experiment, logger.run_id

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._client.log_image(self._run, np.asarray(image.convert("RGB")), artifact_file=f"pictures/{name}.png")

    def confusion(self, name: str, matrix: Confusion, step: int) -> None:
        content = {"classes": [*matrix.classes], "counts": [[*counts] for counts in matrix.counts]}
        self._client.log_dict(self._run, content, f"{name}.json")

    def table(self, name: str, table: LoggedTable, step: int) -> None:
        columns = {each: [row[at] for row in table.rows] for at, each in enumerate(table.columns)}
        self._client.log_table(self._run, columns, f"{name}.json")
