"""Commands as a person sees them: through a pseudo-terminal, and through a pipe."""

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["at_terminal", "piped"]

_ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", "TORCH_COMPILE_DISABLE": "1"}


def at_terminal(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit status and all that `kd-pipeline ARGUMENTS` writes to a terminal, in `folder`."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kd_pipeline", *arguments],
        cwd=folder,
        env=os.environ | _ENVIRONMENT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    with suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 65536):
            output += chunk
    os.close(ours)
    return process.wait(60), output.decode()


def piped(arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `kd-pipeline ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-m", "kd_pipeline", *arguments],
        cwd=folder,
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr
