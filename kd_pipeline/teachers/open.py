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
from kd_pipeline.models.input_adapter import ExpectedInput, InputAdapterLayer, Normalization
from kd_pipeline.models.registry import open_model, pretrained_input
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher, why_no_cuda
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from kd_pipeline.teachers.outputs_check import NUM_IMAGES, check_outputs
from kd_pipeline.teachers.parity import CalibrationSet
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings, is_recording, refuse_unused
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.load import open_engine
from kd_pipeline.teachers.tensorrt.manifest import Profile
from kd_pipeline.teachers.tensorrt.package import why_unusable
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["open_teacher"]

_logger = logging.getLogger("kd_pipeline")

_MAX_BATCH = 1024
_UNKNOWN_SIZE = 224
"""Height and width of the images for a check, if nobody knows them."""
_SMALL_BATCH = 2
"""Batch size of a module's first call on a GPU, if the loader's is unknown."""
_ENGINE_BATCH = 64
"""Largest batch of an engine built from an ONNX file, if neither settings nor loader have one."""


def open_teacher(
    settings: TeacherSettings | EnsembleSettings | Teacher,
    *,
    module: nn.Module | None = None,
    image_shape: tuple[int, int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    calibration_images: Callable[[], Tensor] | None = None,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    normalization: Normalization | None = None,
    strict: bool = False,
) -> Teacher:
    """Open the teacher that `settings` describe, for images `[N, *image_shape]` of `dtype` on `device`.

    An open teacher is checked against these images and returned.

    Every teacher, and each member of an ensemble, is run on a few generated images. It has to return a row for each.
    Outputs that change when it runs again, or with the rest of a batch, that are probabilities instead of logits, hold
    NaN, or are the same for all images become its `problems`, and a warning each.

    Args:
        settings: what to open, or an open teacher.
        module: the model, for the `pytorch` backend.
        image_shape: `(3, H, W)`; required for a module.
        device: device of the images.
        dtype: float32 or float16.
        batch_size: usual number of images in one call; an engine built from an ONNX file is tuned for it.
        calibration_images: returns images `[N, 3, H, W]` float32 on the CPU, normalized for the teacher. An engine
            built from an ONNX file is checked on them, and takes the ranges of int8 and fp8 from them.
        plugins: modules that a model's `factory` may come from.
        trust_engines: sha256 of engines to load although somebody else could have written them, or they have no
            manifest. A config file is data and cannot grant this itself: pass what the user typed.
        normalization: of the images, for an `input_adapter`; defaults to ImageNet's. A warning is logged if a
            pretrained model was trained with a different one and has no adapter.
        strict: raise an error for what would be a warning about its outputs.

    Raises:
        ConfigError: settings, module and device do not go together, or the settings are of a recording.
        TeacherError: the model cannot be opened, takes different images, returns more or fewer rows than images, or,
            if `strict`, has problems.
        MissingPackageError: the package of the backend is not installed.
    """
    inputs = _Inputs(
        image_shape,
        torch.device(device),
        dtype,
        batch_size,
        calibration_images,
        plugins,
        trust_engines,
        normalization or Normalization(),
        strict,
    )
    match settings:
        case Teacher() if module is not None:
            raise ConfigError("got an open teacher and a module; give one of them")
        case TeacherSettings() if is_recording(settings):
            raise ConfigError(
                "backend: recorded has the outputs for the images of one training and runs on no others; give "
                "KDDataLoader a kd_pipeline.Recording(path) as its teacher"
                + ("" if module is None else ", or use backend: pytorch for the module")
            )
        case Teacher():
            _check_fits(settings, inputs)
            _examine(settings, inputs)
            return settings
        case EnsembleSettings():
            return _open_ensemble(settings, module, inputs)
        case _:
            return _open_checked(settings, module, inputs)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The images that the teacher will get, and what else is needed to open it for them."""

    image_shape: tuple[int, int, int] | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    calibration_images: Callable[[], Tensor] | None
    plugins: Collection[str]
    trust_engines: Collection[str]
    normalization: Normalization
    strict: bool


def _check_fits(teacher: Teacher, inputs: _Inputs) -> None:
    sizes = inputs.image_shape or tuple(size or 1 for size in teacher.images.shape[1:])
    has_no_index = inputs.device.index is None and inputs.device.type == teacher.device.type  # "cuda" is any GPU
    teacher.check_fits((1, *sizes), inputs.dtype, teacher.device if has_no_index else inputs.device)


def _open_checked(settings: TeacherSettings, module: nn.Module | None, inputs: _Inputs) -> Teacher:
    """Open a single teacher, and check it on a few images."""
    with ExitStack() as opened:
        teacher = _open(settings, module, inputs)
        opened.callback(teacher.close)
        _check_fits(teacher, inputs)
        # Each size that a TensorRT engine replays as a CUDA graph takes memory of its own.
        _examine(teacher, inputs, one_size=settings.cuda_graph and teacher.backend == "tensorrt")
        opened.pop_all()
        return teacher


def _examine(teacher: Teacher, inputs: _Inputs, *, one_size: bool = False) -> None:
    """Run `teacher` on a few images, and log what is wrong with its outputs."""
    channels, height, width = inputs.image_shape or teacher.images.shape[1:]
    teacher.problems = check_outputs(
        teacher,
        image_shape=(channels or 3, height or _UNKNOWN_SIZE, width or _UNKNOWN_SIZE),
        normalization=inputs.normalization,
        num_images=(inputs.batch_size or teacher.max_batch) if one_size else NUM_IMAGES,
        also_alone=not one_size,
    )
    if teacher.problems and inputs.strict:
        raise TeacherError(
            f"{'. '.join(teacher.problems)}. Correct it, or open it anyway with "
            "strict=False (in a config: probe.strict: false)"
        )
    for problem in teacher.problems:
        _logger.warning("%s", problem)


def _open_ensemble(settings: EnsembleSettings, module: nn.Module | None, inputs: _Inputs) -> Teacher:
    if module is not None:
        raise ConfigError("an ensemble opens its members from their settings, and got a module; leave it out")
    with ExitStack() as opened:
        members = []
        for member in settings.members:
            members.append(_open_checked(member, None, inputs))
            opened.callback(members[-1].close)
        ensemble = EnsembleTeacher(members, weights=settings.weights, average=settings.average)
        opened.pop_all()
        return ensemble


def _open(settings: TeacherSettings, module: nn.Module | None, inputs: _Inputs) -> Teacher:
    backend, reason = _choose(settings, module, inputs.device)
    refuse_unused(settings, backend)
    if backend != "openvino" and inputs.device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"the {backend} backend needs {inputs.device}, and torch sees no GPU; see kd-pipeline doctor")
    if settings.model is not None:
        model = settings.model
        if model.factory is None and model.checkpoint is None and not model.pretrained:
            raise ConfigError("teacher.model has random weights; set its checkpoint or pretrained")
        if model.reset:
            raise ConfigError(
                f"teacher.model.reset leaves random weights in {', '.join(model.reset)}; remove it, or train the "
                "teacher first with stage=teacher"
            )
        module = open_model(model, plugins=inputs.plugins)
    teacher: Teacher
    match backend, module, settings.onnx:
        case "pytorch", nn.Module(), None:
            teacher = _open_module(settings, module, inputs)
        case "tensorrt", None, _:
            teacher = _open_tensorrt(settings, inputs)
        case "openvino", None, Path() as onnx:
            if inputs.device.type != "cpu":
                raise ConfigError(
                    f"the openvino backend reads images in CPU memory and they are on {inputs.device}; put the loader "
                    "on the CPU, or use backend: tensorrt or onnxruntime"
                )
            teacher = OpenVINOTeacher(
                onnx,
                precision=settings.precision or "fp32",
                max_batch=settings.max_batch or _MAX_BATCH,
                num_threads=settings.num_threads,
            )
        case "onnxruntime", None, Path() as onnx:
            if inputs.device.type == "cuda" and (obstacle := why_no_cuda()):
                raise ConfigError(f"the onnxruntime backend cannot use {inputs.device}: {obstacle}")
            teacher = OnnxRuntimeTeacher(
                onnx,
                device=inputs.device,
                precision=settings.precision,
                max_batch=settings.max_batch or _MAX_BATCH,
                num_threads=settings.num_threads,
            )
        case _:
            raise ConfigError(
                f"the {backend} backend runs an ONNX file and got a module; export it with "
                "kd_pipeline.export_onnx and set onnx, or use backend: pytorch"
            )
    _logger.info("teacher: %s in %s on %s, %s", backend, teacher.precision, teacher.device, reason)
    return teacher


def _open_module(settings: TeacherSettings, module: nn.Module, inputs: _Inputs) -> Teacher:
    if inputs.image_shape is None:
        raise ConfigError("the pytorch backend needs the size of the images; pass image_shape=(3, H, W)")
    adapter = _adapter(settings, module, inputs)
    if settings.features:
        module = with_features(module, settings.features)
    on_gpu = inputs.device.type == "cuda"
    if settings.cuda_graph and not (on_gpu and inputs.batch_size):
        raise ConfigError(
            f"cuda_graph needs a GPU and a fixed number of images; the images are on {inputs.device}, and batch_size "
            f"is {inputs.batch_size}; remove it, or set both"
        )
    open_module = partial(
        PyTorchTeacher,
        module if adapter is None else nn.Sequential(adapter, module),
        image_shape=inputs.image_shape,
        device=inputs.device,
        dtype=inputs.dtype,
        precision=settings.precision or (_half_precision(inputs.device) if on_gpu else "fp32"),
        max_batch=settings.max_batch or _MAX_BATCH,
        channels_last=settings.channels_last,
        batch_size=(inputs.batch_size or _SMALL_BATCH) if on_gpu else None,
        cuda_graph=settings.cuda_graph,
    )
    if settings.compile is not None or not on_gpu:
        return open_module(compile=bool(settings.compile))
    try:
        return open_module(compile=True)
    except TeacherError as exc:
        teacher = open_module(compile=False)  # fails the same way if compiling was not the reason
        _logger.warning(
            "torch.compile fails on the teacher, which runs without it (set teacher.compile: false to skip it): %s",
            exc,
        )
        return teacher


def _half_precision(device: torch.device) -> Literal["bf16", "fp16"]:
    """The precision of the GPU's fastest units, with bfloat16's range if it has it."""
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _adapter(settings: TeacherSettings, module: nn.Module, inputs: _Inputs) -> InputAdapterLayer | None:
    """The layer that makes the images that `module` was trained on; None if it gets the loader's own."""
    known = pretrained_input(module)
    if isinstance(settings.input_adapter, ExpectedInput):
        return InputAdapterLayer(settings.input_adapter.adapter(inputs.normalization))
    if settings.input_adapter == "auto":
        if known is None:
            raise ConfigError(
                f"input_adapter: auto uses what timm knows of its networks, and {type(module).__qualname__} does not "
                "say what it was trained on; give mean and std"
            )
        size = known.size[0] if known.fixed_input_size and known.size != (inputs.image_shape or (0,))[1:] else None
        if size is None and Normalization(*known[:2]) == inputs.normalization:
            return None
        return InputAdapterLayer(ExpectedInput(mean=known.mean, std=known.std, size=size).adapter(inputs.normalization))
    is_pretrained = settings.model is not None and settings.model.pretrained
    if is_pretrained and known is not None and Normalization(*known[:2]) != inputs.normalization:
        _logger.warning(
            "the teacher was trained on images with mean %s and std %s, and gets images with mean %s and std %s; set "
            "teacher.input_adapter: auto, or mean and std of the transforms",
            known.mean,
            known.std,
            *inputs.normalization,
        )
    return None


def _open_tensorrt(settings: TeacherSettings, inputs: _Inputs) -> Teacher:
    """Open an engine, and build it first if the settings name an ONNX file."""
    if inputs.device.type != "cuda":
        raise ConfigError(
            f"the tensorrt backend reads images in the memory of an NVIDIA GPU and they are on {inputs.device}; put "
            "the loader on a GPU, or use backend: openvino with an ONNX file"
        )
    engine = settings.engine
    if engine is None:
        assert settings.onnx is not None  # _choose has checked it
        largest = settings.max_batch or inputs.batch_size or _ENGINE_BATCH
        profile = Profile(min=1, opt=min(inputs.batch_size or largest, largest), max=largest)
        images = inputs.calibration_images
        engine = build_engine(
            BuildSettings(
                onnx=settings.onnx,
                precision=settings.precision or "fp32",
                half_io=inputs.dtype == torch.float16,
                profiles=(profile,),
                image_size=inputs.image_shape and inputs.image_shape[1],
                runtime=settings.runtime,
            ),
            calibration_set=None if images is None else lambda: CalibrationSet(images(), "the training split"),
            report=_logger.info,
        )
    teacher = open_engine(
        engine,
        device=inputs.device,
        runtime=settings.runtime,
        cuda_graph=settings.cuda_graph,
        trust_engines=inputs.trust_engines,
    )
    if settings.precision not in (None, teacher.precision):
        teacher.close()
        raise ConfigError(
            f"{engine} runs in {teacher.precision} and the settings ask for {settings.precision}; leave precision out, "
            "or build the engine again"
        )
    return teacher


def _choose(settings: TeacherSettings, module: nn.Module | None, device: torch.device) -> tuple[str, str]:
    """The backend, and the reason for it."""
    named = settings.onnx or settings.engine or settings.model
    if module is None and named is None:
        raise ConfigError(
            "no teacher to open: set onnx to an exported file, engine to a built one or model to a network, or pass a "
            "module"
        )
    if module is not None and named is not None:
        raise ConfigError(f"two teachers to open: a module and {named}; give one of them")
    if settings.backend != "auto":
        return settings.backend, "as the settings ask"
    for given, backend, kind in (
        (module, "pytorch", "a module"),
        (settings.model, "pytorch", "a model by name"),
        (settings.engine, "tensorrt", "an engine"),
    ):
        if given is not None:
            return backend, f"because the teacher is {kind}"
    if device.type == "cuda":
        return _choose_on_gpu(settings, device)
    return "openvino", "because the teacher is an ONNX file and the images are on the CPU"


def _choose_on_gpu(settings: TeacherSettings, device: torch.device) -> tuple[str, str]:
    """The backend of an ONNX file on a GPU, and the reason for it."""
    no_tensorrt = None
    if settings.runtime == "auto" and torch.cuda.is_available():
        no_tensorrt = why_unusable(torch.cuda.get_device_capability(device))
    if no_tensorrt is None:
        return "tensorrt", "because the teacher is an ONNX file and the images are on a GPU"
    if (no_onnxruntime := why_no_cuda()) is None:
        return "onnxruntime", f"because the teacher is an ONNX file and no TensorRT runs on this GPU ({no_tensorrt})"
    raise ConfigError(
        f"no installed runtime runs {settings.onnx} on {torch.cuda.get_device_name(device)}. TensorRT: {no_tensorrt}. "
        f"ONNX Runtime: {no_onnxruntime}. Install one of them, or give the teacher as a network (teacher.model) or a "
        "module, which PyTorch runs"
    )
