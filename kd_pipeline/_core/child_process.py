"""Run a function in a child process, and report how it ended: a result, an exception, a crash or a timeout."""

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
"""How long to wait for a killed child; one that is stuck in a driver call never exits."""


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What a child process reported, and how it ended."""

    lines: Sequence[str]
    """Lines written to `open_report()`; may be incomplete if `failure` is not empty."""
    failure: str
    """Why it ended early, such as `crashed with SIGSEGV`; empty for exit status 0."""
    log: str
    """All other output, including that of libraries."""


def run_child(function: str, *arguments: str, timeout_s: float) -> ChildResult:
    """Call `function`, written `package.module:name`, with string arguments in a new process, and wait for it.

    The child has the import path of this process; its working directory is not on it.
    """
    module, _, name = function.partition(":")
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", f"import sys; from {module} import {name}; {name}(*sys.argv[1:])", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the parent only, which kills the child's session
    )
    try:
        output, log = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        failure = f"timed out after {timeout_s:g} s"
        kill_session(child)
        try:
            output, log = child.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired as exc:
            output, log = exc.stdout or b"", exc.stderr or b""
    except BaseException:
        kill_session(child)
        raise
    else:
        failure = _describe_exit(child.returncode)
    return ChildResult(output.decode(errors="replace").splitlines(), failure, log.decode(errors="replace"))


def open_report() -> TextIO:
    """In the child: the stream that the parent reads. Ordinary prints go to the log instead."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return report


def kill_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its own session, with all processes that it started there."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"exited with status {status}" if status else ""
