"""Teachers: a frozen model behind one contract, run by PyTorch, OpenVINO or ONNX Runtime."""

import logging
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.settings import Settings
from kd_pipeline.teachers.base import Teacher, TensorSpec
from kd_pipeline.teachers.ort import OnnxRuntimeTeacher
from kd_pipeline.teachers.ov import OpenVINOTeacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher

__all__ = ["Teacher", "TeacherSettings", "TensorSpec", "open_teacher"]

_logger = logging.getLogger("kd_pipeline")

_USED_BY_ALL = {"backend", "precision", "max_batch"}
_ALSO_USED_BY = {
    "pytorch": {"channels_last", "compile"},
    "openvino": {"onnx", "num_threads"},
    "onnxruntime": {"onnx", "num_threads"},
}


class TeacherSettings(Settings):
    """Which runtime runs the teacher, and how. A setting that the chosen runtime does not use is an error."""

    backend: Literal["auto", "pytorch", "openvino", "onnxruntime"] = "auto"
    """`auto` takes PyTorch for a module and OpenVINO for an ONNX file on a CPU."""
    onnx: Path | None = None
    """The exported teacher, for every backend but `pytorch`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the arithmetic; `onnxruntime` cannot change it and needs a file that already has it."""
    max_batch: int = Field(default=1024, ge=1)
    """Largest number of images in one call."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU runtimes; all cores unless given."""
    channels_last: bool = True
    """Run PyTorch's convolutions in NHWC, which is the faster layout for most of them."""
    compile: bool = False
    """Compile the PyTorch module with `torch.compile`; worth it from a few thousand images on."""

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        if self.backend != "auto":
            _refuse_unused(self, self.backend)
        return self


def open_teacher(
    settings: TeacherSettings | Teacher,
    *,
    module: nn.Module | None = None,
    image_shape: tuple[int, int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """Open the teacher that `settings` describe, for images `[N, *image_shape]` of `dtype` on `device`.

    A teacher that is open already is handed back, once it is known to take such images.

    Args:
        settings: what to open, or an open teacher.
        module: the model, for the `pytorch` backend.
        image_shape: `(3, H, W)`; needed for a module.
        device: where the images will be.
        dtype: float32 or float16.

    Raises:
        ConfigError: the combination of settings, module and device makes no teacher.
        TeacherError: the model cannot be opened, or takes other images.
        MissingPackageError: the backend's package is not installed.
    """
    device = torch.device(device)
    if not isinstance(settings, Teacher):
        teacher = _open(settings, module, image_shape, device, dtype)
    elif module is None:
        teacher = settings
    else:
        raise ConfigError("got an open teacher and a module; give one of them")
    sizes = image_shape or tuple(size or 1 for size in teacher.images.shape[1:])
    any_such_device = device.index is None and device.type == teacher.device.type  # as "cuda" is
    teacher.check_fits((1, *sizes), dtype, teacher.device if any_such_device else device)
    return teacher


def _open(
    settings: TeacherSettings,
    module: nn.Module | None,
    image_shape: tuple[int, int, int] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Teacher:
    backend, reason = _choose(settings, module, device)
    _refuse_unused(settings, backend)
    teacher: Teacher
    match backend, module, settings.onnx:
        case "pytorch", nn.Module(), None:
            if image_shape is None:
                raise ConfigError("the pytorch backend must know the size of the images; pass image_shape=(3, H, W)")
            teacher = PyTorchTeacher(
                module,
                image_shape=image_shape,
                device=device,
                dtype=dtype,
                precision=settings.precision,
                max_batch=settings.max_batch,
                channels_last=settings.channels_last,
                compile=settings.compile,
            )
        case (("openvino" | "onnxruntime"), None, Path() as onnx):
            if device.type != "cpu":
                raise ConfigError(
                    f"the {backend} backend reads images in CPU memory and they are on {device}; put the loader on the "
                    "CPU, or take backend: pytorch with a module"
                )
            runtime = OpenVINOTeacher if backend == "openvino" else OnnxRuntimeTeacher
            teacher = runtime(
                onnx, precision=settings.precision, max_batch=settings.max_batch, num_threads=settings.num_threads
            )
        case _:
            raise ConfigError(
                f"the {backend} backend runs an ONNX file and got a module; export it with "
                "kd_pipeline.engine.export_onnx and set onnx, or take backend: pytorch"
            )
    _logger.info("teacher: %s in %s on %s, %s", backend, teacher.precision, teacher.device, reason)
    return teacher


def _choose(settings: TeacherSettings, module: nn.Module | None, device: torch.device) -> tuple[str, str]:
    """The backend, and why it is that one."""
    if module is None and settings.onnx is None:
        raise ConfigError("no teacher to open: set onnx to an exported file, or pass a module")
    if module is not None and settings.onnx is not None:
        raise ConfigError(f"two teachers to open: a module and onnx: {settings.onnx}; give one of them")
    if settings.backend != "auto":
        return settings.backend, "as the settings ask"
    if module is not None:
        return "pytorch", "because the teacher is a module"
    if device.type == "cpu":
        return "openvino", "because the teacher is an ONNX file and the images are on the CPU"
    raise ConfigError(
        f"no backend runs the ONNX file {settings.onnx} on {device}: OpenVINO and ONNX Runtime serve the CPU only; "
        "pass the teacher as a module to run it with PyTorch there, or put the loader on the CPU"
    )


def _refuse_unused(settings: TeacherSettings, backend: str) -> None:
    used = _USED_BY_ALL | _ALSO_USED_BY[backend]
    for name, field in TeacherSettings.model_fields.items():
        if name not in used and (value := getattr(settings, name)) != field.default:
            raise ConfigError(f"{name}: {value} means nothing to the {backend} backend; remove it or change backend")
