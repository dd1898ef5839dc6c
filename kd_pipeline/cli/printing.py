"""What the commands print: names and messages of strangers move no cursor, and start no line of their own."""

import logging
import sys
from typing import TextIO

from kd_pipeline._core.text import printable

__all__ = ["PrintableFormatter", "print_message", "print_result"]


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters; further lines of a message are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return _indented(super().format(record))


def print_message(text: str) -> None:
    """Print an error or a line of progress to stderr; further lines are indented."""
    _print(_indented(text), sys.stderr)


def print_result(text: str) -> None:
    """Print lines to stdout, in which names are `printable` already."""
    _print(printable(text, keep="\n"), sys.stdout)


def _indented(text: str) -> str:
    return printable(text, keep="\n").replace("\n", "\n  ")


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
