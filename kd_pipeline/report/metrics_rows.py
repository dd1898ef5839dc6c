"""Read `metrics.csv`, which somebody else may have written, by rows or by columns."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from kd_pipeline._core.files import open_regular
from kd_pipeline.errors import DataError
from kd_pipeline.report.csv_lines import lines_of
from kd_pipeline.report.points import Point

__all__ = ["read_columns", "read_metrics"]

_MAX_BYTES = 2**26
"""A row of 20 metrics takes about 250 bytes."""
_MAX_LINE = 2**20
_MAX_CELLS = 10_000_000
"""Most are empty, as each row has the metrics of one kind; looking at them takes some seconds."""
_MAX_NUMBERS = 4_000_000
"""What is held in memory, at less than 100 bytes for each."""
_NUMBERS_OF_ROW = 3
"""A row takes as much memory as these."""


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The step and the metrics of each row; nothing for a row without a step.

    Raises:
        DataError: the file cannot be read, or does not hold the metrics of a run.
    """
    place, num_cells, num_numbers = str(path), 0, 0
    try:
        with open_regular(path, max_bytes=_MAX_BYTES) as file:
            reader = csv.DictReader(lines_of(file, max_bytes=_MAX_LINE))
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                metrics = {name: float(value) for name, value in row.items() if value and name != "step"}
                num_cells += len(row)
                num_numbers += _NUMBERS_OF_ROW + len(metrics)
                if num_cells > _MAX_CELLS or num_numbers > _MAX_NUMBERS:
                    raise ValueError(f"more than {_MAX_NUMBERS} numbers or {_MAX_CELLS} cells")
                if row["step"]:
                    yield int(row["step"]), metrics
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}") from None
    except (csv.Error, KeyError, TypeError, ValueError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise DataError(
            f"{place}: this is not the metrics.csv of a run ({reason}); move the file away, and go on without it"
        ) from None


def read_columns(path: Path, *, max_numbers: int | None = None) -> dict[str, list[Point]]:
    """The finite numbers of each column, with their steps, which ascend.

    Raises:
        DataError: the file cannot be read, does not hold the metrics of a run, or has more than `max_numbers`.
    """
    columns: dict[str, list[Point]] = {}
    number = 0
    for step, metrics in read_metrics(path):
        for name, value in metrics.items():
            if math.isfinite(value):
                columns.setdefault(name, []).append((float(step), value))
                number += 1
        if max_numbers is not None and number > max_numbers:
            raise DataError(f"{path} has more than {max_numbers:,} numbers, and a report shows none of them")
    for points in columns.values():
        points.sort(key=lambda point: point[0])
    return columns
