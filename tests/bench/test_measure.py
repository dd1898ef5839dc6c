import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event

import numpy as np
import pytest
import torch

from kd_pipeline.bench import measure as room
from kd_pipeline.bench.measure import BenchResult, BenchRow, Contender, environment, measure

ROWS = (
    BenchRow("ours", (100.0, 50.0, 400.0), (0.010, 0.020, 0.012), (2**30, 2**29, 2**30 + 3 * 2**20), (0.5, 0.6, 0.9)),
    BenchRow("theirs", (50.0, 20.0, 100.0), (0.030, 0.020, 0.040), (2**30, 2**29, 2**30 - 2**20), (0.1, 0.2, 0.7)),
)
RESULT = BenchResult(ROWS, {"batch_size": 8, "device": "cpu"}, environment())


class Stream:
    """Counts its batches of 3 images, on a clock that only it moves."""

    def __init__(self, name: str, seconds_per_batch: float, calls: list[tuple[str, int]], clock: list[float]) -> None:
        self.name, self.seconds_per_batch, self.calls, self.clock = name, seconds_per_batch, calls, clock

    def __call__(self, num_batches: int) -> int:
        self.calls.append((self.name, num_batches))
        self.clock[0] += num_batches * self.seconds_per_batch
        return 3 * num_batches


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def pauses() -> list[int]:
    """How many calls there were before each look at who still works."""
    return []


