"""Data for the tiny runs, and runs of several students."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kd_pipeline.config.config import Config
from kd_pipeline.workflows.train_result import TrainResult
from tests.training import tiny_run
from tests.training.conftest import digits
from tests.workflows.student_runs import STUDENTS, alone, students_settings

__all__ = ["digits"]


@pytest.fixture(scope="module")
def trained_students(digits: Path) -> tuple[Config, TrainResult]:
    """A run of three students."""
    config = students_settings(digits, "many", STUDENTS)
    return config, tiny_run.train_without_plots(config)


@pytest.fixture(scope="module")
def student_alone(digits: Path, trained_students: tuple[Config, TrainResult]) -> Callable[[str], Path]:
    """The folder of the run of one of these students alone."""
    found: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in found:
            found[name] = digits / f"alone_{name}"
            tiny_run.train_without_plots(alone(trained_students[0], name, found[name]))
        return found[name]

    return run
