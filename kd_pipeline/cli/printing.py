"""What the commands print: names and messages of strangers move no cursor, and start no line of their own."""

import os
import sys
from typing import TextIO

from kd_pipeline._core.text import indented, printable

__all__ = ["print_message", "print_result"]

_SIGPIPE_STATUS = 141


def print_message(text: str) -> None:
    """Print an error or a line of progress to stderr; further lines are indented."""
    _print(indented(text), sys.stderr)


def print_result(text: str) -> None:
    """Print lines to stdout, in which names are `printable` already.

    Raises:
        SystemExit: whoever read them has ended, such as `head`; with 141, the status that shells give for it.
    """
    try:
        _print(printable(text, keep="\n"), sys.stdout)
    except BrokenPipeError:
        # What is flushed at the end of the process would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_SIGPIPE_STATUS)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
