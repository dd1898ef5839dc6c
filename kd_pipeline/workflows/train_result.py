"""The result of a stage, and the lines that show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.workflows.result_table import result_table, students_table
from kd_pipeline.workflows.stage import Stage

__all__ = ["TrainResult"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The outcome of a stage."""

    stage: Stage
    folder: Path
    evaluations: Mapping[str, Evaluation]
    """Of the exported network, by validation split, and `test` if there is one; empty for several students."""
    students: Mapping[str, "TrainResult"] = field(default_factory=dict)
    """Those of several students, by name, that have reached the end."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why the others have not, by name."""

    @property
    def lines(self) -> tuple[str, ...]:
        """A table of the metrics of the network, and of its teacher, as `kd-pipeline train` prints it.

        For several students it has a row for each, and then a line for each that failed.
        """
        if self.students or self.failures:
            found = {name: each.evaluations for name, each in self.students.items()}
            failed = [f"student {name} failed: {reason}" for name, reason in self.failures.items()]
            return *students_table(found), *failed
        return result_table(self.evaluations, trained="teacher" if self.stage == "teacher" else "student")
