"""`metrics.csv`: every number of a run, a line for each step that has some, whole again after a restart."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline._core.optional import require

__all__ = ["MetricsFile"]

_lightning = require("lightning.pytorch.loggers", extra="train")
_rank_zero_only = require("lightning.pytorch.utilities", extra="train").rank_zero_only


class MetricsFile(_lightning.Logger):  # type: ignore[misc, name-defined]
    """A logger of Lightning's that keeps one CSV file, with a column for each name and a row for each step.

    A run that goes on from a checkpoint throws away the rows behind it, so that no step is there twice.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._rows: dict[int, dict[str, float]] = {}
        self._columns = ["step"]
        self._is_written = False
        """Whether the file holds the columns and all rows but those of `_new`."""
        self._new: list[int] = []

    @property
    def name(self) -> str:
        """Of this kind of logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def go_on_from(self, step: int) -> None:
        """Take over what the file has up to `step`."""
        if not self._path.is_file():
            return
        with self._path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if row["step"] and int(row["step"]) <= step:
                    found = {name: float(value) for name, value in row.items() if value and name != "step"}
                    self._add(int(row["step"]), found)
        self._is_written = False

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of `step`."""
        self._add(step or 0, {name: float(value) for name, value in metrics.items()})

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The settings are in `config.yaml`."""

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def save(self) -> None:
        """Append what is new, or write all of it where a column is new or an old row has changed."""
        if self._is_written:
            with self._path.open("a", newline="", encoding="utf-8") as stream:
                csv.DictWriter(stream, self._columns).writerows(
                    {"step": step, **self._rows[step]} for step in self._new
                )
        else:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self._rows.items()))
            write_whole(self._path, text.getvalue())
        self._is_written, self._new = True, []

    def finalize(self, status: str) -> None:
        """Write the rest."""
        self.save()

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        columns = [name for name in metrics if name not in self._columns]
        if columns or (step in self._rows and step not in self._new):
            self._is_written = False
        if step not in self._rows:
            self._new.append(step)
        self._columns += columns
        self._rows.setdefault(step, {}).update(metrics)
