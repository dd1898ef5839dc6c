"""The stages of `make gpu`: however one ends, its result is saved and the next one runs."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.loader import GPU_LOADERS, LoaderResult
from kd_pipeline._core.nvidia_driver import Driver, DriverGpu
from kd_pipeline.bench.measure import Measurement
from kd_pipeline.bench.step_result import StepResult, StepRow
from kd_pipeline.bench.step_variants import PHASES
from kd_pipeline.bench.step_worker import StepSample
from tests.processes import ends

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def driver(cuda: str, num_gpus: int = 1) -> Driver:
    gpu = DriverGpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=1)
    return Driver(version="580.95", cuda=cuda, gpus=(gpu,) * num_gpus)


@pytest.mark.slow
def test_next_stage_runs_however_one_ends(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    hang = "import subprocess, sys, time; print('begun', flush=True); time.sleep(600)"
    stages = [
        tool.Stage("good", python("print('all is well')"), 60, tool.last_line("good")),
        tool.Stage("fails", python("raise SystemExit(3)"), 60, tool.last_line("fails")),
        tool.Stage("crashes", python("import os; os.kill(os.getpid(), 11)"), 60),
        tool.Stage("hangs", python(hang), tool.MIN_S, tool.last_line("hangs")),
        tool.Stage("no result", python("pass"), 60, tool.read_doctor),
        tool.Stage("last", python("import pathlib; print(pathlib.Path().absolute())"), 60, tool.last_line("last")),
    ]
    outcomes = tool.run_stages(stages, tmp_path, limit_s=300, root=tmp_path / "work")
    assert [(each.status, each.summary) for each in outcomes] == [
        ("ok", "all is well"),
        ("exit 3", f"$ {sys.executable} -c raise SystemExit(3)"),
        ("killed by SIGSEGV", ""),
        ("stopped after 5 s", "begun"),
        ("ok", "no result (FileNotFoundError); see no result.log"),
        ("ok", str(tmp_path / "work")),
    ]
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert [each["status"] for each in saved] == [each.status for each in outcomes]
    lines = tool.table(outcomes).splitlines()
    assert len(lines) == 7 and lines[0].split() == ["stage", "status", "seconds", "result"]
    shown = [line[lines[0].index("result") :].strip() for line in lines[1:]]
    assert shown == [each.summary for each in outcomes]


@pytest.mark.slow
def test_children_of_a_stage_end_with_it(tool: ModuleType, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stage = tool.Stage("parent", python(f"{child}; print(p.pid, flush=True); time.sleep(600)"), tool.MIN_S)
    tool.run_stages([stage], tmp_path, limit_s=60, root=tmp_path)
    pid = int((tmp_path / "parent.log").read_text().splitlines()[-1])
    if not ends(pid):
        os.kill(pid, 9)
        pytest.fail("the child of a stopped stage is still running")


def test_stage_without_time_is_not_started(tool: ModuleType, tmp_path: Path) -> None:
    stages = [tool.Stage(name, python("raise SystemExit(1)"), 60) for name in ("one", "two")]
    outcomes = tool.run_stages(stages, tmp_path, limit_s=tool.MIN_S / 2, root=tmp_path)
    assert [each.status for each in outcomes] == ["no time left"] * 2
    assert [each["name"] for each in json.loads((tmp_path / "summary.json").read_text())] == ["one", "two"]


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (OSError("libcuda.so.1: cannot open shared object file"), "no driver is installed"),
        (RuntimeError("cuInit: system not yet initialized"), "the driver reports cuInit: system not yet initialized"),
        (driver("13.0", num_gpus=0), "the driver shows no GPU to this process (CUDA_VISIBLE_DEVICES?)"),
        (driver("12.8"), "this driver supports CUDA 12.8"),
    ],
    ids=str,
)
def test_no_usable_gpu_is_one_line_and_status_1(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: object,
    problem: str,
) -> None:
    def ask() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tool, "query_driver", ask)
    for arguments in ([], ["--look"]):
        assert tool.main(arguments) == 1
        shown = capsys.readouterr()
        assert shown.err == f"make gpu needs an NVIDIA GPU with a driver for CUDA 13: {problem}\n"
        assert shown.out == ""


def test_results_folder_is_named_after_the_gpu(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "query_driver", lambda: driver("13.1"))
    monkeypatch.setattr(tool, "all_stages", lambda device, out: [tool.Stage(device, python("pass"), 60)])
    assert tool.main(["--look"]) == 0 and not (tmp_path / "benchmarks").exists()
    assert tool.main([]) == 0
    assert (tmp_path / "benchmarks" / "nvidia_h100_80gb_hbm3" / "summary.json").is_file()
    assert "NVIDIA H100 80GB HBM3, driver 580.95, CUDA 13.1" in capsys.readouterr().out
    monkeypatch.setattr(tool, "all_stages", lambda device, out: [tool.Stage(device, python("raise SystemExit(1)"), 9)])
    assert tool.main([]) == 1


def test_files_of_gpu_tests_are_all_that_have_the_mark(tool: ModuleType) -> None:
    found = tool.files_of_gpu_tests()
    assert found[0] == "tests/gpu" and "tests/teachers/test_contract.py" in found
    assert all((ROOT / path).exists() for path in found)


def test_order_and_names_of_the_stages(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "cpu"):
        names = [stage.name for stage in tool.all_stages(device, tmp_path)]
        assert names[:5] == ["environment", "photographs", "bench_loader", "bench_step_resnet", "bench_step_vit"]
        assert names[5:8] == ["bench_teacher_resnet", "bench_teacher_vit", "tests"]
        assert names[8:] == ["decode", "doctor", "bench_views", "bench_students", "slow_tests"]
    with pytest.raises(SystemExit):
        tool.main(["--device", "cpu", "--out", str(tmp_path), "--stages", "decode", "bench"])
    assert "no stage bench; there are environment, photographs" in capsys.readouterr().err


def write_result(path: Path, rows: dict[str, list[float]], name: str = "name", **more: object) -> None:
    listed = [{name: row, "images_per_s": {"median": rates[0], "repeats": rates}} for row, rates in rows.items()]
    path.write_text(json.dumps({"rows": listed, **more}))


def test_targets_are_compared_within_repeats(tool: ModuleType, tmp_path: Path) -> None:
    assert [target.verdict for target in tool.write_targets(tmp_path)] == ["not measured"] * 6
    loader = {
        "KDDataLoader": [100.0, 95.0, 50.0],
        "bare DALI graph": [110.0, 100.0, 50.0],
        "torchvision, CUDA decode_jpeg": [50.0, 90.0, 45.0],
    }
    write_result(tmp_path / "bench_loader.json", loader)
    step = {"c": [94.0, 188.0], "h": [100.0, 200.0]}
    write_result(tmp_path / "bench_step_resnet.json", step, name="row", overheads=[0.0, 0.25])
    assert [str(target) for target in tool.write_targets(tmp_path)] == [
        "reached: images/s, KDDataLoader / bare DALI graph: 0.950 (0.909 to 1.000), wanted at least 0.95",
        "missed: images/s, KDDataLoader / torchvision, CUDA decode_jpeg: 1.111 (1.056 to 2.000), wanted at least 1.2",
        "missed: images/s, bench_step_resnet / its limit: 0.900 (0.800 to 1.000), wanted at least 0.95",
        "missed: time of bench_step_resnet that a teacher ahead adds: 0.064 (0.064 to 0.064), wanted at most 0.05",
        "not measured: images/s, bench_step_vit / its limit: wanted at least 0.95",
        "not measured: time of bench_step_vit that a teacher ahead adds: wanted at most 0.05",
    ]
    saved = json.loads((tmp_path / "targets.json").read_text())
    assert [each["verdict"] for each in saved[:2]] == ["reached", "missed"] and saved[0]["wanted"] == 0.95


def test_rows_of_targets_are_those_of_the_benchmarks(tool: ModuleType, tmp_path: Path) -> None:
    """What `benchmarks.loader` and `bench step` write is what the targets look for."""
    row = Measurement("KDDataLoader", (10.0,), (1.0,), (1,), (1.0,))
    rows = row, replace(row, name="bare DALI graph"), replace(row, name=next(iter(GPU_LOADERS)))
    about: dict[str, Any] = {"device": "cuda:0", "compared": "c", "distill": {}}
    (tmp_path / "bench_loader.json").write_text(LoaderResult(rows, about, {}).to_json())
    sample = StepSample(10.0, 1.0, dict.fromkeys(PHASES, 1.0), 1, None, None)
    steps = [StepRow(letter, letter, (sample,)) for letter in ("c", "h", "f", "loader", "teacher")]
    result = StepResult(tuple(steps), about | {"precision": "bf16"}, {}).to_json()
    for name in ("resnet", "vit"):
        (tmp_path / f"bench_step_{name}.json").write_text(result)
    assert [target.verdict for target in tool.write_targets(tmp_path)].count("not measured") == 0


def test_stages_that_ran_before_stay_in_the_summary(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*names: str, code: str) -> None:
        tool.run_stages([tool.Stage(name, python(code), 60) for name in names], tmp_path, limit_s=60, root=tmp_path)

    run("one", "two", code="pass")
    run("two", code="raise SystemExit(2)")
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert [(each["name"], each["status"]) for each in saved] == [("one", "ok"), ("two", "exit 2")]
    assert tool.main(["--device", "cpu", "--out", str(tmp_path), "--stages", "targets"]) == 0
    assert capsys.readouterr().out.count("not measured: ") == 6


@pytest.mark.slow
def test_first_stages_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stages", "environment", "decode"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert {trial["decode"] for trial in trials} == {"window", "full"} and all(trial["works"] for trial in trials)
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "2 of 2 decode modes work: full at load 0, window at load 0" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run")
def test_make_gpu_without_a_gpu_installs_nothing() -> None:
    # Without the variables of a `make` that may run this test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "gpu"], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("make gpu needs an NVIDIA GPU with a driver for CUDA 13: ")  # a GPU may be hidden
    assert not (ROOT / ".venv-gpu").exists()
