"""Several students that were stopped resume, each from its own last checkpoint, to the end of an undisturbed run."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kd_pipeline.config.config import Config
from kd_pipeline.training.module import DistillModule
from tests.forks import fork_context
from tests.training import tiny_run
from tests.workflows.student_runs import STUDENTS, assert_same_end, students_settings

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def die_at(step: int) -> None:
    """Kill this process after a step of the student `wide`."""
    end = DistillModule.on_train_batch_end

    def end_or_die(self: DistillModule, outputs: Any, batch: Any, number: int) -> None:
        end(self, outputs, batch, number)
        if threading.current_thread().name == "student wide" and self.trainer.global_step == step:
            os._exit(9)

    DistillModule.on_train_batch_end = end_or_die  # type: ignore[method-assign]


def train_and_die(config: Config, step: int) -> None:
    logging.disable()
    die_at(step)
    tiny_run.train_without_plots(config)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_killed_students_resume_exactly(digits: Path, student_alone: Callable[[str], Path], step: int) -> None:
    config = students_settings(digits, f"killed at {step}", STUDENTS)
    process = fork_context().Process(target=train_and_die, args=(config, step))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert not tiny_run.train_without_plots(config).failures
    for name in STUDENTS:
        assert_same_end(digits / f"killed at {step}" / name, student_alone(name), is_resumed=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_all_students(
    digits: Path, student_alone: Callable[[str], Path], number: signal.Signals, status: int
) -> None:
    config = students_settings(digits, f"signal {status}", STUDENTS)
    end, before = DistillModule.on_train_batch_end, signal.getsignal(number)

    def end_and_kill(self: DistillModule, outputs: Any, batch: Any, index: int) -> None:
        end(self, outputs, batch, index)
        if threading.current_thread().name == "student small" and self.trainer.global_step == 3:
            os.kill(os.getpid(), number)

    with mock.patch.object(DistillModule, "on_train_batch_end", end_and_kill), pytest.raises(SystemExit) as caught:
        tiny_run.train_without_plots(config)
    assert caught.value.code == status and signal.getsignal(number) is before
    assert not tiny_run.train_without_plots(config).failures
    for name in STUDENTS:
        assert_same_end(digits / f"signal {status}" / name, student_alone(name), is_resumed=True)


@pytest.mark.slow
def test_student_that_is_added_later_starts_from_the_beginning(
    digits: Path, student_alone: Callable[[str], Path]
) -> None:
    some = {name: STUDENTS[name] for name in ("small", "plain")}
    tiny_run.train_without_plots(students_settings(digits, "added", some, train__epochs=1))
    tiny_run.train_without_plots(students_settings(digits, "added", STUDENTS))
    assert_same_end(digits / "added" / "wide", student_alone("wide"))
