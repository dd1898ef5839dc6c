"""Open every hostile file in a fork of one process, with limits on time and memory, and report how each ended."""

import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from kd_pipeline._core.child_process import open_report
from kd_pipeline.bench.measure import peak_memory_bytes, reset_peak_memory
from kd_pipeline.errors import KDPipelineError
from tests.hostile.cases import MARKER, Case

LIMIT_S = 60.0
"""Of wall-clock time, as other tests may run meanwhile; a hang ends by it."""
MEMORY_LIMIT = 500 * 10**6
"""Bytes that opening a file may take."""
_STOP_AT = 1_500 * 10**6
"""Bytes at which a case is killed, for the sake of the machine."""
_MAX_MESSAGE = 5000


def run_cases(folder: str, *wanted: str) -> int:
    """In the child: report a line of JSON for each case, `[name, problem]`, with a problem of null for a good end."""
    report = open_report()
    from tests.hostile import all_cases, prepare

    gc.collect()
    gc.freeze()  # else each fork would copy the memory of all objects at its first collection
    _fork(lambda: prepare.make(Path(folder)), 120.0)
    for case in all_cases.cases(Path(folder)):
        if not wanted or any(text in case.name for text in wanted):
            started = time.monotonic()
            problem = _attempt(case, Path(folder))
            print(json.dumps([case.name, problem, round(time.monotonic() - started, 2)]), file=report, flush=True)
    return 0


def _attempt(case: Case, folder: Path) -> str | None:
    place = folder / "cases" / "".join(char if char.isalnum() else "_" for char in case.name)
    place.mkdir(parents=True)
    problem = _fork(lambda: _open(case, place), LIMIT_S)
    if (place / MARKER).exists():
        return "its code was run"
    return problem


def _open(case: Case, folder: Path) -> str | None:
    """What is wrong with how opening it ends."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.chdir(folder)
    path = case.build(folder)
    reset_peak_memory()
    before = peak_memory_bytes()
    try:
        result = case.open(path)
    except KDPipelineError as error:
        problem = _judge(case, path, error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        problem = f"{type(error).__name__}: {error!s:.200} ({where})"
    else:
        problem = None if case.error is None else f"accepted: {result!r:.300}"
    grown = peak_memory_bytes() - before
    if grown > MEMORY_LIMIT:
        problem = f"{grown // 10**6} MB of memory" + (f"; {problem}" if problem else "")
    return problem


def _judge(case: Case, path: Path, error: KDPipelineError) -> str | None:
    message = str(error)
    if case.error is None or not isinstance(error, case.error):
        return f"{type(error).__name__} and not {case.error and case.error.__name__}: {message:.300}"
    if len(message) > _MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message:.300}"
    name = path.name if case.names is None else case.names
    if name not in message and str(path.resolve()) not in message:
        return f"the message does not name {name}: {message:.300}"
    if any(char != "\n" and not char.isprintable() for char in message):
        return f"control characters in the message: {message!r:.300}"
    return None


def _fork(function: Any, limit_s: float) -> str | None:
    """Call `function` in a fork; return what it returns, or how the fork ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = json.dumps(function()).encode()
        except BaseException:
            result = json.dumps(f"the test itself failed: {traceback.format_exc()[-1500:]}").encode()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(result)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # not what other code wants to do at exit
    os.close(write)
    killed = _watch(pid, limit_s)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    if killed:
        return killed
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    result: str | None = json.loads(content)
    return result


def _watch(pid: int, limit_s: float) -> str | None:
    """Wait until the fork has ended; kill it, and say why, if it takes too long or too much."""
    ends, first = time.monotonic() + limit_s, None
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        resident = _resident_bytes(pid)
        first = resident if first is None else first
        problem = None
        if time.monotonic() > ends:
            problem = f"did not end within {limit_s:g} s"
        elif resident - first > _STOP_AT:
            problem = f"took more than {_STOP_AT // 10**6} MB of memory"
        if problem:
            os.kill(pid, signal.SIGKILL)
            return problem
        time.sleep(0.01)
    return None


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0
