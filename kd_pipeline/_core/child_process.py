"""Start child processes, none of which imports from the working directory, and report how they end."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, TextIO

__all__ = [
    "ChildResult",
    "isolate_children",
    "kill_session",
    "open_report",
    "run_child",
    "spawn_context",
    "start_python",
]

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
    end_soon = "atexit.register(gc.freeze)"  # as in kd_pipeline/__main__.py
    call = f"import atexit, gc, sys; {end_soon}; from {module} import {name}; sys.exit({name}(*sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", call, *arguments],  # -P: without it, -c puts the working directory first
        env=os.environ | {"PYTHONPATH": os.pathsep.join(_import_path())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=start_new_session,
    )


def spawn_context() -> SpawnContext:
    """The `multiprocessing` context for processes that share queues or pipes with this one.

    `get_context("spawn")` starts `python -c`, which imports its first modules, `multiprocessing` and `pickle` among
    them, from the working directory before it learns the parent's path. Processes of this context do not, and neither
    do those that they start.
    """
    with _safe_path():
        resource_tracker.ensure_running()  # the first queue or barrier would start it, in the same way
    return _SafeSpawnContext()


def isolate_children() -> None:
    """From now on, no Python process that a library starts here imports from the working directory either.

    Torch's compiler starts `python -c` to try what it compiled. Nothing changes where this process itself imports from
    the working directory, by Python's own rule: with `python -m`, in a notebook, or in a script of that folder.
    """
    here = Path.cwd()
    if not any(not each or Path(each).resolve() == here for each in sys.path):
        os.environ["PYTHONSAFEPATH"] = "1"


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


class _SafeSpawnProcess(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        with _safe_path():
            return SpawnProcess._Popen(process_obj)


class _SafeSpawnContext(SpawnContext):
    Process = _SafeSpawnProcess


_safe_path_lock = threading.Lock()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Processes that are started in this block have `PYTHONSAFEPATH`, the `-P` for those whose command is fixed."""
    with _safe_path_lock:
        before = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONSAFEPATH"]
            else:
                os.environ["PYTHONSAFEPATH"] = before


def _import_path() -> list[str]:
    """`sys.path` without the working directory, unless this package is there."""
    # A part with the separator in it would be read as several, such as a relative one or the working directory.
    parts = [each for each in sys.path if each and os.pathsep not in each]
    here = Path.cwd()
    if here == Path(__file__).parents[2]:
        return parts
    return [each for each in parts if Path(each).resolve() != here]


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"exited with status {status}" if status else ""
