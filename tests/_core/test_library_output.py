"""What libraries print goes to the log: not to the terminal, which shows what is ours, the user's, and errors."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import argparse, ctypes, logging, os, sys, warnings
torch_like = logging.StreamHandler()  # made before, as torch does when it is imported
from kd_pipeline.cli.arguments import run_command
from kd_pipeline.training.run_folder import RunFolder
from pathlib import Path

def work(parsed):
    with RunFolder(Path(sys.argv[1])).session("work"):
        os.write(2, b"\\x1b[31m[ERROR] of C++\\x1b[0m\\n")
        torch_like.emit(logging.makeLogRecord({"msg": "of torch"}))
        exec(compile("import warnings; warnings.warn('of a library')", os.__file__, "exec"))
        warnings.warn("of a user")
        print("printed by a user", file=sys.stderr)
        logging.getLogger("kd_pipeline").warning("of ours")
    if sys.argv[2] == "crash":
        os.abort()
    if sys.argv[2] == "fail":
        raise RuntimeError("of a user's code")
    return 0

raise SystemExit(run_command(work, argparse.Namespace(verbose=False, debug=sys.argv[2] == "debug"), prog="p"))
"""
NOISE = ("of C++", "of torch", "of a library")


def stderr_of(folder: Path, how: str) -> tuple[int, str]:
    child = subprocess.run([sys.executable, "-c", CODE, str(folder), how], capture_output=True, text=True, timeout=120)
    return child.returncode, child.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "crash", "fail", "debug"])
def test_terminal_shows_no_library(tmp_path: Path, how: str) -> None:
    status, shown = stderr_of(tmp_path / "run", how)
    for text in ("printed by a user", "of a user", "of ours"):
        assert text in shown
    assert all((text in shown) == (how == "debug") for text in NOISE), shown
    assert (status == 0) == (how in ("end", "debug"))
    if how == "crash":
        assert "Fatal Python error: Aborted" in shown
    if how == "fail":
        assert "Traceback" in shown and "RuntimeError: of a user's code" in shown
    if how != "debug":
        log = (tmp_path / "run" / "train.log").read_text()
        assert all(text in log for text in (*NOISE, "of ours")) and "\x1b" not in log
