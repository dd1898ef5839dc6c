"""How far work of seconds or minutes is: a line on a terminal that is drawn again, and one with its time in the log."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from kd_pipeline._core.current_student import current_student, waited_s, with_student
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.text import printable

__all__ = [
    "REDRAW_S",
    "Report",
    "bar_text",
    "no_report",
    "one_status_line",
    "progress_bar",
    "speed_text",
    "status_line",
    "time_text",
    "timed",
]

_logger = logging.getLogger("kd_pipeline")

Report = Callable[[int, int], object]
"""Called with the number of steps that are done, and that there are."""

_SHOWN_S = 2.0
"""Seconds for which the line is that of one of several students."""
REDRAW_S = 0.1
"""Seconds between two drawings of a line that moves."""
_WIDTH = 30
_ERASE_LINE = "\r\x1b[K"


def no_report(done: int, total: int) -> None:
    """The `Report` that shows nothing."""


@contextmanager
def timed(title: str) -> Iterator[Report]:
    """A `progress_bar`, and then a line in the log, such as `export to ONNX: 1.4 s`; call it on any rank.

    Args:
        title: what is done.
    """
    started = time.monotonic() - waited_s()
    with progress_bar(title) as report:
        yield report
    if is_rank_zero():
        _logger.info("%s: %.1f s", title, time.monotonic() - waited_s() - started)


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A bar on stderr while the block runs, which moves as it reports; nothing off a terminal, or on another rank.

    The title is there at once, for work that reports late or not at all.
    """
    started, drawn = time.monotonic(), -REDRAW_S
    title = printable(title)
    with status_line() as draw:
        if draw is None:
            yield no_report
            return

        def report(done: int, total: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if done < total and now - drawn < REDRAW_S:
                return
            drawn = now
            draw(f"{title}  {bar_text(done, total, _WIDTH)}  {done}/{total}  {time_text(now - started)}")

        draw(title)
        yield report


@contextmanager
def status_line() -> Iterator[Callable[[str], None] | None]:
    """A function that draws one line on stderr, over the last one; None off a terminal, or on another rank.

    The line makes room for what is logged or printed meanwhile, and comes back when it is drawn next.
    """
    if _line_of_all is not None:
        with _line_of_all.drawn_by_student() as draw:
            yield draw
        return
    if not is_rank_zero() or not _is_terminal(sys.stderr):
        yield None
        return
    line = _Line(sys.stderr)
    eraser = _Eraser(line)
    _logger.addHandler(eraser)
    outputs = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _ErasingStream(outputs[0], line), _ErasingStream(outputs[1], line)
    try:
        yield line.draw
    finally:
        sys.stdout, sys.stderr = outputs
        _logger.removeHandler(eraser)
        line.erase()


@contextmanager
def one_status_line() -> Iterator[None]:
    """Let the status lines of several students share one while the block runs: each is shown for a while."""
    global _line_of_all
    with status_line() as draw:
        _line_of_all = _LineOfAll(draw)
        try:
            yield
        finally:
            _line_of_all = None


def bar_text(done: int, total: int, width: int) -> str:
    """A bar of `width` characters."""
    full = width * min(done, total) // max(total, 1)
    return "━" * full + "╌" * (width - full)


def time_text(seconds: float) -> str:
    """Minutes and seconds such as `0:07`, with hours if there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def speed_text(rows_per_s: float, rows: str = "images") -> str:
    """Such as `1,386 images/s`, of which `rows` is the word."""
    return f"{rows_per_s:,.0f} {rows}/s" if rows_per_s >= 100 else f"{rows_per_s:.3g} {rows}/s"


class _LineOfAll:
    """The line that several students draw on in turn."""

    def __init__(self, draw: Callable[[str], None] | None) -> None:
        self._draw = draw
        self._students: list[str | None] = []

    @contextmanager
    def drawn_by_student(self) -> Iterator[Callable[[str], None] | None]:
        """What `status_line` gives to the current student."""
        draw, student = self._draw, current_student()
        if draw is None:
            yield None
            return

        def draw_in_turn(text: str) -> None:
            names = [*dict.fromkeys(self._students)]
            if names[int(time.monotonic() / _SHOWN_S) % len(names)] == student:
                draw(with_student(text))

        self._students.append(student)
        try:
            yield draw_in_turn
        finally:
            self._students.remove(student)
            draw("")


_line_of_all: _LineOfAll | None = None


class _Line:
    """One line of a terminal, which is drawn again and again."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._is_empty = True

    def draw(self, text: str) -> None:
        """Replace what is shown."""
        columns = os.get_terminal_size(self._terminal.fileno()).columns or 80  # some terminals say 0
        encoding = self._terminal.encoding or "utf-8"
        text = text[: columns - 1].encode(encoding, "replace").decode(encoding)  # no more, or the line would break
        self._terminal.write(f"{_ERASE_LINE}{text}")
        self._terminal.flush()
        self._is_empty = not text

    def erase(self) -> None:
        """Leave an empty line for what is printed next."""
        if not self._is_empty:
            self.draw("")


class _Eraser(logging.Handler):
    """Makes room for what is logged meanwhile. A logger's own handlers come before those of the root, which print."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Erase the line, which comes back when it is drawn next."""
        self._line.erase()


class _ErasingStream:
    """An output stream that makes room for what a user's code prints; all else is that of the stream."""

    def __init__(self, stream: TextIO, line: _Line) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        """Erase the line, and write."""
        self._line.erase()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"  # which does not know how to erase a line
