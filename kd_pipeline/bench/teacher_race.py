"""The contenders of `bench teacher`: who can run the teacher at all, with what answers, and how fast."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline.bench.measure import Contender, measure
from kd_pipeline.errors import ConfigError, KDPipelineError, TeacherError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.parity import likeness

__all__ = ["NUM_COMPARED", "ExportedModel", "Race", "TeacherRow"]

NUM_COMPARED = 64
"""Images on which answers are compared, at least."""
_PRECISIONS = {
    "pytorch": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32", "bf16", "fp16"),
    "openvino": ("fp32", "bf16", "fp16"),
    "tensorrt": ("fp32", "bf16", "fp16", "fp8", "int8"),
}
"""What is tried; TensorRT has all that there are."""


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A teacher in the forms that backends run."""

    name: str
    module: nn.Module | None
    """For PyTorch; None where there is only a file."""
    onnx: Path | None
    onnx_reason: str = ""
    """Why there is no ONNX file, where there is none."""


@dataclass(slots=True)
class TeacherRow:
    """What was measured of one contender."""

    name: str
    open_s: float
    """From nothing to the first answer, a batch of `first_batch`: whatever the backend compiles is in it, and an
    engine's build where none was kept."""
    first_batch: int
    cosine: float
    """Of the logits with the float32 ones; that of the worst image."""
    top1_agreement: float
    """Part of the images with the same first class."""
    images_per_s: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """By batch size, a figure for each repeat."""


