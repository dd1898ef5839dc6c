"""Open the teacher that settings describe."""

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.features import with_features
from kd_pipeline.models.input_adapter import AdaptInput, Normalization, WantedInput
from kd_pipeline.models.registry import default_input, open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher, why_no_cuda
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings, refuse_unused
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.load import open_engine
from kd_pipeline.teachers.tensorrt.manifest import Profile
from kd_pipeline.teachers.tensorrt.package import why_unusable
from kd_pipeline.teachers.tensorrt.parity import Samples
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["open_teacher"]

_logger = logging.getLogger("kd_pipeline")

_ON_A_CPU = ("openvino", "recorded")
"""What never computes on a GPU."""
_MAX_BATCH = 1024
_SMALL_BATCH = 2
"""That a module on a GPU is tried on where nobody says how many images come."""
_ENGINE_BATCH = 64
"""Of an engine that is built on the way, where neither the settings nor the loader say."""


def open_teacher(
    settings: TeacherSettings | EnsembleSettings | Teacher,
    *,
    module: nn.Module | None = None,
    image_shape: tuple[int, int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    samples: Callable[[], Tensor] | None = None,
    plugins: Collection[str] = (),
    normalization: Normalization | None = None,
) -> Teacher:
    """Open the teacher that `settings` describe, for images `[N, *image_shape]` of `dtype` on `device`.

    A teacher that is open already is handed back, once it is known to take such images.

    Args:
        settings: what to open, or an open teacher.
        module: the model, for the `pytorch` backend.
        image_shape: `(3, H, W)`; needed for a module.
        device: where the images will be.
        dtype: float32 or float16.
        batch_size: images in a call; what an engine that is built on the way is tuned for.
        samples: gives images `[N, 3, H, W]` float32 as the teacher will see them, on which such an engine is compared
            with the float32 file and which give int8 and fp8 their ranges.
        plugins: modules that a model's `factory` may come from.
        normalization: of the images, for an `input_adapter`; ImageNet's unless given. A pretrained model that wants
            another one and gets no adapter is a warning.

    Raises:
        ConfigError: the combination of settings, module and device makes no teacher.
        TeacherError: the model cannot be opened, or takes other images.
        MissingPackageError: the backend's package is not installed.
    """
    wanted = _Wanted(
        image_shape, torch.device(device), dtype, batch_size, samples, plugins, normalization or Normalization()
    )
    match settings:
        case Teacher() if module is not None:
            raise ConfigError("got an open teacher and a module; give one of them")
        case Teacher():
            teacher = settings
        case EnsembleSettings():
            teacher = _open_ensemble(settings, module, wanted)
        case _:
            teacher = _open(settings, module, wanted)
    sizes = image_shape or tuple(size or 1 for size in teacher.images.shape[1:])
    any_such_device = wanted.device.index is None and wanted.device.type == teacher.device.type  # as "cuda" is
    teacher.check_fits((1, *sizes), dtype, teacher.device if any_such_device else wanted.device)
    return teacher


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the teacher will be given."""

    image_shape: tuple[int, int, int] | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    samples: Callable[[], Tensor] | None
    plugins: Collection[str]
    normalization: Normalization


def _open_ensemble(settings: EnsembleSettings, module: nn.Module | None, wanted: _Wanted) -> Teacher:
    if module is not None:
        raise ConfigError("an ensemble opens its members by their settings and got a module; leave it out")
    with ExitStack() as opened:
        members = []
        for member in settings.members:
            members.append(_open(member, None, wanted))
            opened.callback(members[-1].close)
        ensemble = EnsembleTeacher(members, weights=settings.weights, average=settings.average)
        opened.pop_all()
        return ensemble


def _open(settings: TeacherSettings, module: nn.Module | None, wanted: _Wanted) -> Teacher:
    backend, reason = _choose(settings, module, wanted.device)
    refuse_unused(settings, backend)
    if backend not in _ON_A_CPU and wanted.device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"the {backend} backend needs {wanted.device}, and torch sees no GPU; see kd-pipeline doctor")
    if settings.model is not None:
        model = settings.model
        if model.factory is None and model.checkpoint is None and not model.pretrained:
            raise ConfigError("teacher.model has random weights; set its checkpoint or pretrained")
        module = open_model(model, plugins=wanted.plugins)
    teacher: Teacher
    match backend, module, settings.onnx:
        case "pytorch", nn.Module(), None:
            teacher = _open_module(settings, module, wanted)
        case "tensorrt", None, _:
            teacher = _open_tensorrt(settings, wanted)
        case "recorded", None, None:
            if settings.path is None:
                raise ConfigError("the recorded backend replays a recording; set path to the folder that has it")
            teacher = RecordedTeacher(settings.path, device=wanted.device, num_verified=settings.verify)
        case "openvino", None, Path() as onnx:
            if wanted.device.type != "cpu":
                raise ConfigError(
                    f"the openvino backend reads images in CPU memory and they are on {wanted.device}; put the loader "
                    "on the CPU, or take backend: tensorrt or onnxruntime"
                )
            teacher = OpenVINOTeacher(
                onnx,
                precision=settings.precision or "fp32",
                max_batch=settings.max_batch or _MAX_BATCH,
                num_threads=settings.num_threads,
            )
        case "onnxruntime", None, Path() as onnx:
            if wanted.device.type == "cuda" and (obstacle := why_no_cuda()):
                raise ConfigError(f"the onnxruntime backend cannot use {wanted.device}: {obstacle}")
            teacher = OnnxRuntimeTeacher(
                onnx,
                device=wanted.device,
                precision=settings.precision,
                max_batch=settings.max_batch or _MAX_BATCH,
                num_threads=settings.num_threads,
            )
        case _:
            raise ConfigError(
                f"the {backend} backend runs an ONNX file and got a module; export it with "
                "kd_pipeline.export_onnx and set onnx, or take backend: pytorch"
            )
    _logger.info("teacher: %s in %s on %s, %s", backend, teacher.precision, teacher.device, reason)
    return teacher


def _open_module(settings: TeacherSettings, module: nn.Module, wanted: _Wanted) -> Teacher:
    if wanted.image_shape is None:
        raise ConfigError("the pytorch backend must know the size of the images; pass image_shape=(3, H, W)")
    adapter = _adapter(settings, module, wanted)
    if settings.features:
        module = with_features(module, settings.features)
    on_gpu = wanted.device.type == "cuda"
    if settings.cuda_graph and not (on_gpu and wanted.batch_size):
        raise ConfigError(
            f"cuda_graph needs a GPU and a fixed number of images; the images are on {wanted.device}, and batch_size "
            f"is {wanted.batch_size}"
        )
    open_module = partial(
        PyTorchTeacher,
        module if adapter is None else nn.Sequential(adapter, module),
        image_shape=wanted.image_shape,
        device=wanted.device,
        dtype=wanted.dtype,
        precision=settings.precision or (_half_precision(wanted.device) if on_gpu else "fp32"),
        max_batch=settings.max_batch or _MAX_BATCH,
        channels_last=settings.channels_last,
        batch_size=(wanted.batch_size or _SMALL_BATCH) if on_gpu else None,
        cuda_graph=settings.cuda_graph,
    )
    if settings.compile is not None or not on_gpu:
        return open_module(compile=bool(settings.compile))
    try:
        return open_module(compile=True)
    except TeacherError as exc:
        teacher = open_module(compile=False)  # which fails alike where compiling was not the reason
        _logger.warning(
            "torch.compile fails on the teacher, which runs without it (teacher.compile: false spares the attempt): %s",
            exc,
        )
        return teacher


def _half_precision(device: torch.device) -> Literal["bf16", "fp16"]:
    """What a GPU computes in with its fastest units and bfloat16's range, where it has them."""
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _adapter(settings: TeacherSettings, module: nn.Module, wanted: _Wanted) -> AdaptInput | None:
    """What makes the images that `module` was trained on; None where it sees the loader's own."""
    known = default_input(module)
    if isinstance(settings.input_adapter, WantedInput):
        return AdaptInput(settings.input_adapter.adapter(wanted.normalization))
    if settings.input_adapter == "auto":
        if known is None:
            raise ConfigError(
                f"input_adapter: auto takes what timm knows of its networks, and {type(module).__qualname__} does not "
                "say what it was trained on; give mean and std"
            )
        size = known.size[0] if known.is_only_size and known.size != (wanted.image_shape or (0,))[1:] else None
        if size is None and Normalization(*known[:2]) == wanted.normalization:
            return None
        return AdaptInput(WantedInput(mean=known.mean, std=known.std, size=size).adapter(wanted.normalization))
    is_pretrained = settings.model is not None and settings.model.pretrained
    if is_pretrained and known is not None and Normalization(*known[:2]) != wanted.normalization:
        _logger.warning(
            "the teacher was trained on images with mean %s and std %s, and gets images with mean %s and std %s; set "
            "teacher.input_adapter: auto, or mean and std of the transforms",
            known.mean,
            known.std,
            *wanted.normalization,
        )
    return None


def _open_tensorrt(settings: TeacherSettings, wanted: _Wanted) -> Teacher:
    """Open an engine, which is built first where the settings name an ONNX file."""
    if wanted.device.type != "cuda":
        raise ConfigError(
            f"the tensorrt backend reads images in the memory of an NVIDIA GPU and they are on {wanted.device}; put "
            "the loader on a GPU, or take backend: openvino with an ONNX file"
        )
    engine = settings.engine
    if engine is None:
        assert settings.onnx is not None  # as _choose has seen
        largest = settings.max_batch or wanted.batch_size or _ENGINE_BATCH
        profile = Profile(min=1, opt=min(wanted.batch_size or largest, largest), max=largest)
        images = wanted.samples
        engine = build_engine(
            BuildSettings(
                onnx=settings.onnx,
                precision=settings.precision or "fp32",
                half_io=wanted.dtype == torch.float16,
                profiles=(profile,),
                image_size=wanted.image_shape and wanted.image_shape[1],
                runtime=settings.runtime,
            ),
            samples=None if images is None else lambda: Samples(images(), "the training split"),
            report=_logger.info,
        )
    teacher = open_engine(
        engine,
        device=wanted.device,
        runtime=settings.runtime,
        cuda_graph=settings.cuda_graph,
        trust_engine=settings.trust_engine,
    )
    if settings.precision not in (None, teacher.precision):
        teacher.close()
        raise ConfigError(
            f"{engine} runs in {teacher.precision} and the settings ask for {settings.precision}; leave precision out, "
            "or build the engine again"
        )
    return teacher


def _choose(settings: TeacherSettings, module: nn.Module | None, device: torch.device) -> tuple[str, str]:
    """The backend, and why it is that one."""
    named = settings.onnx or settings.engine or settings.path or settings.model
    if module is None and named is None:
        raise ConfigError(
            "no teacher to open: set onnx to an exported file, engine to a built one, model to a network or path to a "
            "recording, or pass a module"
        )
    if module is not None and named is not None:
        raise ConfigError(f"two teachers to open: a module and {named}; give one of them")
    if settings.backend != "auto":
        return settings.backend, "as the settings ask"
    if module is not None:
        return "pytorch", "because the teacher is a module"
    if settings.model is not None:
        return "pytorch", "because the teacher is a model by name"
    if settings.engine is not None:
        return "tensorrt", "because the teacher is an engine"
    if settings.path is not None:
        return "recorded", "because the teacher is a recording"
    if device.type == "cuda":
        return _choose_on_gpu(settings, device)
    return "openvino", "because the teacher is an ONNX file and the images are on the CPU"


def _choose_on_gpu(settings: TeacherSettings, device: torch.device) -> tuple[str, str]:
    """What runs an ONNX file on a GPU, and why it is that."""
    no_tensorrt = None
    if settings.runtime == "auto" and torch.cuda.is_available():
        no_tensorrt = why_unusable(torch.cuda.get_device_capability(device))
    if no_tensorrt is None:
        return "tensorrt", "because the teacher is an ONNX file and the images are on a GPU"
    if (no_onnxruntime := why_no_cuda()) is None:
        return "onnxruntime", f"because the teacher is an ONNX file and no TensorRT runs on this GPU ({no_tensorrt})"
    raise ConfigError(
        f"nothing that is installed runs {settings.onnx} on {torch.cuda.get_device_name(device)}. TensorRT: "
        f"{no_tensorrt}. ONNX Runtime: {no_onnxruntime}. Install one of them, or give the teacher as a network "
        "(teacher.model) or a module, which PyTorch runs"
    )
