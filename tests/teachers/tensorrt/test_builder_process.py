"""TensorRT's builder in a subprocess: its errors are reported, and its death leaves nothing behind."""

import contextlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.builder_process import BuilderJob, run_builder
from kd_pipeline.teachers.tensorrt.manifest import manifest_path, read_engine
from tests.networks import IMAGE_SHAPE
from tests.teachers.onnx_models import linear_model

psutil = pytest.importorskip("psutil")

TOOL = Path(__file__).parents[3] / "tools" / "build_engine.py"


def job_for(file: Path, engine: Path, **changes: object) -> BuilderJob:
    fields = {
        "onnx": file,
        "engine": engine,
        "input_name": "images",
        "image_shape": IMAGE_SHAPE,
        "batch_sizes": ((1, 4, 8),),
        "runtime": "tensorrt_rtx",
        "tf32": False,
    }
    return BuilderJob.model_validate(fields | changes)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*arguments: object) -> int:
    process = start(*arguments)
    process.communicate(timeout=120)
    return process.returncode


def descendants(process: subprocess.Popen[str]) -> "list[psutil.Process]":
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def builders(process: subprocess.Popen[str]) -> "list[psutil.Process]":
    """The processes of TensorRT's builder; imports start others, such as ldconfig, for a moment."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return [child for child in descendants(process) if any("job.json" in each for each in child.cmdline())]
    return []


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_builder_reports_phases(exported: Callable[[int], Path], tmp_path: Path) -> None:
    phases: list[str] = []
    run_builder(job_for(exported(0), tmp_path / "a.engine"), tmp_path, phases.append)
    assert any(phase.startswith("TensorRT: ") for phase in phases)
    assert (tmp_path / "a.engine").stat().st_size > 1000


def test_timing_cache_is_reused(exported: Callable[[int], Path], tmp_path: Path) -> None:
    cache, lines = tmp_path / "timings", list[str]()
    job = job_for(exported(0), tmp_path / "a.engine", timing_cache=cache)
    for _ in range(2):
        run_builder(job, tmp_path, lines.append)
        assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert not any("not used" in line for line in lines)
    cache.write_bytes(b"of a different version")
    cache.chmod(0o664)
    run_builder(job, tmp_path, lines.append)
    refused = f"the timings in {cache} are not used: group may write to {cache}; if nobody did, chmod g-w {cache}"
    assert refused in lines
    assert cache.read_bytes() != b"of a different version" and stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".timings*"))


def test_unreadable_timing_cache_is_error(exported: Callable[[int], Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    os.mkfifo(cache)
    with pytest.raises(EngineError, match=r"cache cannot be read or written: this is a pipe and no file"):
        run_builder(job_for(exported(0), tmp_path / "a.engine", timing_cache=cache), tmp_path, lambda line: None)
    assert not list(tmp_path.glob(".cache*"))


def test_parse_error_names_node_and_operator(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node[0].domain, model.graph.node[0].op_type = "my.ops", "Frobnicate"
    model.graph.node[0].name = "odd one"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    onnx.save(model, tmp_path / "teacher.onnx")
    job = job_for(tmp_path / "teacher.onnx", tmp_path / "a.engine", image_shape=(3, 8, 8))
    with pytest.raises(EngineError, match=r"TensorRT cannot parse the ONNX file: .*Frobnicate.*odd one"):
        run_builder(job, tmp_path, lambda line: None)
    assert not (tmp_path / "a.engine").exists()


def test_build_error_has_tensorrt_text(exported: Callable[[int], Path], tmp_path: Path) -> None:
    job = job_for(exported(0), tmp_path / "a.engine", image_shape=(3, 48, 48))
    with pytest.raises(EngineError, match=r"TensorRT cannot build 0.onnx: .*images"):
        run_builder(job, tmp_path, lambda line: None)


def test_killed_builder_is_error_with_signal(exported: Callable[[int], Path], tmp_path: Path) -> None:
    def kill(line: str) -> None:
        (child,) = [each for each in psutil.Process().children() if str(tmp_path / "job.json") in each.cmdline()]
        child.kill()

    with pytest.raises(EngineError, match="the process of TensorRT's builder ended by signal SIGKILL"):
        run_builder(job_for(exported(0), tmp_path / "a.engine"), tmp_path, kill)


@pytest.mark.slow
def test_killed_build_leaves_no_partial_engine(exported: Callable[[int], Path], tmp_path: Path) -> None:
    engine, arguments = tmp_path / "a.engine", ("--onnx", exported(0), "--precision", "fp16", "--save-engine")
    started = time.monotonic()
    assert finish(*arguments, tmp_path / "whole" / "a.engine") == 0
    whole_s = time.monotonic() - started
    numbers = random.Random(0)
    for _ in range(6):
        process = start(*arguments, engine)
        time.sleep(numbers.uniform(0.3, 1.0) * whole_s)
        children = descendants(process)
        process.kill()
        process.communicate()
        wait_for(lambda: not any(child.is_running() for child in children), "the builder outlives its parent")  # noqa: B023
        if engine.exists():
            assert read_engine(engine).manifest is not None
            engine.unlink()
            manifest_path(engine).unlink()
    assert finish(*arguments, engine) == 0
    assert not list(tmp_path.glob(".*building"))
    assert read_engine(engine).manifest is not None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_build_at_once(exported: Callable[[int], Path], tmp_path: Path, number: signal.Signals) -> None:
    engine = tmp_path / "a.engine"
    process = start("--onnx", exported(0), "--save-engine", engine)
    wait_for(lambda: builders(process), "the builder does not start")
    children = descendants(process)
    os.killpg(process.pid, number)  # as a terminal does with Ctrl-C
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in error
    wait_for(lambda: not any(child.is_running() for child in children), "the builder outlives its parent")
    assert not engine.exists()
    if number == signal.SIGINT:
        assert not list(tmp_path.glob("*building"))


@pytest.mark.slow
def test_concurrent_builds_build_once(exported: Callable[[int], Path], tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    processes = [start("--onnx", exported(0), "--save-engine", engine) for _ in range(4)]
    outcomes = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("building with tensorrt_rtx" in error for _, error in outcomes) == 1
    assert sum(f"{engine} already exists" in error for _, error in outcomes) == 3
    assert len({output for output, _ in outcomes}) == 1
