"""ONNX Runtime sessions."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.optional import require
from kd_pipeline.onnx.outline import read_outline

__all__ = ["ERROR", "FATAL", "fused_types", "open_session"]

ERROR, FATAL = 3, 4
"""ONNX Runtime's log levels: errors, and only those that end the process."""


def open_session(
    path: Path | str,
    *,
    providers: Sequence[Any] = (),
    num_threads: int | None = None,
    optimize: bool = True,
    log_level: int = ERROR,
    save_optimized: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` for the file `path`.

    Args:
        path: the ONNX file.
        providers: execution providers in order of preference; nodes that none of them supports run on the CPU.
        num_threads: threads of the CPU provider; defaults to the cores of this process.
        optimize: whether the runtime may fuse nodes. If False, it runs each node as the file has it.
        log_level: `ERROR` or `FATAL`.
        save_optimized: where to write the graph that the runtime has made of the file.

    Raises:
        MissingPackageError: `onnxruntime` is not installed.
        Exception: the runtime cannot open the file; its error classes have no common base.
    """
    onnxruntime = require("onnxruntime", extra="cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_level
    options.intra_op_num_threads = num_threads or num_cores()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    return onnxruntime.InferenceSession(path, options, providers=[*providers, "CPUExecutionProvider"])


def fused_types(path: Path) -> list[str]:
    """The types of the nodes that ONNX Runtime makes of the file `path` on a CPU."""
    with tempfile.TemporaryDirectory(prefix="kd-pipeline-") as folder:
        optimized = Path(folder, "optimized.onnx")
        # FATAL, as it warns that the file is for this CPU.
        open_session(path, num_threads=1, log_level=FATAL, save_optimized=optimized)
        with optimized.open("rb") as stream:
            outline = read_outline(stream, optimized.stat().st_size)
    return [str(node.op_type) for node in outline.model.graph.node]
