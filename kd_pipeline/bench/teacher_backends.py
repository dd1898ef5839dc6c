"""Open, compare and time one teacher on every backend in every precision, for `bench teacher`."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline._core.progress import progress_bar
from kd_pipeline.bench.measure import Candidate, Measurement, measure
from kd_pipeline.errors import ConfigError, KDPipelineError, TeacherError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.parity import CalibrationSet, measure_parity
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.manifest import Precision, Profile
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["NUM_COMPARED", "BackendComparison", "ExportedModel", "TeacherRow"]

NUM_COMPARED = 64
"""Images on which the logits are compared, at least."""
_BACKENDS: Mapping[Precision, tuple[str, ...]] = {
    "fp32": ("pytorch", "onnxruntime", "openvino", "tensorrt"),
    "bf16": ("pytorch", "onnxruntime", "openvino", "tensorrt"),
    "fp16": ("pytorch", "onnxruntime", "openvino", "tensorrt"),
    "fp8": ("tensorrt",),
    "int8": ("onnxruntime", "openvino", "tensorrt"),
}
"""What is tried, by precision; float32 first, as the reference for the others."""
_COMPILED_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
_GRAPH_PRECISIONS: tuple[Precision, ...] = ("bf16",)
"""Compiling takes long, and the fewer bits, the more a GPU waits for launches, which a CUDA graph saves."""
_NUM_WARM_UP_ON_GPU = 5
"""Untimed batches, as a GPU that was idle raises its clocks again; on a CPU one takes seconds."""
_MIN_BATCHES_ON_GPU = 20
"""Timed, as a GPU does a few batches in less time than it takes to start and to wait for it."""


class _Kind(NamedTuple):
    """What a row measures."""

    backend: str
    precision: Precision
    compile: bool = False
    cuda_graph: bool = False
    fixed_profile: bool = False
    """For TensorRT: an engine for a single batch size."""

    @property
    def name(self) -> str:
        """Of the row."""
        words = [self.backend, *(["compiled"] * self.compile), *(["graph"] * self.cuda_graph), self.precision]
        return " ".join(words) + ", fixed profile" * self.fixed_profile


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A teacher in the forms that backends run."""

    name: str
    module: nn.Module | None
    """For PyTorch; None if there is only a file."""
    onnx: Path | None
    onnx_reason: str = ""
    """Why there is no ONNX file, if there is none."""


@dataclass(slots=True)
class TeacherRow:
    """What was measured of one backend in one precision."""

    name: str
    open_s: float
    """From nothing to the first output, for a batch of `first_batch`; includes what the backend compiles, and building
    an engine that is not in the cache."""
    first_batch: int
    cosine: float
    """Cosine similarity of an output with that of the reference; of the worst image and output."""
    top1_agreement: float | None
    """Fraction of the images with the same top-1 class as the reference; None without logits."""
    images_per_s: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """By batch size, a number for each repeat."""