class Race:
    """Contenders in every precision, for one teacher and one set of images.

    Args:
        model: the teacher.
        images: `[N, 3, H, W]`, where the contenders run; N is a multiple of the largest batch, and at least 64.
        batch_sizes: how many images they get at a time.
        num_threads: threads of a runtime on a CPU; PyTorch's are the caller's to set.
        report: gets lines of progress.
    """

    def __init__(
        self,
        model: ExportedModel,
        images: Tensor,
        *,
        batch_sizes: Sequence[int],
        num_threads: int,
        report: Callable[[str], object],
    ) -> None:
        self._model, self._images, self._num_threads, self._report = model, images, num_threads, report
        self._batch_sizes, self._largest = sorted(set(batch_sizes)), max(batch_sizes)
        self._wanted = torch.empty(0)
        """Logits of the reference."""
        self.reference = ""
        """The contender whose answers count as right: the first one in float32."""
        self.rows: dict[str, TeacherRow] = {}
        """By name."""
        self.left_out: dict[str, str] = {}
        """Why a contender, or one of its batch sizes, was not measured."""

    def run(self, *, compile_at: Sequence[int] | None, num_images: int, repeats: int) -> None:
        """Open everything, then let the contenders take turns at each batch size; see `bench_teacher`.

        Raises:
            TeacherError: nothing runs the teacher.
        """
        with ExitStack() as opened:
            teachers = {}
            # By precision, so that there is something in float32 to compare the others with.
            for precision in _PRECISIONS["tensorrt"]:
                for backend in (backend for backend, precisions in _PRECISIONS.items() if precision in precisions):
                    name = f"{backend} {precision}"
                    if teacher := self._open(name, backend, precision, self._largest, opened):
                        teachers[name] = teacher
            if not teachers:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
                raise TeacherError(f"nothing here runs {self._model.name}: {reasons}")
            for batch_size in self._batch_sizes:
                with ExitStack() as opened_now:
                    now = dict(teachers)
                    if batch_size in ((self._largest,) if compile_at is None else compile_at):
                        torch.compiler.reset()  # anew, as what is compiled for one size alone is the fastest
                        for precision in _PRECISIONS["pytorch"]:
                            name = f"pytorch compiled {precision}"
                            if teacher := self._open(name, "pytorch", precision, batch_size, opened_now, compile=True):
                                now[name] = teacher
                    self._measure(now, batch_size, num_images, repeats)

    def _open(
        self, name: str, backend: str, precision: str, batch_size: int, opened: ExitStack, *, compile: bool = False
    ) -> Teacher | None:
        """A contender that has answered in batches of that size; None, and the reason noted, where there is none."""
        started_s = time.perf_counter()
        try:
            teacher = self._opened(backend, precision, batch_size, compile)
            opened.callback(teacher.close)
            teacher(self._images[:batch_size])
            self._wait()
            open_s = time.perf_counter() - started_s
            number = len(self._images) // batch_size * batch_size
            logits = torch.cat(
                [teacher(batch)["logits"].cpu() for batch in torch.split(self._images[:number], batch_size)]
            )
            if not self.reference:
                self.reference, self._wanted = name, logits
            figures = likeness({"logits": logits}, {"logits": self._wanted[:number]})
        except KDPipelineError as exc:
            self.left_out[name] = str(exc)
            return None
        self._report(f"{name}: first answer after {open_s:.1f} s")
        row = TeacherRow(name, open_s, batch_size, figures["cosine"], figures["top1_agreement"])
        self.rows.setdefault(name, row)  # a compiled one is opened for each batch size
        return teacher

    def _opened(self, backend: str, precision: str, batch_size: int, compile: bool) -> Teacher:
        about: dict[str, Any] = {"backend": backend, "precision": precision}
        if reason := self._obstacle(backend, precision):
            raise ConfigError(reason)
        if backend == "pytorch":
            about["compile"] = compile
        else:
            about["onnx"] = self._model.onnx
        if backend in ("onnxruntime", "openvino"):
            about["num_threads"] = self._num_threads
        return open_teacher(
            TeacherSettings.model_validate(about),
            module=self._model.module if backend == "pytorch" else None,
            image_shape=(3, *self._images.shape[2:]),
            device=self._images.device,
            dtype=self._images.dtype,
            batch_size=batch_size,
            samples=lambda: self._images[:NUM_COMPARED].float().cpu(),
        )

    def _obstacle(self, backend: str, precision: str) -> str:
        """Why it is known beforehand that a contender cannot be there; nothing where it is worth a try."""
        kind, onnx = self._images.device.type, self._model.onnx
        if backend == "pytorch":
            if self._model.module is None:
                return "an ONNX file is no module; give the model by name (torchvision, timm, builtin) to measure it"
            return (
                "few CPUs compute in float16; it is measured on a GPU" if (precision, kind) == ("fp16", "cpu") else ""
            )
        if onnx is None:
            return self._model.onnx_reason
        if backend == "tensorrt":
            return "" if kind == "cuda" else f"it runs on an NVIDIA GPU, and this is measured on the {kind.upper()}"
        if kind != "cpu" and backend == "openvino":
            return "it runs on the CPU, and this is measured on a GPU; set device to cpu"
        if backend == "onnxruntime" and (found := read_onnx(onnx).precision) != precision:
            return f"ONNX Runtime runs a file as it is, and this one has {found} weights"
        return ""

    def _measure(self, teachers: Mapping[str, Teacher], batch_size: int, num_images: int, repeats: int) -> None:
        images, contenders = self._images[:batch_size], []
        for name, teacher in teachers.items():
            run = partial(self._run, teacher, images)
            try:
                run(1)
            except TeacherError as exc:
                self.left_out[f"{name}, {batch_size} at a time"] = str(exc)
            else:
                contenders.append(Contender(name, run))
        measured = measure(
            contenders,
            repeats=repeats,
            num_batches=-(-num_images // batch_size),
            num_warm_up=1,
            settings={},
            report=lambda line: self._report(f"{batch_size} at a time, {line}"),
        )
        for row in measured.rows:
            self.rows[row.name].images_per_s[batch_size] = row.images_per_s

    def _run(self, teacher: Teacher, images: Tensor, num_batches: int) -> int:
        for _ in range(num_batches):
            teacher(images)
        self._wait()
        return num_batches * len(images)

    def _wait(self) -> None:
        if self._images.device.type == "cuda":
            torch.cuda.synchronize(self._images.device)
