"""`metrics.csv`: all metrics of a run, one row per step, consistent after a restart."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import open_own
from kd_pipeline._core.optional import require
from kd_pipeline.errors import StateError
from kd_pipeline.report.metrics_rows import read_metrics

__all__ = ["MetricsFile"]

_lightning = require("lightning.pytorch.loggers", extra="train")
_rank_zero_only = require("lightning.pytorch.utilities", extra="train").rank_zero_only


class MetricsFile(_lightning.Logger):  # type: ignore[misc, name-defined]
    """A Lightning logger that writes one CSV file with a column per metric and a row per step.

    A run that resumes from a checkpoint drops the rows after it, so no step is there twice.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._rows: dict[int, dict[str, float]] = {}
        self._columns = ["step"]
        self._can_append = False
        """Whether the file has all columns, and all rows but those of `_new_steps`."""
        self._new_steps: list[int] = []

    @property
    def name(self) -> str:
        """The name of this logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run has one such file."""
        return ""

    def resume(self, step: int) -> None:
        """Keep the rows of the file up to `step`.

        Raises:
            DataError: the file cannot be read, or is not the metrics of a run.
        """
        if not self._path.exists():
            return
        for each, metrics in read_metrics(self._path):
            if each <= step:
                self._add(each, metrics)
        self._can_append = False

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of `step`."""
        self._add(step or 0, {name: float(value) for name, value in metrics.items()})

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in `config.yaml`."""

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def save(self) -> None:
        """Append the new rows, or rewrite the file if there is a new column or an old row changed.

        Raises:
            StateError: it cannot be written.
        """
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        try:
            if self._can_append:
                writer.writerows({"step": step, **self._rows[step]} for step in self._new_steps)
                with open_own(self._path, "ab", permissions=0o666) as file:
                    file.write(text.getvalue().encode())
            else:
                writer.writeheader()
                writer.writerows({"step": step, **row} for step, row in sorted(self._rows.items()))
                write_atomic(self._path, text.getvalue())
        except OSError as exc:
            raise StateError(f"{self._path} cannot be written: {exc.strerror}") from None
        self._can_append, self._new_steps = True, []

    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        columns = [name for name in metrics if name not in self._columns]
        if columns or (step in self._rows and step not in self._new_steps):
            self._can_append = False
        if step not in self._rows:
            self._new_steps.append(step)
        self._columns += columns
        self._rows.setdefault(step, {}).update(metrics)
