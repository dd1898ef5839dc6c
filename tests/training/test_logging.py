"""What a run logs: which metric, at which step, with which value, to which logger."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest

from kd_pipeline.training.throughput import Throughput
from tests.training import networks, tiny_run
from tests.training.tiny_run import logged, run

# Lightning has advice on workers, loggers and the trainer's options; the loggers' packages bring warnings of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


# Metrics and steps

METRICS = {
    *("val/top1", "val/top5", "val/macro_f1", "val/loss", "again/top1", "again/loss"),
    *("val/agreement", "val/kl", "val/logit_mse", "val/probability_l1"),
}


@pytest.fixture(scope="module")
def full(digits: Path) -> Path:
    """A run that logs all there is at every second of its twelve steps."""
    return run(
        digits,
        "full",
        data__more={"again": tiny_run.split(digits, "val", tiny_run.EVAL)},
        distill={
            "temperature": {"start": 4.0, "end": 2.0},
            "distill_weight": 0.5,
            "task_weight": {"start": 0.0, "end": 1.2},
            "features": [{"loss": "logit_mse", "student": "logits", "teacher": "logits", "weight": 0.25}],
        },
        train__log_every_steps=2,
        train__log_gradient_norm=True,
        train__compare_with_teacher=True,
        train__schedule={"kind": "linear"},
    ).folder


@pytest.mark.slow
def test_step_row_explains_loss(full: Path) -> None:
    lines = [row for row in logged(full) if "train/loss" in row]
    assert [row["step"] for row in lines] == [1, 3, 5, 7, 9, 11]
    for row in lines:
        weights = {name.removesuffix("_weight"): value for name, value in row.items() if name.endswith("_weight")}
        assert set(weights) == {"train/task", "train/distill", "train/logit_mse"}
        assert row["train/loss"] == pytest.approx(sum(row[name] * weight for name, weight in weights.items()), rel=1e-5)
        for name, weight in weights.items():
            assert row[f"{name}_share"] == pytest.approx(row[name] * weight / row["train/loss"], rel=1e-5)
        done = row["step"] / 12
        assert row["train/temperature"] == pytest.approx(4 - 2 * done)
        assert weights["train/task"] == pytest.approx(1.2 * done)
        assert row["train/lr"] == pytest.approx(0.05 * (1 - done), rel=1e-5)
        assert row["train/gradient_norm"] > 0
        assert row["train/images_per_s"] > 0
        assert 0 <= row["train/teacher_share"] <= row["train/loader_share"] <= 1
        assert row["train/cpu_cores"] > 0 and 0.05 < row["train/host_memory_gib"] < 128


@pytest.mark.slow
def test_epoch_row_has_all_validation_metrics(full: Path) -> None:
    by_step = {row["step"]: row for row in logged(full)}
    ends = [step for step, row in by_step.items() if "val/top1" in row]
    assert ends == [5, 11]
    for step in ends:
        row = by_step[step]
        assert {"train/top1", "epoch", *METRICS} <= row.keys()
        assert row["val/loss"] == row["again/loss"]
        assert row["epoch"] == step // 6 + 1


@pytest.mark.slow
def test_memory_is_logged_on_gpu_only(full: Path) -> None:
    names = {name for row in logged(full) for name in row}
    assert not {"train/memory_gib", "train/device_memory_gib"} & names


@pytest.mark.slow
def test_best_epoch_matches_result(full: Path) -> None:
    best = max((row for row in logged(full) if "val/top1" in row), key=lambda row: row["val/top1"])
    result = tiny_run.result(full)
    assert best["val/loss"] == pytest.approx(result["val"]["loss"], rel=1e-6)
    assert best["val/agreement"] == pytest.approx(result["val"]["agreement"], rel=1e-6)


@pytest.mark.slow
def test_predictions_are_those_of_the_result(full: Path) -> None:
    """The table has the counts and the mean of `result.json`, student and teacher, and no further files."""
    result = tiny_run.result(full)
    for split in ("val", "again"):
        with (full / f"predictions_{split}.csv").open(newline="", encoding="utf-8") as stream:
            rows = [*csv.DictReader(stream)]
        assert [row["index"] for row in rows] == [str(index) for index in range(tiny_run.NUM_VAL)]
        assert sum(row["student"] == row["label"] for row in rows) / len(rows) == result[split]["top1"]
        assert sum(row["student"] == row["teacher"] for row in rows) / len(rows) == result[split]["agreement"]
        assert sum(row["teacher"] == row["label"] for row in rows) / len(rows) == result[split]["teacher"]["top1"]
        assert sum(float(row["loss"]) for row in rows) / len(rows) == pytest.approx(result[split]["loss"], rel=1e-5)
        assert all(0 < float(row[f"{name}_probability"]) <= 1 for row in rows for name in ("student", "teacher"))
        assert {row["path"] for row in rows} == {""}


# Throughput


@pytest.mark.parametrize(("batch_size", "accumulate", "ahead"), [(16, 1, 0), (16, 1, 2), (8, 2, 1)])
def test_throughput_of_every_row(
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    batch_size: int,
    accumulate: int,
    ahead: int,
) -> None:
    """Without validation, and with the teacher's time in the row of its batch, however far ahead it runs."""
    monkeypatch.setattr("kd_pipeline.training.throughput.time", networks.CLOCK)
    monkeypatch.setattr("kd_pipeline.teachers.base.time", networks.CLOCK)
    caplog.set_level(logging.INFO, "kd_pipeline")
    found = run(
        digits,
        f"speed{accumulate}{ahead}",
        data__batch_size=batch_size,
        data__ahead=ahead,
        student={"factory": "tests.training.networks:timed_student"},
        teacher={"model": {"factory": "tests.training.networks:timed_teacher", "checkpoint": digits / "teacher.pt"}}
        | {"backend": "pytorch"},
        train__accumulate=accumulate,
        train__log_every_steps=2,
        train__compare_with_teacher=True,
    ).folder
    lines = [row for row in logged(found) if "train/images_per_s" in row]
    assert len(lines) == 6
    for row in lines:
        # A batch takes the teacher 3 seconds and the student 1 and 3 in turn; in validation both take 103.
        assert row["train/images_per_s"] == pytest.approx(batch_size / 5)
        assert row["train/loader_share"] == pytest.approx(0.6)
        assert row["train/teacher_share"] == pytest.approx(0.6)
    assert f"trained at {batch_size / 5:.3g} images/s; teacher 60%, loader 0% of the time" in caplog.messages


