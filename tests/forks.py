"""Commands in processes that start at once: forks of a server that has imported everything, one for each test process.

What a new Python would do differently is tested with new ones, in `tests/cli` and `tests/workflows/test_story.py`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from weakref import finalize

__all__ = ["Command", "fork_context"]


def fork_context() -> ForkServerContext:
    """The `multiprocessing` context of the server's forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])  # which counts for the first process
    return context


class Command:
    """`kd-pipeline ARGUMENTS` in a process of its own, with the methods of a `subprocess.Popen` that has pipes."""

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        with ExitStack() as opened:
            written = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
            # A second file object has a place of its own in the file, as the other end of a pipe.
            paths = [f"/proc/self/fd/{file.fileno()}" for file in written]
            self.stdout, self.stderr = (opened.enter_context(open(path, encoding="utf-8")) for path in paths)
            call = _Call([*map(str, arguments)], str(folder), dict(environment), [file.fileno() for file in written])
            self._process = fork_context().Process(target=call)
            self._process.start()
            opened.callback(self._process.kill)
            self._close = finalize(self, opened.pop_all().close)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for that of a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; what it wrote to stdout and stderr, and nobody has read."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it does not end: {self.stderr.read()[-2000:]}"
        output = self.stdout.read(), self.stderr.read()
        self._close()
        return output


class _Call:
    """What a fork does, pickled with its streams."""

    def __init__(self, arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
        self._arguments, self._folder, self._environment, self._streams = arguments, folder, environment, streams

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_streams": [DupFd(each) for each in self._streams]}

    def __call__(self) -> None:
        for number, stream in enumerate(self._streams, start=1):
            os.dup2(stream.detach(), number)  # type: ignore[attr-defined]
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        sys.argv = ["kd-pipeline", *self._arguments]
        try:
            runpy.run_module("kd_pipeline", run_name="__main__", alter_sys=True)
        finally:
            atexit._run_exitfuncs()  # which multiprocessing leaves out
