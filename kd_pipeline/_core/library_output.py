"""What libraries print and warn goes to the log, so that the terminal shows what is ours and the user's."""

import faulthandler
import fcntl
import io
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from kd_pipeline._core.text import printable

__all__ = ["LIBRARIES", "TerminalHandler", "libraries_to_log"]

LIBRARIES = "kd_pipeline.libraries"
"""The logger of what they print, at level DEBUG: `train.log` has it, and the terminal does not."""

_logger = logging.getLogger(LIBRARIES)
_MAX_BYTES = 2**20
"""Of one reading; a library that prints more is cut."""
_STDERR = 2
_EXPORTER = "torch.onnx._internal.exporter._registration"
"""Warns of each operator of torchvision that it does without, through a handler of torch's own."""
_FOLDERS = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib", "stdlib")})
_OWN = str(Path(__file__).resolve().parents[1])


@contextmanager
def libraries_to_log() -> Iterator[None]:
    """Keep libraries off stderr while the block runs: C and C++ code by its file descriptor, Python code by its path.

    What they print goes to the logger `LIBRARIES` with the next record of the library's own loggers, and at the end of
    the block. `sys.stderr` still is the terminal: a user's prints and tracebacks, also of a crash, are seen.
    """
    stream = sys.stderr
    if stream is None or not _is_stderr(stream):  # a notebook's, or a test's
        with _warnings_to_log():
            yield
        return
    stream.flush()
    terminal = os.dup(_STDERR)
    was_enabled = faulthandler.is_enabled()
    with (
        os.fdopen(os.memfd_create("stderr"), "rb") as captured,
        io.TextIOWrapper(
            os.fdopen(terminal, "wb", 0), encoding=stream.encoding, errors=stream.errors, write_through=True
        ) as ours,
    ):
        fcntl.fcntl(captured, fcntl.F_SETFL, os.O_APPEND)  # it is cut after each reading
        collector = _Collector(captured.fileno())
        os.dup2(captured.fileno(), _STDERR)
        sys.stderr = ours
        faulthandler.enable(ours)
        parent = logging.getLogger("kd_pipeline")
        parent.addHandler(collector)
        try:
            with _warnings_to_log():
                yield
        finally:
            parent.removeHandler(collector)
            os.dup2(terminal, _STDERR)
            sys.stderr = stream
            if was_enabled:
                faulthandler.enable(stream)
            else:
                faulthandler.disable()
            collector.collect()


class TerminalHandler(logging.Handler):
    """Prints records to what is `sys.stderr` at the time; those that a library's code logged go to `LIBRARIES`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print, or log."""
        if record.name == LIBRARIES:
            return
        if record.name.partition(".")[0] != "kd_pipeline" and _is_library(record.pathname):
            _logger.debug("%s: %s", record.name, printable(record.getMessage()))
        else:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()


class _Collector(logging.Handler):
    """Logs what was written to a file, and empties it, before each record of ours."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Look, unless the record is what was found."""
        if record.name != LIBRARIES:
            self.collect()

    def collect(self) -> None:
        """Log the lines that are new."""
        content = os.pread(self._file, _MAX_BYTES, 0)
        os.ftruncate(self._file, 0)
        for line in content.decode("utf-8", "replace").splitlines():
            if line.strip():
                _logger.debug("%s", printable(line.rstrip()))


@contextmanager
def _warnings_to_log() -> Iterator[None]:
    """Log the warnings that libraries cause; those of the user's code are shown as ever."""
    show = warnings.showwarning

    def show_or_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is None and _is_library(filename):
            _logger.debug("%s: %s (%s:%d)", category.__name__, printable(message), filename, lineno)
        else:
            show(message, category, filename, lineno, file, line)

    def log(record: logging.LogRecord) -> bool:
        _logger.debug("%s: %s", record.name, printable(record.getMessage()))
        return False

    exporter = logging.getLogger(_EXPORTER)
    exporter.addFilter(log)
    warnings.showwarning = show_or_log
    try:
        yield
    finally:
        warnings.showwarning = show
        exporter.removeFilter(log)


def _is_library(path: str) -> bool:
    """Whether a file belongs to an installed package or to Python, or is ours, which says what it has to say itself."""
    if path.startswith(("<frozen ", "<eval_with_key>")):  # torch generates code
        return True
    resolved = os.path.realpath(path)
    return resolved.startswith((_OWN, *_FOLDERS))


def _is_stderr(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == _STDERR)
    except (AttributeError, OSError, ValueError):
        return False
