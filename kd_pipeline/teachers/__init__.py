"""Teachers: a frozen model behind one contract, run by PyTorch, OpenVINO, ONNX Runtime or TensorRT, or recorded."""

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.input_adapter import AdaptInput, Normalisation, WantedInput
from kd_pipeline.models import ModelSettings, default_input, open_model
from kd_pipeline.settings import Settings
from kd_pipeline.teachers.base import Teacher, TensorSpec
from kd_pipeline.teachers.engine_file import Precision, Profile
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.ort import OnnxRuntimeTeacher, why_no_cuda
from kd_pipeline.teachers.ov import OpenVINOTeacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.recorded import RecordedTeacher
from kd_pipeline.tensorrt_package import why_unusable

__all__ = ["EnsembleSettings", "Teacher", "TeacherSettings", "TensorSpec", "open_teacher"]

_logger = logging.getLogger("kd_pipeline")

_USED_BY_ALL = {"backend"}
_USED_BY_RUNTIMES = _USED_BY_ALL | {"precision", "max_batch"}
_USED_BY = {
    "pytorch": _USED_BY_RUNTIMES | {"model", "features", "input_adapter", "channels_last", "compile", "cuda_graph"},
    "openvino": _USED_BY_RUNTIMES | {"onnx", "num_threads"},
    "onnxruntime": _USED_BY_RUNTIMES | {"onnx", "num_threads"},
    "tensorrt": _USED_BY_RUNTIMES | {"onnx", "engine", "runtime", "cuda_graph", "trust_engine"},
    "recorded": _USED_BY_ALL | {"path", "verify"},
}
_ON_A_CPU = ("openvino", "recorded")
"""What never computes on a GPU."""
_MAX_BATCH = 1024
_SMALL_BATCH = 2
"""That a module on a GPU is tried on where nobody says how many images come."""
_ENGINE_BATCH = 64
"""Of an engine that is built on the way, where neither the settings nor the loader say."""


class TeacherSettings(Settings):
    """Which runtime runs the teacher, and how. A setting that the chosen runtime does not use is an error."""

    backend: Literal["auto", "pytorch", "openvino", "onnxruntime", "tensorrt", "recorded"] = "auto"
    """`auto` takes PyTorch for a model, TensorRT for an engine, and a recording where there is a `path`. For an ONNX
    file it takes OpenVINO on a CPU; on a GPU, TensorRT where one is installed that is made for it, or else ONNX
    Runtime."""
    model: ModelSettings | None = None
    """A network by name and its weights, for `pytorch`."""
    features: tuple[str, ...] = ()
    """Layers of the model, by name, whose outputs the teacher returns beside the logits."""
    input_adapter: WantedInput | Literal["auto"] | None = None
    """The images that the model was trained on, where the loader's are others: a first layer brings them to that
    normalisation and size. `auto` takes what timm knows of its pretrained networks, with the size only of those that
    take no other. For an ONNX file or an engine, fold it in when it is made."""
    onnx: Path | None = None
    """The exported teacher, for every backend but `pytorch`; `tensorrt` builds an engine from it when first asked."""
    engine: Path | None = None
    """A TensorRT engine, made by `kd-pipeline build-engine`."""
    path: Path | None = None
    """The folder of a recording, made by `kd-pipeline record`, whose answers are given again for the same images."""
    verify: int = Field(default=32, ge=0)
    """How many images, drawn anew at every start, are compared with those that were recorded."""
    precision: Precision | None = None
    """Precision of the arithmetic. It defaults to fp32, for `pytorch` on a GPU to half precision (bf16, or fp16 where
    the GPU has no bf16), and to what an engine or an ONNX file of `onnxruntime` has, which neither can change. `int8`
    and `fp8` are TensorRT's alone."""
    max_batch: int | None = Field(default=None, ge=1)
    """Largest number of images in one call; unless given 1024, and the loader's batch for an engine that is built on
    the way."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU runtimes; the cores of this process unless given."""
    channels_last: bool = True
    """Run PyTorch's convolutions in NHWC, which is the faster layout for most of them."""
    compile: bool | None = None
    """Compile the PyTorch module with `torch.compile`, which is worth it from a few thousand images on; defaults to
    true on a GPU, as far as that works there, and to false on a CPU."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """Which TensorRT builds the engine; `auto` is `tensorrt` where it is installed and `tensorrt_rtx` otherwise."""
    cuda_graph: bool = False
    """Replay the engine, or the PyTorch module at the loader's batch size, as a CUDA graph; worth it where launches
    are slow beside the work, as with small batches."""
    trust_engine: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """sha256 of an engine that somebody else made, or that has no manifest, and that you know to be good."""

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        files = {"onnx": self.onnx, "engine": self.engine, "path": self.path}
        given = [
            *(f"{name}: {file}" for name, file in files.items() if file is not None),
            *(["model"] if self.model else []),
        ]
        if len(given) > 1:
            raise ValueError(f"two teachers: {' and '.join(given)}; give one of them")
        if self.trust_engine is not None and self.engine is None:
            raise ValueError("trust_engine names the sha256 of an engine, and there is no engine")
        if self.backend != "auto":
            _refuse_unused(self, self.backend)
        return self


class EnsembleSettings(Settings):
    """Several teachers that answer as one."""

    members: tuple[TeacherSettings, ...] = Field(min_length=1)
    weights: tuple[PositiveFloat, ...] | None = None
    """How much each counts, relative to their sum; all the same unless given."""
    average: Literal["softmax", "logits"] = "softmax"
    """What is averaged."""

    @model_validator(mode="after")
    def _has_a_weight_for_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.members)} members and {len(self.weights)} weights; give one for each")
        if any(member.backend == "recorded" or member.path is not None for member in self.members):
            raise ValueError("a recording cannot be a member; record the answers of the whole ensemble")
        return self


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
    normalisation: Normalisation | None = None,
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
        normalisation: of the images, for an `input_adapter`; ImageNet's unless given. A pretrained model that wants
            another one and gets no adapter is a warning.

    Raises:
        ConfigError: the combination of settings, module and device makes no teacher.
        TeacherError: the model cannot be opened, or takes other images.
        MissingPackageError: the backend's package is not installed.
    """
    wanted = _Wanted(
        image_shape, torch.device(device), dtype, batch_size, samples, plugins, normalisation or Normalisation()
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
    normalisation: Normalisation


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
    _refuse_unused(settings, backend)
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
                "kd_pipeline.engine.export_onnx and set onnx, or take backend: pytorch"
            )
    _logger.info("teacher: %s in %s on %s, %s", backend, teacher.precision, teacher.device, reason)
    return teacher