class BackendComparison:
    """One teacher on one set of images, on all backends.

    Args:
        model: the teacher.
        images: `[N, 3, H, W]`, on the device of the comparison; N is a multiple of the largest batch, and at least 64.
        batch_sizes: how many images a backend gets at a time.
        num_threads: threads of a runtime on a CPU; the caller sets PyTorch's.
        report: receives lines of progress.
        save: called after every repeat, with `rows` up to date.
    """

    def __init__(
        self,
        model: ExportedModel,
        images: Tensor,
        *,
        batch_sizes: Sequence[int],
        num_threads: int,
        report: Callable[[str], object],
        save: Callable[[], object] = lambda: None,
    ) -> None:
        self._save = save
        self._model, self._images, self._num_threads, self._report = model, images, num_threads, report
        self._batch_sizes, self._largest = sorted(set(batch_sizes)), max(batch_sizes)
        self._reference_outputs: Mapping[str, Tensor] = {}
        self._folder = Path()
        """For engines of a single batch size; temporary, while `run` runs."""
        self.reference = ""
        """The row that the others are compared with: the first one, in float32."""
        self.rows: dict[str, TeacherRow] = {}
        """By name."""
        self.left_out: dict[str, str] = {}
        """Why a row, or one of its batch sizes, was not measured."""

    def run(
        self,
        *,
        compile_at: Sequence[int] | None,
        num_images: int,
        repeats: int,
        precisions: Sequence[Precision] = tuple(_BACKENDS),
    ) -> None:
        """Open everything, then measure at each batch size in turn; see `bench_teacher`.

        Raises:
            TeacherError: nothing runs the teacher.
        """
        with ExitStack() as opened:
            self._folder = Path(opened.enter_context(TemporaryDirectory(prefix="bench_teacher-")))
            teachers: dict[str, Teacher] = {}
            for precision, backends in _BACKENDS.items():
                for backend in backends:
                    is_reference = precision == "fp32" and not self.reference
                    if not (precision in precisions or is_reference):
                        continue
                    kind = _Kind(backend, precision)
                    with progress_bar(f"{kind.name}: opening"):
                        teacher = self._open(kind, self._largest, opened)
                    if teacher is not None:
                        teachers[kind.name] = teacher
            if not teachers:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
                raise TeacherError(f"nothing here runs {self._model.name}: {reasons}")
            for batch_size in self._batch_sizes:
                with ExitStack() as opened_now:
                    now = dict(teachers)
                    if batch_size in ((self._largest,) if compile_at is None else compile_at):
                        torch.compiler.reset()  # what is compiled for a single size is the fastest
                        for kind in self._kinds_of_one_size(precisions, teachers):
                            with progress_bar(f"{kind.name}: opening for {batch_size} at a time"):
                                teacher = self._open(kind, batch_size, opened_now)
                            if teacher is not None:
                                now[kind.name] = teacher
                    self._measure(now, batch_size, num_images, repeats)

    def _kinds_of_one_size(self, precisions: Sequence[Precision], opened: Mapping[str, Teacher]) -> list[_Kind]:
        """What is compiled, captured or built for a single batch size, beside what is `opened` for all."""
        compiled = [precision for precision in _COMPILED_PRECISIONS if precision in precisions]
        kinds = [_Kind("pytorch", precision, compile=True) for precision in compiled]
        if self._images.device.type == "cuda":
            captured = [precision for precision in _GRAPH_PRECISIONS if precision in precisions]
            for compile in (False, True):
                kinds += [_Kind("pytorch", precision, compile, cuda_graph=True) for precision in captured]
            built = [precision for precision in _BACKENDS if f"tensorrt {precision}" in opened]
            kinds += [_Kind("tensorrt", precision, fixed_profile=True) for precision in built]
        return kinds

    def _open(self, kind: _Kind, batch_size: int, opened: ExitStack) -> Teacher | None:
        """Open a teacher, run it in batches of that size and compare its outputs; None, with the reason noted, if any
        of that fails."""
        name, started_s = kind.name, time.perf_counter()
        try:
            teacher = self._open_teacher(kind, batch_size)
            opened.callback(teacher.close)
            if kind.cuda_graph and isinstance(teacher, PyTorchTeacher) and not teacher.has_cuda_graph:
                raise TeacherError("this teacher cannot be captured as a CUDA graph; the warning says why")
            teacher(self._images[:batch_size])
            self._synchronize()
            open_s = time.perf_counter() - started_s
            number = len(self._images) // batch_size * batch_size
            batches = torch.split(self._images[:number], batch_size)
            found = [{key: output.cpu() for key, output in teacher(batch).items()} for batch in batches]
            outputs = {key: torch.cat([each[key] for each in found]) for key in teacher.outputs}
            if not self.reference:
                self.reference, self._reference_outputs = name, outputs
            wanted = {key: output[:number] for key, output in self._reference_outputs.items()}
            parity = measure_parity(outputs, wanted)
        except KDPipelineError as exc:
            self.left_out[name] = str(exc)
            return None
        self._report(f"{name}: first output after {open_s:.1f} s")
        cosine = min(each.cosine for each in parity.values())
        top1_agreement = parity["logits"].top1_agreement if "logits" in parity else None
        row = TeacherRow(name, open_s, batch_size, cosine, top1_agreement)
        self.rows.setdefault(name, row)  # a compiled one is opened for each batch size
        return teacher

    def _open_teacher(self, kind: _Kind, batch_size: int) -> Teacher:
        backend, precision = kind.backend, kind.precision
        settings: dict[str, Any] = {"backend": backend, "precision": precision}
        if reason := self._obstacle(backend, precision):
            raise ConfigError(reason)
        if backend == "pytorch":
            settings |= {"compile": kind.compile, "cuda_graph": kind.cuda_graph}
        elif kind.fixed_profile:
            settings["engine"] = self._build_engine(precision, batch_size)
        else:
            settings["onnx"] = self._model.onnx
        if backend in ("onnxruntime", "openvino"):
            settings["num_threads"] = self._num_threads
        return open_teacher(
            TeacherSettings.model_validate(settings),
            module=self._model.module if backend == "pytorch" else None,
            image_shape=(3, *self._images.shape[2:]),
            device=self._images.device,
            dtype=self._images.dtype,
            batch_size=batch_size,
            calibration_images=lambda: self._images[:NUM_COMPARED].float().cpu(),
        )

    def _build_engine(self, precision: Precision, batch_size: int) -> Path:
        """An engine for this batch size alone, in the temporary folder."""
        assert self._model.onnx is not None  # it is an obstacle before
        calibration_set = CalibrationSet(self._images[:NUM_COMPARED].float().cpu(), "the compared images")
        return build_engine(
            BuildSettings(
                onnx=self._model.onnx,
                precision=precision,
                half_io=self._images.dtype == torch.float16,
                profiles=(Profile(min=batch_size, opt=batch_size, max=batch_size),),
                image_size=tuple(self._images.shape[2:]),
            ),
            save_engine=self._folder / f"{precision}-{batch_size}.engine",
            calibration_set=lambda: calibration_set,
        )

    def _obstacle(self, backend: str, precision: str) -> str:
        """Why a backend is known not to work here; empty if it is worth a try."""
        device, onnx = self._images.device.type, self._model.onnx
        if backend == "pytorch":
            if self._model.module is None:
                return "an ONNX file is no module; give the model by name (torchvision, timm, builtin) to measure it"
            is_slow = (precision, device) == ("fp16", "cpu")
            return "few CPUs compute in float16; it is measured on a GPU only" if is_slow else ""
        if onnx is None:
            return self._model.onnx_reason
        if backend == "tensorrt":
            return "" if device == "cuda" else f"it needs an NVIDIA GPU, and the device is the {device.upper()}"
        if device != "cpu" and backend == "openvino":
            return "it runs on the CPU, and the device is a GPU; set device to cpu"
        if (backend, precision) == ("onnxruntime", "int8"):
            return "" if device == "cpu" else "ONNX Runtime runs int8 on a CPU; TensorRT does on a GPU"
        if backend == "onnxruntime" and (found := read_onnx(onnx).precision) != precision:
            return f"ONNX Runtime runs a file as it is, and this one has {found} weights"
        return ""

    def _measure(self, teachers: Mapping[str, Teacher], batch_size: int, num_images: int, repeats: int) -> None:
        candidates, num_batches = [], -(-num_images // batch_size)
        if self._images.device.type == "cuda":
            num_batches = max(num_batches, _MIN_BATCHES_ON_GPU)
        for name, teacher in teachers.items():
            run = partial(self._run, teacher, self._images[:batch_size])
            try:
                run(1)
            except TeacherError as exc:
                self.left_out[f"{name}, {batch_size} at a time"] = str(exc)
            else:
                candidates.append(Candidate(name, run))

        def update(measured: Sequence[Measurement]) -> None:
            for row in measured:
                self.rows[row.name].images_per_s[batch_size] = row.images_per_s
            self._save()

        measure(
            candidates,
            repeats=repeats,
            num_batches=num_batches,
            num_warm_up=_NUM_WARM_UP_ON_GPU if self._images.device.type == "cuda" else 1,
            report=lambda line: self._report(f"{batch_size} at a time, {line}"),
            save=update,
        )

    def _run(self, teacher: Teacher, images: Tensor, num_batches: int) -> int:
        for _ in range(num_batches):
            teacher(images)
        self._synchronize()
        return num_batches * len(images)

    def _synchronize(self) -> None:
        if self._images.device.type == "cuda":
            torch.cuda.synchronize(self._images.device)
