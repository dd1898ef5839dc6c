"""Import TensorRT or TensorRT-RTX, and pass its log on to Python's logging."""

import logging
from collections import deque
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Literal, TypeVar

from kd_pipeline._core.optional import require
from kd_pipeline._core.text import printable
from kd_pipeline.errors import EngineError, MissingPackageError

__all__ = ["LOWEST_CAPABILITY", "Runtime", "TensorRT", "open_tensorrt", "why_unusable"]

Runtime = Literal["tensorrt", "tensorrt_rtx"]

_logger = logging.getLogger("kd_pipeline.tensorrt")

LOWEST_CAPABILITY = (7, 5)
"""Lowest compute capability of TensorRT 10 and later; TensorRT-RTX lists its own."""
_MOST_ERRORS = 8
"""Error lines to keep of one failure: TensorRT may log many."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One of the two packages, whose Python interfaces are the same as far as this library uses them."""

    module: Any
    runtime: Runtime
    """Name of the package."""
    version: str
    logger: Any
    """The only one in this process, for every call that takes a logger."""

    def take_errors(self) -> str:
        """Return and clear the errors that TensorRT logged since the last call; an empty string if there are none."""
        errors: list[str] = self.logger.take_errors()
        return "; ".join(errors)

    def check(self, result: _Result | None, what: str) -> _Result:
        """Return `result`, or raise if it is a value by which TensorRT reports a failure.

        Args:
            result: what a call returned.
            what: start of the error message, such as "TensorRT cannot run the engine".

        Raises:
            EngineError: `result` is None or False; the message is `what` and the errors that TensorRT logged.
        """
        if result is None or result is False:
            raise EngineError(f"{what}: {self.take_errors() or 'TensorRT gives no reason'}")
        return result


def open_tensorrt(runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto") -> TensorRT:
    """Import TensorRT; `auto` is `tensorrt` if it is installed, else `tensorrt_rtx`.

    Raises:
        MissingPackageError: it is not installed; the message has the command that installs it.
    """
    if runtime != "auto":
        return _open(runtime)
    try:
        return _open("tensorrt")
    except MissingPackageError as tensorrt:
        try:
            return _open("tensorrt_rtx")
        except MissingPackageError as tensorrt_rtx:
            raise MissingPackageError(f"no TensorRT is installed: {tensorrt}, or else {tensorrt_rtx}") from None


def why_unusable(
    capability: tuple[int, int], runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
) -> str | None:
    """Why the installed TensorRT cannot build and run engines for a compute capability; None if it can.

    Args:
        capability: such as `(9, 0)`.
        runtime: as for `open_tensorrt`.
    """
    try:
        tensorrt = open_tensorrt(runtime)
    except MissingPackageError as exc:
        return str(exc)
    name = ".".join(map(str, capability))
    if tensorrt.runtime == "tensorrt_rtx":
        known = tensorrt.module.ComputeCapability
        return (
            None
            if hasattr(known, f"SM{name.replace('.', '')}")
            else f"tensorrt_rtx does not support compute capability {name}"
        )
    return None if capability >= LOWEST_CAPABILITY else f"tensorrt does not support compute capability {name}"


@cache
def _open(runtime: Runtime) -> TensorRT:
    """Cached, because TensorRT keeps the address of the first logger that it gets, and accepts no other."""
    match runtime:
        case "tensorrt":
            module: Any = require("tensorrt", extra="trt")
        case "tensorrt_rtx":
            module = require("tensorrt_rtx", extra="rtx")
    return TensorRT(module, runtime, module.__version__, _make_logger(module.ILogger))


def _make_logger(base: Any) -> Any:
    """Make a TensorRT logger that passes everything on to Python's logging, and keeps errors.

    TensorRT reports a failure by returning None or False, and the reason only to its logger.
    """
    levels = {
        base.INTERNAL_ERROR: logging.ERROR,
        base.ERROR: logging.ERROR,
        base.WARNING: logging.WARNING,
        base.INFO: logging.DEBUG,
    }

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: deque[str] = deque(maxlen=_MOST_ERRORS)
            self._lock = Lock()  # TensorRT logs from its own threads

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is None:  # VERBOSE: thousands of lines per build
                return
            text = printable(msg.strip(), keep="\n")  # it may name the nodes of a stranger's model
            _logger.log(level, "%s", text)
            if level == logging.ERROR:
                with self._lock:
                    self._errors.append(text)

        def take_errors(self) -> list[str]:
            with self._lock:
                errors = list(self._errors)
                self._errors.clear()
            return errors

    return Logger()
