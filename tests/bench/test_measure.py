import multiprocessing
import os
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline._core.nvidia_driver import Driver
from kd_pipeline.bench import measure as module
from kd_pipeline.bench.measure import (
    Candidate,
    Measurement,
    environment,
    format_table,
    measure,
    paired_ratio,
    save_result,
)
from kd_pipeline.data.decode_trial import Nvjpeg
from kd_pipeline.errors import MissingPackageError


class Stream:
    """Records its calls; a batch has 3 images and advances the clock."""

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
    """Number of calls before each check of the CPU time."""
    return []


@pytest.fixture
def measured(
    calls: list[tuple[str, int]], pauses: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Measurement], list[str]]:
    """Three candidates with 0.5, 1 and 0.25 s per batch in four repeats, and the lines of progress."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module, "_cpu_s", lambda: 2 * clock[0])
    monkeypatch.setattr(module.time, "thread_time", lambda: clock[0] / 4)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pauses.append(len(calls)))
    lines: list[str] = []
    candidates = [
        Candidate(name, Stream(name, seconds, calls, clock)) for name, seconds in [("a", 0.5), ("b", 1.0), ("c", 0.25)]
    ]
    result = measure(candidates, repeats=4, num_batches=10, num_warm_up=2, report=lines.append)
    return result, lines


def test_images_per_s_counts_timed_batches_only(measured: tuple[list[Measurement], list[str]]) -> None:
    assert [row.images_per_s for row in measured[0]] == [(6.0,) * 4, (3.0,) * 4, (12.0,) * 4]


def test_cpu_s_counts_timed_batches_only(measured: tuple[list[Measurement], list[str]]) -> None:
    for row, expected in zip(measured[0], (1 / 3, 2 / 3, 1 / 6), strict=True):
        assert row.cpu_s_per_image == pytest.approx([expected] * 4)


def test_own_s_is_cpu_time_of_the_consuming_thread(
    measured: tuple[list[Measurement], list[str]],
) -> None:
    wanted = [(0.125,) * 4, (0.25,) * 4, (0.0625,) * 4]  # but for the rounding of a clock that counts from an odd time
    assert [row.own_s_per_batch for row in measured[0]] == [pytest.approx(row, abs=1e-9) for row in wanted]


def test_warm_up_before_every_timing(
    measured: tuple[list[Measurement], list[str]], calls: list[tuple[str, int]]
) -> None:
    assert calls[:3] == [("a", 2), ("b", 2), ("c", 2)]
    assert [number for _, number in calls[3:]] == [2, 10] * 12
    assert all(warm_up[0] == timed[0] for warm_up, timed in zip(calls[3::2], calls[4::2], strict=True))


def test_waits_until_idle_before_every_warm_up(
    measured: tuple[list[Measurement], list[str]], pauses: list[int]
) -> None:
    assert pauses == list(range(3, 3 + 2 * 12, 2))


def test_order_of_candidates_rotates(
    measured: tuple[list[Measurement], list[str]], calls: list[tuple[str, int]]
) -> None:
    assert "".join(name for name, number in calls if number == 10) == "abcbcacababc"


def test_each_repeat_is_reported(measured: tuple[list[Measurement], list[str]]) -> None:
    assert measured[1] == [f"repeat {number} of 4, images/s: a 6, b 3, c 12" for number in (1, 2, 3, 4)]


def test_each_repeat_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wait_until_idle", lambda: None)
    saved: list[list[Measurement]] = []
    candidates = [Candidate(name, lambda number: number) for name in "ab"]
    result = measure(candidates, repeats=3, num_batches=1, num_warm_up=1, report=str, save=saved.append)
    assert [[len(row.images_per_s) for row in rows] for rows in saved] == [[1, 1], [2, 2], [3, 3]]
    assert saved[-1] == result


def test_busy_candidate_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_s = iter([0.0, 0.1, 0.1, 0.15, 0.15, 0.15])  # busy, busy, idle
    monkeypatch.setattr(module, "_cpu_s", lambda: next(cpu_s))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    module.wait_until_idle()
    assert list(cpu_s) == []


def test_waiting_for_idle_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module, "_cpu_s", lambda: clock[0])
    module.wait_until_idle()
    assert clock[0] == pytest.approx(module._MAX_SETTLE_S, abs=0.2)


def test_paired_ratio_is_the_median_within_repeats() -> None:
    ours, theirs = (100.0, 50.0, 400.0), (50.0, 20.0, 100.0)
    assert paired_ratio(theirs, ours) == 0.4  # of 0.5, 0.4 and 0.25; the ratio of the medians is 0.5
    assert paired_ratio(ours, theirs) == 2.5


def test_table_columns_are_aligned() -> None:
    lines = format_table(["", "images/s", "s"], [["ours", "1", "1.25"], ["theirs, compiled", "12,345,678", ""]])
    assert lines == [
        "                    images/s     s",
        "ours                       1  1.25",
        "theirs, compiled  12,345,678",
    ]


def test_result_without_matplotlib_has_no_plot(tmp_path: Path) -> None:
    def plot() -> Any:
        raise MissingPackageError("matplotlib is needed here; pip install it")

    lines: list[str] = []
    save_result(tmp_path / "a.json", lambda: "{}", lines.append, plot)
    assert (tmp_path / "a.json").read_text() == "{}\n" and len(list(tmp_path.iterdir())) == 1
    assert lines == ["no plot was saved: matplotlib is needed here; pip install it"]
    save_result(None, lambda: "{}", lines.append, plot)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("peaks", "growth"), [((5,), 0), ((5, 7), 2), ((5, 9, 6), 0), ((9, 5, 6), -3), ((1, 8, 8, 2), 0), ((1, 3, 8, 2), 5)]
)
def test_memory_growth_compares_halves(peaks: tuple[int, ...], growth: int) -> None:
    ones = (1.0,) * len(peaks)
    row = Measurement("ours", ones, ones, peaks, ones)
    assert row.memory_growth_bytes == growth


def test_environment_has_machine_versions_and_command() -> None:
    found = environment()
    assert found["cpu"] and found["system"] and found["command"]
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["date"].endswith("+00:00")
    assert {"kd_pipeline", "python", "numpy", "pillow", "torch", "torchvision"} <= found["versions"].keys()
    assert any(name.startswith("nvidia-dali-cuda") for name in found["versions"])


def test_environment_names_the_driver_and_the_nvjpeg_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "query_driver", lambda: Driver(version="580.95", cuda="13.0", gpus=()))
    monkeypatch.setattr(module, "loaded_nvjpeg", lambda: Nvjpeg((13, 3), Path("libnvjpeg.so.13")))
    versions = environment()["versions"]
    assert versions["nvidia driver"] == "580.95" and versions["nvjpeg in this process"] == "13.3"


@pytest.mark.parametrize(
    ("started_as", "typed"),
    [
        (None, "kd-pipeline"),
        ("kd_pipeline.__main__", "python -m kd_pipeline"),
        ("benchmarks.loader", "python -m benchmarks.loader"),
    ],
)
def test_command_can_be_repeated(started_as: str | None, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = None if started_as is None else SimpleNamespace(name=started_as)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", ["/opt/bin/kd-pipeline", "bench", "step", "--root", "my photographs"])
    assert environment()["command"] == f"{typed} bench step --root 'my photographs'"


@pytest.mark.slow
def test_cpu_s_includes_workers() -> None:
    context = multiprocessing.get_context("spawn")
    done, leave = context.Event(), context.Event()
    worker = context.Process(target=_work, args=(done, leave))
    own_s, before_s = time.process_time(), module._cpu_s()
    worker.start()
    try:
        assert done.wait(60)
        used_s = module._cpu_s() - before_s - (time.process_time() - own_s)
    finally:
        leave.set()
        worker.join()
    assert used_s >= 0.3


def test_peak_memory_is_reset() -> None:
    module.reset_peak_memory()
    before = module.peak_memory_bytes()
    block = bytearray(os.urandom(1)) * (256 * 2**20)
    with_block = module.peak_memory_bytes()
    del block
    assert with_block - before > 200 * 2**20
    assert module.peak_memory_bytes() - before > 200 * 2**20
    module.reset_peak_memory()
    assert module.peak_memory_bytes() < with_block - 200 * 2**20


def test_peak_memory_is_of_one_repeat() -> None:
    calls: list[int] = []

    def run(num_batches: int) -> int:
        calls.append(num_batches)
        if len(calls) == 3:  # start, warm-up, first timed batches
            np.ones(2**28, dtype=np.uint8)
        return num_batches

    candidate = Candidate("large at first", run)
    result = measure([candidate], repeats=2, num_batches=1, num_warm_up=1, report=lambda line: None)
    first, second = result[0].peak_memory_bytes
    assert first - second > 200 * 2**20


def _work(done: Event, leave: Event) -> None:
    while time.process_time() < 0.32:
        pass
    done.set()
    leave.wait(60)


def test_candidate_can_have_its_own_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wait_until_idle", lambda: None)
    calls: list[tuple[str, int]] = []
    candidates = [
        Candidate(name, Stream(name, 1.0, calls, [0.0]), num_warm_up) for name, num_warm_up in [("a", None), ("b", 2)]
    ]
    measure(candidates, repeats=1, num_batches=4, num_warm_up=9, report=lambda line: None)
    assert [number for name, number in calls if name == "a"] == [9, 9, 4]
    assert [number for name, number in calls if name == "b"] == [2, 2, 4]
