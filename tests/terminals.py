"""Commands as a person sees them: through a pseudo-terminal, and through a pipe."""

import os
import pty
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.forks import Command

__all__ = ["at_terminal", "piped"]

_ENVIRONMENT = {"TERM": "xterm", "TORCHDYNAMO_DISABLE": "1"}


def at_terminal(arguments: Sequence[str], folder: Path) -> tuple[int | None, str]:
    """Exit status and all that `kd-pipeline ARGUMENTS` writes to a terminal, in `folder`."""
    ours, theirs = pty.openpty()
    process = _start(arguments, folder, _Terminal(os.ttyname(theirs)))
    output = b""
    while not output:  # the terminal must stay open until the process has opened it
        output = os.read(ours, 65536)
    os.close(theirs)
    with suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 65536):
            output += chunk
    os.close(ours)
    process.communicate(60)
    return process.returncode, output.decode()


def piped(arguments: Sequence[str], folder: Path) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of `kd-pipeline ARGUMENTS`."""
    process = _start(arguments, folder)
    output, error = process.communicate()
    return process.returncode, output, error


def _start(arguments: Sequence[str], folder: Path, prepare: Callable[[], object] = int) -> Command:
    return Command(arguments, folder, os.environ | _ENVIRONMENT, prepare)


class _Terminal:
    """Makes a terminal the standard streams."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self) -> None:
        terminal = os.open(self._path, os.O_RDWR | os.O_NOCTTY)
        for stream in range(3):
            os.dup2(terminal, stream)
        os.close(terminal)
