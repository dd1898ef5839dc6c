"""OpenVINO as the teacher's runtime: an ONNX file on a CPU."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.base import Teacher

__all__ = ["OpenVINOTeacher"]

_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


class OpenVINOTeacher(Teacher):
    """An ONNX file compiled by OpenVINO's CPU plugin.

    `precision` is that of the arithmetic, whatever the file's weights are stored in; inputs and outputs keep the
    file's type and outputs are handed over in float32. `num_threads` is the cores of this process unless given.
    """

    def __init__(
        self, onnx: Path, *, precision: str = "fp32", max_batch: int = 1024, num_threads: int | None = None
    ) -> None:
        openvino = require("openvino", extra="cpu")
        file = read_onnx(onnx)
        # Left alone, the plugin picks bfloat16 wherever the CPU has it, and the logits move by some percent.
        hint = next(own for own, name in _PRECISIONS.items() if name == precision)
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_NUM_THREADS"] = str(num_threads or num_cores())
        try:
            compiled = _core().compile_model(file.path, "CPU", options)
        except Exception as exc:
            raise TeacherError(f"OpenVINO cannot load {file.path}: {exc}") from exc
        own = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        found = _PRECISIONS.get(own, own)
        if found != precision:
            raise TeacherError(
                f"OpenVINO on this CPU runs {file.path} in {found}, wanted {precision}; "
                "set the teacher's precision to fp32, which every CPU has"
            )
        self._request = compiled.create_infer_request()
        self._tensor = openvino.Tensor
        self._output_names = file.output_names
        super().__init__(
            backend="openvino",
            precision=found,
            device=torch.device("cpu"),
            images=file.images,
            outputs={name: TensorSpec(spec.shape, torch.float32) for name, spec in file.outputs.items()},
            max_batch=max_batch,
            classes=file.classes,
            fingerprint=file.fingerprint("openvino", found),
        )

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        # OpenVINO reads the images where they lie. It copies each output once into an array of ours: small beside
        # the arithmetic, and it spares us from knowing the shapes in advance.
        arrays = self._request.infer(self._tensor(images.numpy(), shared_memory=True), share_outputs=False)
        return {name: torch.from_numpy(arrays[own]).float() for name, own in self._output_names.items()}

    def _release(self) -> None:
        del self._request


@cache
def _core() -> Any:
    """One for the life of the process.

    The CPU plugin gives its thread a signal stack, and puts the one before it back when its `Core` goes. With two of
    them, closed in the order in which they were opened, that is the freed one of the first, and the next signal, a
    Ctrl-C say, ends the process with a segmentation fault.
    """
    return require("openvino", extra="cpu").Core()
