"""The stages of `make gpu`: whatever becomes of one, its result is kept and the next one runs."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kd_pipeline._core.nvidia_driver import Driver, DriverGpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def room() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def driver(cuda: str, num_gpus: int = 1) -> Driver:
    gpu = DriverGpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=1)
    return Driver(version="580.95", cuda=cuda, gpus=(gpu,) * num_gpus)


@pytest.mark.slow
def test_each_stage_ends_in_its_own_way_and_the_next_one_runs(room: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    hang = "import subprocess, sys, time; print('begun', flush=True); time.sleep(600)"
    stages = [
        room.Stage("good", python("print('all is well')"), 60, room.last_line("good")),
        room.Stage("fails", python("raise SystemExit(3)"), 60, room.last_line("fails")),
        room.Stage("crashes", python("import os; os.kill(os.getpid(), 11)"), 60),
        room.Stage("hangs", python(hang), room.LEAST_S, room.last_line("hangs")),
        room.Stage("no result", python("pass"), 60, room.read_doctor),
        room.Stage("last", python("import pathlib; print(pathlib.Path().absolute())"), 60, room.last_line("last")),
    ]
    outcomes = room.run_stages(stages, tmp_path, limit_s=300, root=tmp_path / "work")
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
    lines = room.table(outcomes).splitlines()
    assert len(lines) == 7 and lines[0].split() == ["stage", "status", "seconds", "result"]
    shown = [line[lines[0].index("result") :].strip() for line in lines[1:]]
    assert shown == [each.summary for each in outcomes]


@pytest.mark.slow
def test_what_a_stage_has_started_ends_with_it(room: ModuleType, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stage = room.Stage("parent", python(f"{child}; print(p.pid, flush=True); time.sleep(600)"), room.LEAST_S)
    room.run_stages([stage], tmp_path, limit_s=60, root=tmp_path)
    pid = int((tmp_path / "parent.log").read_text().splitlines()[-1])
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the child of a stopped stage is still running")


def test_a_stage_is_not_begun_without_time(room: ModuleType, tmp_path: Path) -> None:
    stages = [room.Stage(name, python("raise SystemExit(1)"), 60) for name in ("one", "two")]
    outcomes = room.run_stages(stages, tmp_path, limit_s=room.LEAST_S / 2, root=tmp_path)
    assert [each.status for each in outcomes] == ["no time left"] * 2
    assert [each["name"] for each in json.loads((tmp_path / "summary.json").read_text())] == ["one", "two"]


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (OSError("libcuda.so.1: cannot open shared object file"), "there is no driver here"),
        (RuntimeError("cuInit: system not yet initialized"), "the driver says cuInit: system not yet initialized"),
        (driver("13.0", num_gpus=0), "the driver has no GPU for this process (CUDA_VISIBLE_DEVICES?)"),
        (driver("12.8"), "this one serves CUDA 12.8"),
    ],
    ids=str,
)
def test_a_machine_without_a_usable_gpu_is_one_line_and_status_1(
    room: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: object,
    problem: str,
) -> None:
    def ask() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(room, "ask_driver", ask)
    for arguments in ([], ["--look"]):
        assert room.main(arguments) == 1
        shown = capsys.readouterr()
        assert shown.err == f"make gpu needs an NVIDIA GPU with a driver for CUDA 13: {problem}\n"
        assert shown.out == ""


def test_results_are_kept_under_the_name_of_the_gpu(
    room: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "ask_driver", lambda: driver("13.1"))
    monkeypatch.setattr(room, "all_stages", lambda device, out: [room.Stage(device, python("pass"), 60)])
    assert room.main(["--look"]) == 0 and not (tmp_path / "benchmarks").exists()
    assert room.main([]) == 0
    assert (tmp_path / "benchmarks" / "nvidia_h100_80gb_hbm3" / "summary.json").is_file()
    assert "NVIDIA H100 80GB HBM3, driver 580.95, CUDA 13.1" in capsys.readouterr().out
    monkeypatch.setattr(room, "all_stages", lambda device, out: [room.Stage(device, python("raise SystemExit(1)"), 9)])
    assert room.main([]) == 1


def test_the_most_valuable_stages_come_first_and_a_name_that_is_none_is_refused(
    room: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("cuda", "cpu"):
        names = [stage.name for stage in room.all_stages(device, tmp_path)]
        assert names[:4] == ["environment", "decode", "doctor", "tests"]
        assert names[4:] == ["photographs", "bench_loader", "bench_step", "bench_teacher"]
    with pytest.raises(SystemExit):
        room.main(["--device", "cpu", "--out", str(tmp_path), "--stages", "decode", "bench"])
    assert "no stage bench; there are environment, decode" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_stages_run_on_a_cpu_too(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stages", "environment", "decode"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert {trial["decode"] for trial in trials} == {"window", "full"} and all(trial["works"] for trial in trials)
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "2 of 2 ways are right: full at load 0, window at load 0" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that it would all run")
def test_make_gpu_without_a_gpu_ends_at_once_and_installs_nothing() -> None:
    # As from a shell, and not as a part of the `make` that may run this test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "gpu"], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    line = "make gpu needs an NVIDIA GPU with a driver for CUDA 13: there is no driver here\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert not (ROOT / ".venv-gpu").exists()
