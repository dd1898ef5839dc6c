"""A function of this library in a Python of its own: whether it crashes, hangs or raises, its caller learns why."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

__all__ = ["ChildResult", "kill_session", "open_report", "run_child"]

_GRACE_S = 5.0
"""How long a killed child may take to disappear; one that waits for a hung driver never does."""


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What a child reported, and how it ended."""

    lines: Sequence[str]
    """What it wrote to `open_report()`; possibly less than it had to say where `failure` is not empty."""
    failure: str
    """Why it ended early, such as `crashed with SIGSEGV`; empty after exit status 0."""
    log: str
    """Everything else that it printed, and what libraries in it did."""


def run_child(function: str, *arguments: str, timeout_s: float) -> ChildResult:
    """Call `function`, spelled `package.module:name`, with strings in a new process, and wait for its end.

    The child finds the modules that this process would find, and none because of the folder that it starts in.
    """
    module, _, name = function.partition(":")
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", f"import sys; from {module} import {name}; {name}(*sys.argv[1:])", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for the parent, which kills the child and whatever it has started
    )
    try:
        output, log = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        failure = f"no answer within {timeout_s:g} s"
        kill_session(child)
        try:
            output, log = child.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired as exc:
            output, log = exc.stdout or b"", exc.stderr or b""
    except BaseException:
        kill_session(child)
        raise
    else:
        failure = _how_it_ended(child.returncode)
    return ChildResult(output.decode(errors="replace").splitlines(), failure, log.decode(errors="replace"))


def open_report() -> TextIO:
    """For the child: where its parent reads lines, apart from what packages print to stdout."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return report


def kill_session(child: subprocess.Popen[bytes]) -> None:
    """End a process that was started in a session of its own, and whatever it has started there."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"ended Python with exit status {status}" if status else ""
