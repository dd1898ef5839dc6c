"""A student that ends before the others, by an error or early stopping, leaves them as they would be alone."""

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from kd_pipeline.errors import NonFiniteError
from kd_pipeline.training.checkpoint import load_checkpoint
from tests.training import networks, tiny_run
from tests.training.rank_worker import run_ranks
from tests.workflows.student_runs import FACTORY, PLAIN, STUDENTS, alone, assert_same_end, students_settings

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

NAN = {"factory": f"{FACTORY}spoiled"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "reason"),
    [
        ({"factory": f"{FACTORY}failing"}, "OSError: no more"),
        (NAN, "the loss is not finite in epoch 1 at step 2"),
        ({"factory": f"{FACTORY}with_key", "kwargs": {"width": 3}}, "with_key"),
    ],
    ids=["error", "nan", "at the start"],
)
def test_student_that_fails_ends_alone(
    digits: Path, student: dict[str, Any], reason: str, request: pytest.FixtureRequest
) -> None:
    run = f"failing {request.node.callspec.id}"
    students = {"first": {**PLAIN, "train": {"ema": {}}}, "bad": student, "last": {"factory": f"{FACTORY}with_dropout"}}
    config = students_settings(digits, run, students)
    networks.SPOILED.add(2)
    try:
        result = tiny_run.train_without_plots(config)
    finally:
        networks.SPOILED.clear()
    assert {*result.failures} == {"bad"} and reason in result.failures["bad"]
    assert reason.partition(":")[0] in (result.folder / "bad" / "train.log").read_text()
    assert "bad" not in "".join(result.lines[:-1]) and result.lines[-1].startswith("student bad failed: ")
    for name in ("first", "last"):
        folder = digits / f"{run} {name}"
        tiny_run.train_without_plots(alone(config, name, folder))
        assert_same_end(result.folder / name, folder)


@pytest.mark.slow
def test_student_that_stops_early_ends_alone(digits: Path) -> None:
    stopping = {"metric": "val/top1", "patience": 1}
    students = {
        "stopping": {**PLAIN, "train": {"early_stopping": stopping, "optimizer": {"lr": 1e-9}}},
        "other": {"factory": f"{FACTORY}with_dropout"},
    }
    config = students_settings(digits, "early", students, train__epochs=4)
    result = tiny_run.train_without_plots(config)
    for name in students:
        tiny_run.train_without_plots(alone(config, name, digits / f"early {name}"))
        assert_same_end(result.folder / name, digits / f"early {name}")
    steps = [load_checkpoint(result.folder / name / "checkpoints" / "last.ckpt")["global_step"] for name in students]
    assert steps[0] < steps[1] == 24


@pytest.mark.slow
def test_error_of_all_is_raised(digits: Path) -> None:
    networks.SPOILED.add(1)
    try:
        with pytest.raises(NonFiniteError, match="the loss is not finite"):
            tiny_run.train_without_plots(students_settings(digits, "all fail", {"one": NAN, "two": NAN}))
    finally:
        networks.SPOILED.clear()
    assert all("ERROR" in (digits / "all fail" / name / "train.log").read_text() for name in ("one", "two"))
    assert threading.active_count() == 1 or not [each for each in threading.enumerate() if "student" in each.name]


# Ranks


def train_on_ranks(folder: Path, rank: int) -> dict[str, Any]:
    """Students together and alone on this rank, one of which fails."""
    students = {**STUDENTS, "bad": NAN}
    config = students_settings(folder, "ranks", students, data__batch_size=8)
    networks.SPOILED.update({2} if rank == 1 else set())
    result = tiny_run.train_without_plots(config)
    for name in STUDENTS:
        tiny_run.train_without_plots(alone(config, name, folder / f"ranks_{name}"))
    sharded = {name: {**PLAIN, "train": {"optimizer": {"lr": lr}}} for name, lr in (("one", 0.1), ("two", 0.01))}
    config = students_settings(folder, "sharded", sharded, data__batch_size=8, train__strategy="fsdp")
    tiny_run.train_without_plots(config)
    for name in sharded:
        tiny_run.train_without_plots(alone(config, name, folder / f"sharded_{name}"))
    return {"failed": [*result.failures]}


@pytest.mark.slow
def test_ranks_end_as_alone(digits: Path) -> None:
    found = run_ranks(2, digits, train_on_ranks)
    assert [each["failed"] for each in found] == [["bad"]] * 2
    for name in STUDENTS:
        assert_same_end(digits / "ranks" / name, digits / f"ranks_{name}")
    for name in ("one", "two"):
        assert_same_end(digits / "sharded" / name, digits / f"sharded_{name}")


def fail_on_one_rank(folder: Path, rank: int) -> str:
    students = {"bad": {"factory": f"{FACTORY}failing", "kwargs": {"at": 2 if rank else 99}}, "other": PLAIN}
    with mock.patch("kd_pipeline.training.student_outcomes._PATIENCE", timedelta(seconds=2)):
        try:
            tiny_run.train_without_plots(students_settings(folder, "one rank", students, data__batch_size=8))
        except Exception as exc:
            text = f"{type(exc).__name__}: {exc}"
            torch.save(text, folder / f"one rank {rank}.pt")
            os._exit(1)  # as a command would, whose other ranks torchrun then ends
    return ""


@pytest.mark.slow
def test_failure_of_one_rank_ends_all(digits: Path) -> None:
    with pytest.raises(ProcessExitedException):
        run_ranks(2, digits, fail_on_one_rank)
    text = torch.load(digits / "one rank 1.pt", weights_only=True)
    assert text.startswith("StateError: student bad failed on this rank and not on all") and "no more" in text
