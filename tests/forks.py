"""Processes that start at once: forks of a server that has imported everything, one for each test process.

What a new Python would do differently is tested with new ones, in `tests/cli` and `tests/workflows/test_story.py`.
"""

import atexit
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import finalize

import torch.multiprocessing

__all__ = ["Command", "fork_context", "fork_ranks", "free_port", "torchrun_variables"]


class _Process(ForkServerProcess):
    """With the environment of whoever starts it, where the server has the one that it started with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        _set_environment(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Process


def fork_context() -> ForkServerContext:
    """The `multiprocessing` context of the forks of a server, which runs when this returns.

    What it imports writes caches, into the folders of the environment that it starts with.
    """
    context = _Context()
    context.set_forkserver_preload(["tests.preloaded"])  # of no effect when it runs already
    forkserver._forkserver.ensure_running()
    return context


def fork_ranks(function: Callable[..., object], arguments: tuple[Any, ...], num_ranks: int = 2) -> None:
    """Call `function(rank, *arguments)` in a process for each rank, and wait; the first error is raised here."""
    fork_context()
    torch.multiprocessing.start_processes(
        _call_rank, (dict(os.environ), function, arguments), num_ranks, start_method="forkserver"
    )


def free_port() -> int:
    """A port at which ranks can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def torchrun_variables(rank: int, num_ranks: int, *, port: int) -> dict[str, str]:
    """What torchrun sets for a process of one machine."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": num_ranks}
    variables |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    texts = {name: str(value) for name, value in variables.items()}
    return texts | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}


class Command:
    """`kd-pipeline ARGUMENTS` in a process of its own, with the methods of a `subprocess.Popen` that has pipes."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] = os.environ,
        prepare: Callable[[], object] = int,
        script: str | None = None,
    ) -> None:
        """Start it in `folder`; it calls `prepare` first. With `script`, that is run in place of the command."""
        with ExitStack() as opened:
            written = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
            # A second file object has a place of its own in the file, as the other end of a pipe.
            paths = [f"/proc/self/fd/{file.fileno()}" for file in written]
            self.stdout, self.stderr = (opened.enter_context(open(path, encoding="utf-8")) for path in paths)
            call = _Call([*map(str, arguments)], folder, prepare, script, [file.fileno() for file in written])
            with mock.patch.dict(os.environ, dict(environment), clear=True):
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

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        prepare: Callable[[], object],
        script: str | None,
        streams: list[int],
    ) -> None:
        self._arguments, self._folder, self._prepare = arguments, folder, prepare
        self._script, self._streams = script, streams

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_streams": [DupFd(each) for each in self._streams]}

    def __call__(self) -> None:
        for number, stream in enumerate(self._streams, start=1):
            os.dup2(stream.detach(), number)  # type: ignore[attr-defined]
        os.chdir(self._folder)
        sys.argv = ["kd-pipeline", *self._arguments]
        self._prepare()
        try:
            if self._script is None:
                runpy.run_module("kd_pipeline", run_name="__main__", alter_sys=True)
            else:
                exec(self._script, {"__name__": "__main__"})
        finally:
            atexit._run_exitfuncs()  # which multiprocessing leaves out


def _call_rank(
    rank: int, environment: Mapping[str, str], function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    _set_environment(environment)
    function(rank, *arguments)


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