@pytest.fixture
def measured(
    calls: list[tuple[str, int]], pauses: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[BenchResult, list[str]]:
    """Three contenders of 0.5, 1 and 0.25 s a batch in four repeats, and the lines of progress."""
    clock = [0.0]
    monkeypatch.setattr(room.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(room, "_cpu_s", lambda: 2 * clock[0])
    monkeypatch.setattr(room.time, "thread_time", lambda: clock[0] / 4)
    monkeypatch.setattr(room.time, "sleep", lambda seconds: pauses.append(len(calls)))
    lines: list[str] = []
    contenders = [
        Contender(name, Stream(name, seconds, calls, clock)) for name, seconds in [("a", 0.5), ("b", 1.0), ("c", 0.25)]
    ]
    result = measure(contenders, repeats=4, num_batches=10, num_warm_up=2, settings={"size": 7}, report=lines.append)
    return result, lines


def test_images_per_second_are_those_of_the_timed_batches_alone(measured: tuple[BenchResult, list[str]]) -> None:
    assert [row.images_per_s for row in measured[0].rows] == [(6.0,) * 4, (3.0,) * 4, (12.0,) * 4]


def test_cpu_seconds_are_those_of_the_timed_batches_alone(measured: tuple[BenchResult, list[str]]) -> None:
    for row, expected in zip(measured[0].rows, (1 / 3, 2 / 3, 1 / 6), strict=True):
        assert row.cpu_s_per_image == pytest.approx([expected] * 4)


def test_the_own_time_of_a_batch_is_that_of_the_thread_that_takes_the_timed_batches(
    measured: tuple[BenchResult, list[str]],
) -> None:
    assert [row.own_s_per_batch for row in measured[0].rows] == [(0.125,) * 4, (0.25,) * 4, (0.0625,) * 4]


def test_all_are_started_first_and_each_is_warmed_up_before_every_start(
    measured: tuple[BenchResult, list[str]], calls: list[tuple[str, int]]
) -> None:
    assert calls[:3] == [("a", 2), ("b", 2), ("c", 2)]
    assert [number for _, number in calls[3:]] == [2, 10] * 12
    assert all(warm_up[0] == timed[0] for warm_up, timed in zip(calls[3::2], calls[4::2], strict=True))


def test_before_every_warm_up_the_others_fall_idle(measured: tuple[BenchResult, list[str]], pauses: list[int]) -> None:
    assert pauses == list(range(3, 3 + 2 * 12, 2))


def test_contenders_take_turns_and_the_order_rotates(
    measured: tuple[BenchResult, list[str]], calls: list[tuple[str, int]]
) -> None:
    assert "".join(name for name, number in calls if number == 10) == "abcbcacababc"


def test_a_line_is_reported_after_every_repeat(measured: tuple[BenchResult, list[str]]) -> None:
    assert measured[1] == [f"repeat {number} of 4, images/s: a 6, b 3, c 12" for number in (1, 2, 3, 4)]


def test_the_settings_are_in_the_result(measured: tuple[BenchResult, list[str]]) -> None:
    assert measured[0].settings == {"size": 7}


def test_a_contender_that_still_works_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_s = iter([0.0, 0.1, 0.1, 0.15, 0.15, 0.15])  # busy, busy, idle
    monkeypatch.setattr(room, "_cpu_s", lambda: next(cpu_s))
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    room.wait_until_idle()
    assert list(cpu_s) == []


def test_waiting_for_those_who_never_fall_idle_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(room.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(room.time, "sleep", sleep)
    monkeypatch.setattr(room, "_cpu_s", lambda: clock[0])
    room.wait_until_idle()
    assert clock[0] == pytest.approx(room._SETTLE_S, abs=0.2)


def test_the_ratio_is_the_median_of_the_ratios_within_each_repeat() -> None:
    ours, theirs = ROWS
    assert theirs.ratio(ours) == 0.4  # of 0.5, 0.4 and 0.25; the medians' ratio would be 0.5
    assert ours.ratio(theirs) == 2.5
    assert ours.ratio(ours) == 1.0


@pytest.mark.parametrize(
    ("peaks", "growth"), [((5,), 0), ((5, 7), 2), ((5, 9, 6), 0), ((9, 5, 6), -3), ((1, 8, 8, 2), 0), ((1, 3, 8, 2), 5)]
)
def test_memory_growth_is_from_the_first_half_of_the_repeats_to_the_second(peaks: tuple[int, ...], growth: int) -> None:
    ones = (1.0,) * len(peaks)
    row = BenchRow("ours", ones, ones, peaks, ones)
    assert row.memory_growth_bytes == growth


def test_the_table_shows_medians_extremes_ratios_cpu_time_and_memory() -> None:
    header, ours, theirs, *notes = RESULT.table().splitlines()
    assert len(header) == len(ours) == len(theirs)
    assert ours.split() == ["ours", "100", "50", "400", "1.00", "12.00", "600.00", "3.0"]
    assert theirs.split() == ["theirs", "50", "20", "100", "0.40", "30.00", "200.00", "-1.0"]
    assert "3 interleaved repeats" in notes[0] and f"{len(os.sched_getaffinity(0))} core(s), cpu." in notes[0]


def test_json_holds_every_repeat_and_what_the_table_shows() -> None:
    read = json.loads(RESULT.to_json())
    assert read["settings"] == {"batch_size": 8, "device": "cpu"}
    assert read["environment"] == RESULT.environment
    assert read["rows"][1] == {
        "name": "theirs",
        "images_per_s": {"median": 50.0, "min": 20.0, "max": 100.0, "repeats": [50.0, 20.0, 100.0]},
        "ratio_to_first": 0.4,
        "cpu_s_per_image": {"median": 0.03, "min": 0.02, "max": 0.04, "repeats": [0.03, 0.02, 0.04]},
        "peak_memory_bytes": {
            "median": 2**30 - 2**20,
            "min": 2**29,
            "max": 2**30,
            "repeats": [2**30, 2**29, 2**30 - 2**20],
        },
        "memory_growth_bytes": -(2**20),
        "own_s_per_batch": {"median": 0.2, "min": 0.1, "max": 0.7, "repeats": [0.1, 0.2, 0.7]},
    }


def test_the_environment_names_processor_cores_versions_command_and_date() -> None:
    found = environment()
    assert found["cpu"] and found["system"] and found["command"]
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["date"].endswith("+00:00")
    assert {"kd_pipeline", "python", "numpy", "pillow", "torch", "torchvision"} <= found["versions"].keys()
    assert any(name.startswith("nvidia-dali-cuda") for name in found["versions"])


@pytest.mark.parametrize(
    ("program", "typed"),
    [("/opt/bin/kd-pipeline", "kd-pipeline"), ("/opt/kd_pipeline/__main__.py", "python -m kd_pipeline")],
)
def test_the_command_is_one_that_can_be_typed(program: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.sys, "argv", [program, "bench", "loader", "--root", "my photographs"])
    assert environment()["command"] == f"{typed} bench loader --root 'my photographs'"


def test_the_cpu_time_of_workers_counts() -> None:
    context = multiprocessing.get_context("spawn")
    done, leave = context.Event(), context.Event()
    worker = context.Process(target=_work, args=(done, leave))
    own_s, before_s = time.process_time(), room._cpu_s()
    worker.start()
    try:
        assert done.wait(60)
        used_s = room._cpu_s() - before_s - (time.process_time() - own_s)
    finally:
        leave.set()
        worker.join()
    assert used_s >= 0.3


def test_the_peak_of_memory_starts_anew_at_every_reset() -> None:
    room.reset_peak_memory()
    before = room.peak_memory_bytes()
    block = bytearray(os.urandom(1)) * (256 * 2**20)
    with_block = room.peak_memory_bytes()
    del block
    assert with_block - before > 200 * 2**20
    assert room.peak_memory_bytes() - before > 200 * 2**20
    room.reset_peak_memory()
    assert room.peak_memory_bytes() < with_block - 200 * 2**20


def test_the_peak_of_memory_is_that_of_each_repeat_alone() -> None:
    calls: list[int] = []

    def run(num_batches: int) -> int:
        calls.append(num_batches)
        if len(calls) == 3:  # start, warm-up, first timed batches
            np.ones(2**28, dtype=np.uint8)
        return num_batches

    contender = Contender("large at first", run)
    result = measure([contender], repeats=2, num_batches=1, num_warm_up=1, settings={}, report=lambda line: None)
    first, second = result.rows[0].peak_memory_bytes
    assert first - second > 200 * 2**20


def _work(done: Event, leave: Event) -> None:
    while time.process_time() < 0.32:
        pass
    done.set()
    leave.wait(60)