def _open_module(settings: TeacherSettings, module: nn.Module, wanted: _Wanted) -> Teacher:
    # Here, because taps stand on this package's PyTorch teacher.
    from kd_pipeline.taps import with_features

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
        return AdaptInput(settings.input_adapter.adapter(wanted.normalisation))
    if settings.input_adapter == "auto":
        if known is None:
            raise ConfigError(
                f"input_adapter: auto takes what timm knows of its networks, and {type(module).__qualname__} does not "
                "say what it was trained on; give mean and std"
            )
        size = known.size[0] if known.is_only_size and known.size != (wanted.image_shape or (0,))[1:] else None
        if size is None and Normalisation(*known[:2]) == wanted.normalisation:
            return None
        return AdaptInput(WantedInput(mean=known.mean, std=known.std, size=size).adapter(wanted.normalisation))
    is_pretrained = settings.model is not None and settings.model.pretrained
    if is_pretrained and known is not None and Normalisation(*known[:2]) != wanted.normalisation:
        _logger.warning(
            "the teacher was trained on images with mean %s and std %s, and gets images with mean %s and std %s; set "
            "teacher.input_adapter: auto, or mean and std of the transforms",
            known.mean,
            known.std,
            *wanted.normalisation,
        )
    return None


def _open_tensorrt(settings: TeacherSettings, wanted: _Wanted) -> Teacher:
    """Open an engine, which is built first where the settings name an ONNX file."""
    # Here, because the build compares its result with a teacher of ONNX Runtime: it stands on this package.
    from kd_pipeline.engine.build import build_engine
    from kd_pipeline.engine.build_settings import BuildSettings
    from kd_pipeline.engine.load import open_engine
    from kd_pipeline.engine.parity import Samples

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


def _refuse_unused(settings: TeacherSettings, backend: str) -> None:
    if settings.precision in ("int8", "fp8") and backend != "tensorrt":
        raise ConfigError(f"precision: {settings.precision} is TensorRT's alone, and the backend is {backend}")
    for name, field in TeacherSettings.model_fields.items():
        if name not in _USED_BY[backend] and (value := getattr(settings, name)) != field.default:
            raise ConfigError(f"{name}: {value} means nothing to the {backend} backend; remove it or change backend")
