import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_pipeline._core.child_process import run_child

pytestmark = pytest.mark.slow


def test_report_is_separate_from_log() -> None:
    child = run_child("tests.children:echo", "one", "two three", timeout_s=30)
    assert (child.lines, child.failure) == (["one", "two three"], "")
    assert child.log == "not for the parent\n"


@pytest.mark.parametrize(
    ("function", "timeout_s", "lines", "failure"),
    [
        ("crash", 30, ["so far so good"], "crashed with SIGSEGV"),
        ("hang", 5, ["started"], "timed out after 5 s"),
        ("fail", 30, [], "exited with status 3"),
        ("no_such_function", 30, [], "exited with status 1"),
    ],
)
def test_failure_has_reason(function: str, timeout_s: float, lines: list[str], failure: str) -> None:
    child = run_child(f"tests.children:{function}", timeout_s=timeout_s)
    assert (child.lines, child.failure) == (lines, failure)


def test_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    child = run_child("tests.children:echo", "fine", timeout_s=30)
    assert (child.lines, child.failure) == (["fine"], "")


def test_interrupt_kills_child(tmp_path: Path) -> None:
    script = (
        "import signal, subprocess, sys\n"
        "communicate = subprocess.Popen.communicate\n"
        "def interrupted(self, timeout=None):\n"
        "    print(self.pid)\n"
        "    raise KeyboardInterrupt\n"
        "subprocess.Popen.communicate = interrupted\n"
        "from kd_pipeline._core.child_process import run_child\n"
        "try:\n"
        "    run_child('tests.children:hang', timeout_s=60)\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
