"""The value ranges of an ONNX model, measured on sample images."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.edit import add_constant
from kd_pipeline.onnx.file import OnnxFile
from kd_pipeline.onnx.session import FATAL, open_session
from kd_pipeline.onnx.weights import shortened

__all__ = ["measure_ranges"]

_BATCH_SIZE = 8
"""Images per run, which bounds the memory."""


def measure_ranges(
    file: OnnxFile, model: Any, values: Sequence[Any], samples: Tensor, *, finite_only: bool = False
) -> NDArray[np.float32]:
    """The largest magnitude of each of `values` over the samples, in their order.

    Args:
        file: the file of the model.
        model: an `onnx_ir.Model`, loaded for this purpose: its outputs are replaced.
        values: float32 `onnx_ir.Value`s of its main graph.
        samples: `[N, 3, H, W]` images.
        finite_only: skip infinities and NaN instead of returning them.

    Raises:
        EngineError: ONNX Runtime cannot run the model; the message holds its own.
    """
    _return_magnitudes(model, values, finite_only)
    with tempfile.TemporaryDirectory(prefix="kd-pipeline-") as folder:
        path = Path(folder, "ranges.onnx")
        require("onnx_ir", extra="cpu").save(model, path, external_data="weights")
        try:
            session = open_session(path, log_level=FATAL)
            batches = torch.split(samples.detach().cpu(), _BATCH_SIZE)
            magnitudes = [session.run(None, {file.input_name: images.numpy()}) for images in batches]
        except Exception as exc:
            raise EngineError(
                f"ONNX Runtime cannot run {file.path} on {len(samples)} samples: {shortened(exc)}"
            ) from exc
    largest: NDArray[np.float32] = (np.fmax if finite_only else np.maximum).reduce(magnitudes)
    return largest


def _return_magnitudes(model: Any, values: Sequence[Any], finite_only: bool) -> None:
    """Make the largest magnitude of each of `values` the only outputs of `model`."""
    ir = require("onnx_ir", extra="cpu")
    zero = add_constant(model, "kd_pipeline.zero", np.zeros((), np.float32)) if finite_only else None
    model.graph.outputs.clear()
    for index, value in enumerate(values):
        nodes = [ir.node("Abs", [value])]
        if finite_only:
            infinite = ir.node("IsInf", [value])
            nodes += [infinite, ir.node("Where", [*infinite.outputs, zero, *nodes[0].outputs])]
        output = ir.val(f"kd_pipeline.largest.{index}", ir.DataType.FLOAT, [])
        nodes.append(ir.node("ReduceMax", nodes[-1].outputs, {"keepdims": 0}, outputs=[output]))
        model.graph.extend(nodes)
        model.graph.outputs.append(output)
