"""Opens one teacher in the runtime that it is asked for: a network, an ONNX file or an engine."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError, ExportError, TeacherError
from kd_pipeline.models.features import with_features
from kd_pipeline.models.input_adapter import ExpectedInput, InputAdapterLayer, Normalization
from kd_pipeline.models.registry import automatic_input, open_model, pretrained_input
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.example import input_specs
from kd_pipeline.teachers.kept_export import Examined, examine, kept_export
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher, why_no_cuda
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from kd_pipeline.teachers.parity import CalibrationSet
from kd_pipeline.teachers.pytorch import PyTorchTeacher, runtime_fingerprint
from kd_pipeline.teachers.quantized import quantized_onnx
from kd_pipeline.teachers.settings import Runtime, StudentPrecision, TeacherSettings
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.load import open_engine
from kd_pipeline.teachers.tensorrt.manifest import Precision, Profile
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["Inputs", "Runner", "ViewImages"]

_logger = logging.getLogger("kd_pipeline")

_MAX_BATCH = 1024
_SMALL_BATCH = 2
"""Batch size of a module's first call on a GPU, if the loader's is unknown."""
_ENGINE_BATCH = 64
"""Largest batch of an engine built from an ONNX file, if neither settings nor loader have one."""


@dataclass(frozen=True, kw_only=True)
class ViewImages:
    """The images of one view, as a teacher gets them."""

    image_shape: tuple[int, int | None, int | None]
    """`(3, H, W)`, where None is a size that changes."""
    dtype: torch.dtype
    normalization: Normalization
    copies: int = 1
    """How many there are of each sample, all of which are in one call."""
    calibration_images: Callable[[], Tensor] | None = None
    calibration_key: str | None = None


@dataclass(frozen=True)
class Inputs:
    """The images that a teacher will get, and what else is needed to open it for them; see `open_teacher`."""

    image_shape: tuple[int | None, ...] | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    student_precision: StudentPrecision | None
    num_images: int
    calibration_images: Callable[[], Tensor] | None
    calibration_key: str | None
    plugins: Collection[str]
    trust_engines: Collection[str]
    normalization: Normalization
    strict: bool
    example: Mapping[str, Tensor] | None = None
    """Real inputs by name; None generates images."""
    views: Mapping[str, ViewImages] = field(default_factory=dict)
    """The images of views by name, where there are several."""

    def of_view(self, name: str) -> "Inputs":
        """The images of a view; these, if nothing else is known of views.

        Raises:
            ConfigError: there is no such view.
        """
        if not self.views:
            return self
        if name not in self.views:
            raise ConfigError(f"view: there is no view {name!r}{suggest(name, self.views)}")
        view = self.views[name]
        return replace(
            self,
            image_shape=view.image_shape,
            dtype=view.dtype,
            batch_size=None if self.batch_size is None else self.batch_size * view.copies,
            num_images=self.num_images * view.copies,
            calibration_images=view.calibration_images,
            calibration_key=view.calibration_key,
            normalization=view.normalization,
            example=None,
            views={},
        )

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of each input by name.

        Raises:
            ConfigError: they are unknown.
        """
        return input_specs(self.image_shape, self.dtype, self.example)

    @property
    def is_images(self) -> bool:
        """Whether the teacher gets images of a known size and nothing else."""
        if self.image_shape is None and self.example is None:
            return True  # of the size that a file says
        spec = next(iter(self.specs.values()))
        return len(self.specs) == 1 and len(spec.shape) == 4 and None not in spec.shape[1:]

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The sizes of one row of the only input; None if they are unknown or free, or there are several inputs."""
        if self.image_shape is None and self.example is None:
            return None
        spec, *others = self.specs.values()
        sizes = tuple(size for size in spec.shape[1:] if size is not None)
        return None if others or len(sizes) < len(spec.shape) - 1 or not spec.dtype.is_floating_point else sizes


class Runner:
    """One teacher, to be opened in any runtime that can run it."""

    def __init__(self, settings: TeacherSettings, module: nn.Module | None, inputs: Inputs) -> None:
        """Open the network of `settings`, if they name one; `module` is given if they do not name a teacher.

        Raises:
            ConfigError: the network has no weights, or its images are unknown.
        """
        self.settings, self.inputs = settings, inputs
        if settings.model is not None:
            module = _open_network(settings, inputs)
        self.module = None if module is None else _adapted(settings, module, inputs)
        """With its input adapter and features; None for a file."""

    @cached_property
    def examined(self) -> Examined:
        """The module, and what a forward pass shows.

        Raises:
            ExportError: it fails on the CPU.
        """
        assert self.module is not None
        if (sizes := self.inputs.sizes) is None:
            raise ExportError(
                "an export takes one input of fixed sizes, and this network gets "
                + " and ".join(f"{name} {spec}" for name, spec in self.inputs.specs.items())
            )
        return examine(self.module, sizes)

    @cached_property
    def onnx(self) -> Path:
        """The teacher's ONNX file; that of a module is exported to the user's cache.

        Raises:
            ExportError: the module cannot be exported.
            MissingPackageError: a package that exports is not installed.
        """
        return self.settings.onnx or kept_export(self.examined)

    def open(self, runtime: Runtime) -> Teacher:
        """Open the teacher; the precision `own` is that of the file.

        Raises:
            ConfigError: the runtime cannot run it for these images, or it does not have the prefix tokens that the
                settings ask for.
            TeacherError: it cannot be opened.
            MissingPackageError: the package of the backend is not installed.
        """
        teacher = self._open(runtime)
        if self.module is not None:
            teacher.num_parameters = sum(each.numel() for each in self.module.parameters())
        if self.settings.num_prefix_tokens is not None:
            try:
                teacher.outputs = _with_prefix(teacher.outputs, self.settings.num_prefix_tokens)
            except ConfigError:
                teacher.close()
                raise
        return teacher

    def _open(self, runtime: Runtime) -> Teacher:
        backend, device = runtime.backend, self.inputs.device
        if backend == "pytorch":
            if self.module is None:
                raise ConfigError("the pytorch backend runs a network and got a file; change backend, or give model")
            return self._open_module(runtime.precision)
        if backend == "openvino" and device.type != "cpu":
            raise ConfigError(
                f"the openvino backend reads images in CPU memory and they are on {device}; put the loader on the CPU, "
                "or use backend: tensorrt or onnxruntime"
            )
        if backend == "tensorrt" and device.type != "cuda":
            raise ConfigError(
                f"the tensorrt backend reads images in the memory of an NVIDIA GPU and they are on {device}; put the "
                "loader on a GPU, or use backend: openvino with a network or an ONNX file"
            )
        if backend == "onnxruntime" and device.type == "cuda" and (obstacle := why_no_cuda()):
            raise ConfigError(f"the onnxruntime backend cannot use {device}: {obstacle}")
        try:
            teacher = self._open_file(runtime)
        except ExportError as exc:
            raise TeacherError(
                f"the {backend} backend runs ONNX files, and {exc}; use backend: pytorch, which runs any network"
            ) from exc
        # An engine's is that of what was built, and in int8 it is that of what was quantized on these images.
        if self.module is not None and backend != "tensorrt" and teacher.precision != "int8":
            teacher.fingerprint = runtime_fingerprint(backend, teacher.precision, self.examined.digest)
        return teacher

    def _open_file(self, runtime: Runtime) -> Teacher:
        settings = self.settings
        max_batch = settings.max_batch or max(_MAX_BATCH, self.inputs.batch_size or 0)
        num_threads = settings.num_threads
        own = None if runtime.precision == "own" else runtime.precision
        match runtime.backend:
            case "openvino":
                onnx, precision = self._file_for("openvino", own), own or "fp32"
                return OpenVINOTeacher(onnx, precision=precision, max_batch=max_batch, num_threads=num_threads)
            case "onnxruntime":
                onnx, device = self._file_for("onnxruntime", own), self.inputs.device
                return OnnxRuntimeTeacher(
                    onnx, device=device, precision=own, max_batch=max_batch, num_threads=num_threads
                )
            case _:
                return self._open_engine(own)

    def _file_for(self, runtime: Literal["openvino", "onnxruntime"], precision: str | None) -> Path:
        """The ONNX file for a runtime: the teacher's own, or quantized from it for int8."""
        inputs = self.inputs
        if precision != "int8":
            return self.onnx
        if inputs.device.type != "cpu":
            raise ConfigError(f"{runtime} has int8 on a CPU only, and the images are on {inputs.device}; use tensorrt")
        return quantized_onnx(
            self.onnx,
            runtime,
            calibration_images=inputs.calibration_images,
            calibration_key=inputs.calibration_key,
            batch_size=inputs.batch_size,
            num_threads=self.settings.num_threads,
        )

    def _open_module(self, precision: str) -> Teacher:
        settings, inputs = self.settings, self.inputs
        assert self.module is not None
        on_gpu = inputs.device.type == "cuda"
        if settings.cuda_graph and not (on_gpu and inputs.batch_size):
            raise ConfigError(
                f"cuda_graph needs a GPU and a fixed number of images; the images are on {inputs.device}, and "
                f"batch_size is {inputs.batch_size}; remove it, or set both"
            )
        if settings.cuda_graph and inputs.sizes is None:
            raise ConfigError("cuda_graph needs one input of fixed sizes; remove it, or set image_shape")
        open_module = partial(
            PyTorchTeacher,
            self.module,
            image_shape=inputs.image_shape,
            example=inputs.example,
            device=inputs.device,
            dtype=inputs.dtype,
            precision=precision,
            max_batch=settings.max_batch or max(_MAX_BATCH, inputs.batch_size or 0),
            channels_last=settings.channels_last,
            batch_size=(inputs.batch_size or _SMALL_BATCH) if on_gpu else None,
            cuda_graph=settings.cuda_graph,
            digest=self.examined.digest if "examined" in vars(self) else None,
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

    def _open_engine(self, precision: str | None) -> Teacher:
        """Open an engine, and build it first from an ONNX file."""
        settings, inputs = self.settings, self.inputs
        engine = settings.engine
        if engine is None:
            largest = settings.max_batch or inputs.batch_size or _ENGINE_BATCH
            profile = Profile(min=1, opt=min(inputs.batch_size or largest, largest), max=largest)
            images = inputs.calibration_images
            asked: Precision = precision or "fp32"  # type: ignore[assignment]  # from the settings
            engine = build_engine(
                BuildSettings(
                    onnx=self.onnx,
                    precision=asked,
                    half_io=inputs.dtype == torch.float16,
                    profiles=(profile,),
                    image_size=inputs.sizes and inputs.sizes[1:],
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
        if precision not in (None, teacher.precision):
            teacher.close()
            raise ConfigError(
                f"{engine} runs in {teacher.precision} and the settings ask for {precision}; leave precision out, or "
                "build the engine again"
            )
        return teacher


def _with_prefix(outputs: Mapping[str, TensorSpec], number: int) -> dict[str, TensorSpec]:
    """The `outputs`, of which all tokens have `number` prefix tokens."""
    tokens = {name: spec for name, spec in outputs.items() if len(spec.shape) == 3}
    too_short = [name for name, spec in tokens.items() if spec.shape[1] is not None and spec.shape[1] <= number]
    if not tokens or too_short:
        found = ", ".join(f"{name!r} {spec}" for name, spec in outputs.items())
        problem = "it returns no tokens [N, L, D]" if not tokens else f"{too_short[0]!r} has no more tokens than that"
        raise ConfigError(
            f"teacher.num_prefix_tokens: {number}, and {problem}; remove it, or correct it; its outputs: {found}"
        )
    return {**outputs, **{name: replace(spec, num_prefix_tokens=number) for name, spec in tokens.items()}}


def _open_network(settings: TeacherSettings, inputs: Inputs) -> nn.Module:
    """The network by name that `settings` have."""
    model = settings.model
    assert model is not None
    if model.factory is None and model.checkpoint is None and not model.pretrained:
        if model.pretrained is None:
            raise ConfigError("teacher.model has random weights; set its checkpoint or pretrained")
        _logger.warning("the teacher has random weights, as teacher.model.pretrained is false: a student learns noise")
    if model.may_stay_random:
        layers = f"reset leaves random weights in {', '.join(model.reset)}"
        raise ConfigError(
            f"teacher.model.{layers if model.reset else 'checkpoint_match: fitting may leave random weights'}; remove "
            "it, or train the teacher first with stage=teacher"
        )
    return open_model(model, plugins=inputs.plugins)


def _adapted(settings: TeacherSettings, module: nn.Module, inputs: Inputs) -> nn.Module:
    """`module` for the loader's images, with the features that `settings` ask for."""
    if not inputs.specs:
        raise ConfigError("a network needs at least one input")
    adapter = _adapter(settings, module, inputs)
    if settings.features:
        module = with_features(module, settings.features)
    return module if adapter is None else nn.Sequential(adapter, module)


def _adapter(settings: TeacherSettings, module: nn.Module, inputs: Inputs) -> InputAdapterLayer | None:
    """The layer that makes the images that `module` was trained on; None if it gets the loader's own."""
    known = pretrained_input(module)
    if settings.input_adapter is not None and not inputs.is_images:
        raise ConfigError("input_adapter is for images [N, 3, H, W]; remove it")
    if isinstance(settings.input_adapter, ExpectedInput):
        return InputAdapterLayer(settings.input_adapter.adapter(inputs.normalization))
    if settings.input_adapter == "auto":
        if known is None:
            raise ConfigError(
                f"input_adapter: auto uses what timm knows of its networks, and {type(module).__qualname__} does not "
                "say what it was trained on; give mean and std"
            )
        size = known.size if known.fixed_input_size and known.size != (inputs.sizes or (0,))[1:] else None
        expected = automatic_input(module, known, size)
        if size is None and (expected.mean, expected.std) == inputs.normalization:
            return None
        return InputAdapterLayer(expected.adapter(inputs.normalization))
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
