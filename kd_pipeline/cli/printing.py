"""What the commands print: names and messages of strangers move no cursor, and start no line of their own."""

import sys
from typing import TextIO

from kd_pipeline._core.text import indented, printable

__all__ = ["print_message", "print_result"]


def print_message(text: str) -> None:
    """Print an error or a line of progress to stderr; further lines are indented."""
    _print(indented(text), sys.stderr)


def print_result(text: str) -> None:
    """Print lines to stdout, in which names are `printable` already."""
    _print(printable(text, keep="\n"), sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
