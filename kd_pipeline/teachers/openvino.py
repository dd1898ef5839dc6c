"""OpenVINO as the teacher's runtime: an ONNX file on a CPU."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.optional import require
from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.weights import shortened
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.example import input_name

__all__ = ["OpenVINOTeacher", "openvino_precisions"]

_TRAINS = "Training mode is not supported"
"""In what OpenVINO says about dropout in training mode."""
_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
_LAYERS = {"Convolution", "GroupConvolution", "FullyConnected"}
"""What OpenVINO calls layers with weights."""


class OpenVINOTeacher(Teacher):
    """An ONNX file run by OpenVINO's CPU plugin."""

    def __init__(
        self, onnx: Path, *, precision: str = "fp32", max_batch: int = 1024, num_threads: int | None = None
    ) -> None:
        """Compile the file `onnx` for this CPU.

        Args:
            onnx: the exported teacher, with weights of any precision.
            precision: that of the arithmetic: `fp32`, `bf16` or `fp16`; `int8` for a file with Q/DQ nodes, whose other
                nodes run in bfloat16 if the CPU has it, else in float32.
            max_batch: largest number of images in one call.
            num_threads: defaults to the cores of this process.

        Raises:
            TeacherError: the file is no teacher, OpenVINO cannot load it, or does not run it in the precision.
            MissingPackageError: OpenVINO is not installed.
        """
        openvino = require("openvino", extra="cpu")
        file = read_onnx(onnx)
        options = {
            # By default the plugin takes bfloat16 where the CPU has it, which changes the logits by some percent.
            "INFERENCE_PRECISION_HINT": _hint(precision),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(num_threads or num_cores()),
        }
        with file.private_copy() as copy:
            try:
                compiled = _core().compile_model(copy, "CPU", options)
            except Exception as exc:
                advice = "export it in eval mode (call module.eval() before torch.onnx.export). "
                reason = f"{advice if _TRAINS in str(exc) else ''}{shortened(exc, copy, file.path)}"
                raise TeacherError(f"OpenVINO cannot load {file.path}: {reason}") from exc
        found = _check_precision(compiled, file.path, precision)
        self._request = compiled.create_infer_request()
        self._tensor = openvino.Tensor
        self._output_names = file.output_names
        super().__init__(
            backend="openvino",
            precision=found,
            device=torch.device("cpu"),
            inputs={input_name(file.images): file.images},
            outputs={name: replace(spec, dtype=torch.float32) for name, spec in file.outputs.items()},
            max_batch=max_batch,
            classes=file.classes,
            fingerprint=file.fingerprint("openvino", found),
        )
        self.num_parameters = file.num_parameters

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        # OpenVINO reads the images in place. It copies each output into a new array, which costs little next to the
        # arithmetic and needs no shapes in advance.
        arrays = self._request.infer(self._tensor(images.numpy(), shared_memory=True), share_outputs=False)
        return {name: torch.from_numpy(arrays[self._output_names[name]]).float() for name in self.outputs}

    def _release(self) -> None:
        del self._request


def openvino_precisions() -> frozenset[str]:
    """Those of `fp32`, `bf16` and `fp16` that OpenVINO computes in on this CPU.

    Raises:
        MissingPackageError: OpenVINO is not installed.
    """
    capabilities: list[str] = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return frozenset(_PRECISIONS.values()) & {name.lower() for name in capabilities}


def _hint(precision: str) -> str:
    """OpenVINO's name of the precision of what has no Q/DQ nodes."""
    if precision == "int8":
        # Measured with AMX: ViT-S is 1.4 times as fast as with float32 around its int8 layers, and ResNet-50 as fast. A
        # trained ResNet's and ViT's error, 1 to 2 % of the logits' spread, did not change in two digits.
        return "bf16" if "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    return {name: own for own, name in _PRECISIONS.items()}[precision]


def _check_precision(compiled: Any, path: Path, precision: str) -> str:
    """The precision in which OpenVINO runs the model.

    Raises:
        TeacherError: it is not the wanted one.
    """
    advice = "set the teacher's precision to fp32, which every CPU has"
    if precision == "int8":
        layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        types = [info["runtimePrecision"].astype(str) for info in layers if info["layerType"].astype(str) in _LAYERS]
        num_int8 = sum(name in ("i8", "u8") for name in types)
        if 2 * num_int8 <= len(types):
            raise TeacherError(
                f"OpenVINO on this CPU runs {num_int8} of {len(types)} layers of {path} in int8; {advice}"
            )
        return precision
    own: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    found = _PRECISIONS.get(own, own)
    if found != precision:
        raise TeacherError(f"OpenVINO on this CPU runs {path} in {found}, wanted {precision}; {advice}")
    return found


@cache
def _core() -> Any:
    """The only `openvino.Core` of this process.

    The CPU plugin sets a signal stack for its thread, and restores the previous one when its `Core` is freed. If two
    are freed in the order in which they were made, the restored stack is the freed one of the first, and the next
    signal, such as a Ctrl-C, ends the process with a segmentation fault.
    """
    return require("openvino", extra="cpu").Core()
