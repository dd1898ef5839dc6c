"""Read `predictions_val.csv`, which somebody else may have written: what student and teacher said of each sample."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kd_pipeline._core.files import open_regular
from kd_pipeline.errors import DataError
from kd_pipeline.report.csv_lines import lines_of

__all__ = ["Answer", "read_answers"]

_MAX_BYTES = 2**27
"""A row takes about 100 bytes."""
_MAX_LINE = 2**15
_MAX_ROWS = 300_000


@dataclass(frozen=True, slots=True)
class Answer:
    """A sample, by the names of classes; empty or None where something is not known."""

    index: int
    """Of the sample in its split."""
    path: str
    label: str
    student: str
    student_probability: float | None
    teacher: str
    teacher_probability: float | None
    loss: float | None
    """Cross-entropy of the student with the label."""

    @property
    def student_is_right(self) -> bool:
        """Whether the student's answer is the label; False without a label."""
        return bool(self.label) and self.student == self.label

    @property
    def teacher_is_right(self) -> bool:
        """Whether the teacher's answer is the label; False without a teacher or a label."""
        return bool(self.label) and self.teacher == self.label


def read_answers(path: Path) -> Iterator[Answer]:
    """The samples in the order of the file.

    Raises:
        DataError: the file cannot be read, or does not hold predictions.
    """
    place = str(path)
    try:
        with open_regular(path, max_bytes=_MAX_BYTES) as file:
            reader = csv.DictReader(lines_of(file, max_bytes=_MAX_LINE))
            for number, row in enumerate(reader):
                place = f"{path}, line {reader.line_num}"
                if number >= _MAX_ROWS:
                    raise ValueError(f"more than {_MAX_ROWS} rows")
                if row["label"] is None or row["student"] is None:
                    raise ValueError("a line that is cut off")
                yield Answer(
                    index=_index(row["index"]),
                    path=row.get("path") or "",
                    label=row["label"],
                    student=row["student"],
                    student_probability=_number(row.get("student_probability")),
                    teacher=row.get("teacher") or "",
                    teacher_probability=_number(row.get("teacher_probability")),
                    loss=_number(row.get("loss")),
                )
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}") from None
    except (csv.Error, KeyError, TypeError, ValueError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise DataError(f"{place}: this does not hold the predictions of a run ({reason})") from None


def _index(text: str) -> int:
    index = int(text)
    if not 0 <= index < 2**53:
        raise ValueError("an index out of range")
    return index


def _number(text: str | None) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None
