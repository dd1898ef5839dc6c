"""The result of a stage, and the lines that show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.workflows.result_table import result_table
from kd_pipeline.workflows.stage import Stage

__all__ = ["TrainResult"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The outcome of a stage."""

    stage: Stage
    folder: Path
    evaluations: Mapping[str, Evaluation]
    """Of the exported network, by validation split, and `test` if there is one."""

    @property
    def lines(self) -> tuple[str, ...]:
        """A table of the metrics of the network, and of its teacher, as `kd-pipeline train` prints it."""
        return result_table(self.evaluations, trained="teacher" if self.stage == "teacher" else "student")
