"""The end of a process: all that has been registered runs and is printed, and the status is that of the command."""

import gc
import subprocess
import sys
import textwrap

import pytest

from kd_pipeline import __main__

# As if a library had been imported before and after the command line.
SCRIPT = """
import atexit, sys, threading, time
from kd_pipeline import __main__, cli

def main():
    atexit.register(print, "registered last")
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
    print("x" * 100_000)
    {end}

atexit.register(print, "registered first")
__main__.main = main
__main__.run()
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("return 3", 3),
        ("return 0", 0),
        ("sys.exit(143)", 143),
        ("raise ZeroDivisionError", 1),
        ("raise KeyboardInterrupt", -2),
    ],
)
def test_end_is_complete(end: str, status: int) -> None:
    script = textwrap.dedent(SCRIPT).format(end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == ["x" * 100_000, "thread", "registered last", "registered first"]


def test_garbage_is_left_at_the_very_end(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr(__main__, "main", lambda: 2)
    with pytest.raises(SystemExit) as exit_:
        __main__.run()
    assert exit_.value.code == 2
    assert registered == [gc.freeze]
