"""What is logged, as lines on stderr: those of the commands, and of Python programs that have not set up logging."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kd_pipeline._core.current_student import with_student
from kd_pipeline._core.library_output import TerminalHandler
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.text import indented

__all__ = ["PrintableFormatter", "log_line", "log_to_terminal"]

_logger = logging.getLogger("kd_pipeline")


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters; further lines of a message are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return indented(with_student(super().format(record)))


def log_line(line: str) -> None:
    """Log a line about what is done; also the default of an argument `report`."""
    _logger.info("%s", line)


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """Show on stderr what is logged while the block runs, as a command does, unless logging is set up.

    It is set up if a handler gets the records of `kd_pipeline`, which then is the only one. A level that the logger
    `kd_pipeline` has been given counts here too: at `WARNING` only warnings are shown.
    """
    if _logger.hasHandlers() or sys.stderr is None or not is_rank_zero():
        yield
        return
    handler = _DefaultHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    level = _logger.level
    handler.setLevel(level)
    _logger.addHandler(handler)
    if level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        _logger.setLevel(level)
        _logger.removeHandler(handler)


class _DefaultHandler(TerminalHandler):
    """Is silent as soon as the user's code, such as a callback, has set up logging for all."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print, unless the root logger does."""
        if not logging.getLogger().handlers:
            super().emit(record)