def test_last_step_of_every_epoch_is_logged(digits: Path) -> None:
    rows = logged(run(digits, "short", train__log_every_steps=4, train__log_gradient_norm=True).folder)
    usual = logged(run(digits, "each step").folder)
    assert [row["step"] for row in rows] == [3, 5, 7, 11]
    for row in rows:
        assert {"train/lr", "train/gradient_norm", "train/images_per_s", "train/loader_share"} <= row.keys()
        assert row["train/loss"] == usual[int(row["step"])]["train/loss"]
    assert [row["step"] for row in rows if "val/top1" in row] == [5, 11]


class TimedTeacher:
    """Counts like a teacher, by hand."""

    num_calls, busy_s = 0, 0.0

    def call(self, seconds: float) -> None:
        self.num_calls, self.busy_s = self.num_calls + 1, self.busy_s + seconds
        networks.CLOCK.now_s += seconds


def test_batches_that_were_ready_belong_to_their_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_pipeline.training.throughput.time", networks.CLOCK)
    teacher: Any = TimedTeacher()
    throughput = Throughput(teacher)
    assert throughput.compute() == throughput.of_run() == {}
    for _ in range(2):  # the loop of an epoch is left after a batch, when a second one was ready
        throughput.start_epoch()
        teacher.call(3.0)
        teacher.call(3.0)
        networks.CLOCK.now_s += 1.0
        throughput.batch_loaded()
        networks.CLOCK.now_s += 1.0
        throughput.batch_trained(10)
        expected = {"images_per_s": 2.0, "loader_share": 0.8, "teacher_share": 0.6}
        assert throughput.now() == pytest.approx(expected)
        assert throughput.compute() == throughput.now() == pytest.approx(expected)
    throughput.batch_loaded()
    networks.CLOCK.now_s += 100.0
    throughput.batch_dropped()
    assert throughput.of_run() == pytest.approx(expected)


def test_batch_that_was_ready_before_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_pipeline.training.throughput.time", networks.CLOCK)
    teacher: Any = TimedTeacher()
    throughput = Throughput(teacher)
    teacher.call(3.0)
    throughput.start_epoch()
    for call_s in (3.0, 0.0):
        if call_s:
            teacher.call(call_s)
        throughput.batch_loaded()
        networks.CLOCK.now_s += 1.0
        throughput.batch_trained(10)
        assert throughput.compute() == {"images_per_s": 2.5, "loader_share": 0.75, "teacher_share": 0.75}
