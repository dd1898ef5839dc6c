"""Open ONNX Runtime on an ONNX file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.optional import require

__all__ = ["ERRORS", "FATAL", "open_session"]

ERRORS, FATAL = 3, 4
"""ONNX Runtime's log levels: from errors on, and only what ends the process."""


def open_session(
    path: Path | str,
    *,
    providers: Sequence[Any] = (),
    num_threads: int | None = None,
    optimize: bool = True,
    log_level: int = ERRORS,
) -> Any:
    """An `onnxruntime.InferenceSession` on the file `path`.

    Args:
        path: the ONNX file.
        providers: execution providers to use where they support a node; the CPU's runs the rest.
        num_threads: threads of the CPU provider; defaults to the cores of this process.
        optimize: let the runtime fuse nodes. Without, each node runs as the file has it.
        log_level: `ERRORS` or `FATAL`.

    Raises:
        MissingPackageError: `onnxruntime` is not installed.
        Exception: the runtime cannot open the file; it has many error classes and no base of its own.
    """
    onnxruntime = require("onnxruntime", extra="cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_level
    options.intra_op_num_threads = num_threads or num_cores()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=[*providers, "CPUExecutionProvider"])
