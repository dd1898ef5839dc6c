"""Run a function in a child process, and report how it ended: a result, an exception, a crash or a timeout."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

__all__ = ["ChildResult", "kill_session", "open_report", "run_child", "start_python"]

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
    """Call `function` in a new process as `start_python` does, and wait for it."""
    # Ctrl-C reaches the parent only, which kills the child's session.
    child = start_python(function, *arguments, stderr=subprocess.PIPE, start_new_session=True)
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


def start_python(
    function: str, *arguments: str, stderr: int | IO[bytes], start_new_session: bool = False
) -> subprocess.Popen[bytes]:
    """Start a process that calls `function`, written `package.module:name`, and exits with what it returns.

    It imports from the same places as this process, except the working directory: a `json.py` there, which may have
    come with a downloaded model, is not what a child means by `import json`. Its stdin is empty and its stdout a pipe.
    """
    module, _, name = function.partition(":")
    call = f"import sys; from {module} import {name}; sys.exit({name}(*sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", call, *arguments],  # -P: without it, -c puts the working directory first
        env=os.environ | {"PYTHONPATH": os.pathsep.join(_import_path())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=start_new_session,
    )


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


def _import_path() -> list[str]:
    """`sys.path` without the working directory, unless this package is there."""
    here = Path.cwd()
    if here == Path(__file__).parents[2]:
        return [each for each in sys.path if each]
    return [each for each in sys.path if each and Path(each).resolve() != here]


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"exited with status {status}" if status else ""
