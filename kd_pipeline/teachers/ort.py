"""ONNX Runtime as the teacher's runtime: an ONNX file on a CPU, in the precision it was exported in."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_pipeline.errors import TeacherError
from kd_pipeline.optional import require
from kd_pipeline.teachers.base import Teacher, TensorSpec
from kd_pipeline.teachers.onnx_file import read_onnx
from kd_pipeline.threads import num_cores

__all__ = ["OnnxRuntimeTeacher"]

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}
_ERRORS_ONLY = 3


class OnnxRuntimeTeacher(Teacher):
    """An ONNX file run by ONNX Runtime's CPU provider.

    `precision` must be that of the file's weights, because the runtime changes nothing about it. `num_threads` is the
    cores of this process unless given. `as_written` runs each node as the file has it: the runtime's optimiser would
    join nodes, and leave out roundings between them that a file asks for to act out another precision.
    """

    def __init__(
        self,
        onnx: Path,
        *,
        precision: str = "fp32",
        max_batch: int = 1024,
        num_threads: int | None = None,
        as_written: bool = False,
    ) -> None:
        onnxruntime = require("onnxruntime", extra="cpu")
        file = read_onnx(onnx)
        if file.precision != precision:
            raise TeacherError(
                f"{file.path} holds {file.precision} weights, wanted {precision}; ONNX Runtime runs a file as it is: "
                f"set the teacher's precision to {file.precision}, or export the teacher in {precision}"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = num_threads or num_cores()
        try:
            self._session = onnxruntime.InferenceSession(file.path, options, providers=["CPUExecutionProvider"])
        except Exception as exc:
            raise TeacherError(f"ONNX Runtime cannot load {file.path}: {exc}") from exc
        self._file = file
        super().__init__(
            backend="onnxruntime",
            precision=precision,
            device=torch.device("cpu"),
            images=file.images,
            outputs={name: TensorSpec(spec.shape, torch.float32) for name, spec in file.outputs.items()},
            max_batch=max_batch,
            classes=file.classes,
            fingerprint=file.fingerprint("onnxruntime", precision),
        )

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        binding = self._session.io_binding()
        binding.bind_input(
            self._file.input_name, "cpu", 0, _NUMPY_DTYPES[images.dtype], tuple(images.shape), images.data_ptr()
        )
        for own in self._file.output_names.values():
            binding.bind_output(own)
        self._session.run_with_iobinding(binding)
        # ONNX Runtime read the images where they lie. Each output is copied once, out of the runtime's own memory:
        # small beside the arithmetic, and it spares us from knowing the shapes in advance.
        values = (torch.from_numpy(value.numpy()) for value in binding.get_outputs())
        return {name: value.to(torch.float32, copy=True) for name, value in zip(self.outputs, values, strict=True)}

    def _release(self) -> None:
        del self._session
