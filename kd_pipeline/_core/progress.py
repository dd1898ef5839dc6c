"""How far work of seconds or minutes is: a bar on a terminal, and one line with its time in the log."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.text import printable

__all__ = ["Report", "no_report", "progress_bar", "timed"]

_logger = logging.getLogger("kd_pipeline")

Report = Callable[[int, int], object]
"""Called with the number of steps that are done, and that there are."""

_WIDTH = 30
_REDRAW_S = 0.1
_ERASE_LINE = "\r\x1b[K"


def no_report(done: int, total: int) -> None:
    """The `Report` that shows nothing."""


@contextmanager
def timed(title: str) -> Iterator[Report]:
    """A `progress_bar`, and then a line in the log, such as `export to ONNX: 1.4 s`; call it on any rank.

    Args:
        title: what is done.
    """
    started = time.monotonic()
    with progress_bar(title) as report:
        yield report
    if is_rank_zero():
        _logger.info("%s: %.1f s", title, time.monotonic() - started)


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A bar on stderr while the block runs, which moves as it reports; nothing off a terminal, or on another rank.

    The title is there at once, for work that reports late or not at all.
    """
    if not is_rank_zero() or not _is_terminal(sys.stderr):
        yield no_report
        return
    bar = _Bar(printable(title), sys.stderr)
    eraser = _Eraser(bar)
    _logger.addHandler(eraser)
    try:
        yield bar.show
    finally:
        _logger.removeHandler(eraser)
        bar.erase()


class _Bar:
    """One line of a terminal, which is drawn again and again."""

    def __init__(self, title: str, terminal: TextIO) -> None:
        self._title, self._terminal = title, terminal
        self._started, self._drawn = time.monotonic(), -_REDRAW_S
        self._draw(self._title)

    def show(self, done: int, total: int) -> None:
        """Draw it, unless that has just been done."""
        now = time.monotonic()
        if done < total and now - self._drawn < _REDRAW_S:
            return
        self._drawn = now
        full = _WIDTH * done // max(total, 1)
        minutes, seconds = divmod(int(now - self._started), 60)
        bar = "━" * full + "╌" * (_WIDTH - full)
        self._draw(f"{self._title}  {bar}  {done}/{total}  {minutes}:{seconds:02}")

    def erase(self) -> None:
        """Leave an empty line for what is printed next."""
        self._draw("")

    def _draw(self, text: str) -> None:
        columns = os.get_terminal_size(self._terminal.fileno()).columns or 80  # some terminals say 0
        encoding = self._terminal.encoding or "utf-8"
        text = text[: columns - 1].encode(encoding, "replace").decode(encoding)  # no more, or the line would break
        self._terminal.write(f"{_ERASE_LINE}{text}")
        self._terminal.flush()


class _Eraser(logging.Handler):
    """Makes room for what is logged meanwhile. A logger's own handlers come before those of the root, which print."""

    def __init__(self, bar: _Bar) -> None:
        super().__init__()
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        """Erase the bar, which comes back with the next step."""
        self._bar.erase()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"  # which does not know how to erase a line
