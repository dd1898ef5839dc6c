"""Which TensorRT is installed, and its voice in Python's logging."""

import logging
from collections import deque
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Literal, TypeVar

from kd_pipeline._core.optional import require
from kd_pipeline.errors import EngineError, MissingPackageError

__all__ = ["LOWEST_CAPABILITY", "Runtime", "TensorRT", "open_tensorrt", "why_unusable"]

Runtime = Literal["tensorrt", "tensorrt_rtx"]

_logger = logging.getLogger("kd_pipeline.tensorrt")

LOWEST_CAPABILITY = (7, 5)
"""Of TensorRT 10 and later; TensorRT-RTX names its own."""
_MOST_ERRORS = 8
"""Of one failure; the first ones name the cause, and TensorRT may go on for long."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One of the two packages; their Python interfaces are the same where this library calls them."""

    module: Any
    runtime: Runtime
    """Name of the package."""
    version: str
    logger: Any
    """The only one in this process, to be passed wherever TensorRT wants a logger."""

    def take_errors(self) -> str:
        """What TensorRT has complained about since this was last called, or an empty string."""
        errors: list[str] = self.logger.take_errors()
        return "; ".join(errors)

    def check(self, result: _Result | None, what: str) -> _Result:
        """`result`, unless it is one of the values by which TensorRT says that a call has failed.

        Args:
            result: what a call returned.
            what: what it would mean that the call failed, as the start of a sentence.

        Raises:
            EngineError: `result` is None or False; the message is `what` and TensorRT's own text.
        """
        if result is None or result is False:
            raise EngineError(f"{what}: {self.take_errors() or 'TensorRT does not say why'}")
        return result


def open_tensorrt(runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto") -> TensorRT:
    """Import TensorRT; `auto` takes `tensorrt` where it is installed and else `tensorrt_rtx`.

    Raises:
        MissingPackageError: it is not installed; the message says what to type.
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
    """Why the installed TensorRT builds and runs no engines on GPUs of a compute capability; None where it does.

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
        return None if hasattr(known, f"SM{name.replace('.', '')}") else f"tensorrt_rtx is not made for {name}"
    return None if capability >= LOWEST_CAPABILITY else f"tensorrt is not made for {name}"


@cache
def _open(runtime: Runtime) -> TensorRT:
    """One for the life of the process: TensorRT keeps the first logger that it gets, by address, and no other."""
    match runtime:
        case "tensorrt":
            module: Any = require("tensorrt", extra="trt")
        case "tensorrt_rtx":
            module = require("tensorrt_rtx", extra="rtx")
    return TensorRT(module, runtime, module.__version__, _make_logger(module.ILogger))


def _make_logger(base: Any) -> Any:
    """A logger of TensorRT's that hands everything to Python's, and remembers errors.

    TensorRT tells of a failure by a value, None or False, and tells the reason to its logger alone.
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
            self._lock = Lock()  # TensorRT logs from threads of its own

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is None:  # VERBOSE: thousands of lines in a build
                return
            _logger.log(level, "%s", msg)
            if level == logging.ERROR:
                with self._lock:
                    self._errors.append(msg.strip())

        def take_errors(self) -> list[str]:
            with self._lock:
                errors = list(self._errors)
                self._errors.clear()
            return errors

    return Logger()
