"""Opens a teacher on a CPU: in the student's precision and the fastest runtime, if the settings leave them open."""

import hashlib
import logging

import torch
from torch import Tensor

from kd_pipeline._core.cpu_features import cpu_precisions
from kd_pipeline.errors import ExportError, MissingPackageError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.automatic import Choice, Contest, choose
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.example import some_sizes
from kd_pipeline.teachers.kept_export import export_key
from kd_pipeline.teachers.openvino import openvino_precisions
from kd_pipeline.teachers.parity import generate_calibration_set
from kd_pipeline.teachers.runner import Runner
from kd_pipeline.teachers.settings import Runtime

__all__ = ["open_on_cpu"]

_logger = logging.getLogger("kd_pipeline")

_EXPORT_FROM_FLOPS = 1e12
"""Work from which a network is worth an export, which takes some seconds: about ten seconds of float32 on two cores. It
is counted rather than measured, so that every start comes to the same result."""


def open_on_cpu(runner: Runner, backend: str, reason: str) -> tuple[Teacher, str]:
    """Open the teacher of `runner`, and say why it runs as it does.

    Args:
        runner: a network or an ONNX file.
        backend: `pytorch` or `openvino`; a network is exported for OpenVINO if the settings leave the backend open.
        reason: for this backend.

    Raises:
        ConfigError, TeacherError, MissingPackageError: as `Runner.open`.
    """
    settings, student = runner.settings, runner.inputs.student_precision
    if not runner.inputs.is_images:
        precision = "fp32" if settings.precision == "auto" else settings.precision
        return runner.open(Runtime(backend=backend, precision=precision)), reason
    obeys = settings.precision != "auto"
    wanted = settings.precision if settings.precision != "auto" else student or "fp32"
    why = [reason if obeys or student is None else f"as the student trains in {student}"]
    backends: tuple[str, ...] = (backend,)
    if backend == "pytorch" and settings.backend == "auto":
        obstacle = _why_not_exported(runner, wanted if obeys else "fp32")
        backends = ("openvino", "pytorch") if obstacle is None else (backend,)
        why += [obstacle] if obstacle else []
    usable = {each: wanted if obeys or wanted in _precisions(each) else "fp32" for each in backends}
    candidates = tuple(Runtime(backend=each, precision=precision) for each, precision in usable.items())
    if not obeys and wanted not in usable.values():
        why[0] = f"as this CPU has no instructions for {wanted}, in which the student trains"
    reference = Runtime(backend=backends[-1], precision="fp32")
    if candidates == (reference,) or (obeys and len(candidates) == 1):
        return runner.open(candidates[0]), "; ".join(why)
    loaded = _Images(runner)
    choice = choose(
        Contest(
            reference=reference,
            candidates=candidates,
            open=runner.open,
            key=_key(runner),
            images=loaded.load,
            images_key=loaded.key,
            obeys=obeys,
        )
    )
    if not obeys and choice.runtime.precision != wanted and wanted in usable.values():
        why[0] = _why_float32(choice, wanted)
    return choice.teacher, "; ".join([*why, *_comparison_reasons(choice, backends)])


def _precisions(backend: str) -> frozenset[str]:
    """The precisions that a backend computes in on this CPU at full speed."""
    return openvino_precisions() if backend == "openvino" else cpu_precisions()


def _why_not_exported(runner: Runner, precision: str) -> str | None:
    """Why a network is left to PyTorch: None if it is exported, and an empty string if that is not worth a word."""
    settings, inputs = runner.settings, runner.inputs
    if settings.compile is not None or not settings.channels_last or settings.cuda_graph:
        return ""  # the settings are PyTorch's
    if inputs.dtype != torch.float32:
        return f"not exported to ONNX, as the images are {str(inputs.dtype).removeprefix('torch.')}"
    try:
        flops = runner.examined.flops * inputs.num_images
        if flops < _EXPORT_FROM_FLOPS:
            _logger.debug(
                "the teacher stays in PyTorch: %.2g floating-point operations for %d images are less than %.0g, from "
                "which an export pays off; set teacher.backend: openvino for one",
                *(flops, inputs.num_images, _EXPORT_FROM_FLOPS),
            )
            return ""
        if precision not in openvino_precisions():
            return f"not exported to ONNX, as OpenVINO on this CPU has no {precision}"
        _ = runner.onnx
    except (ExportError, MissingPackageError, OSError) as exc:
        return f"not exported to ONNX, which OpenVINO would run: {exc}"
    return None


class _Images:
    """The images of a comparison: the run's own, or generated ones."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        inputs = runner.inputs
        generated = f"generated {inputs.sizes}"
        self.key = inputs.calibration_key if inputs.calibration_images is not None else generated
        """Digest of what they depend on; None if that is unknown."""

    def load(self) -> Tensor:
        """`[N, 3, H, W]` float32 on the CPU."""
        inputs = self._runner.inputs
        if inputs.calibration_images is not None:
            return inputs.calibration_images()
        return generate_calibration_set(inputs.sizes or some_sizes(read_onnx(self._runner.onnx).images)).images


def _key(runner: Runner) -> str:
    """Digest of the teacher and of the settings that its outputs and its speed depend on."""
    settings = runner.settings
    model = read_onnx(runner.onnx).sha256 if runner.module is None else export_key(runner.examined)
    facts = (model, settings.channels_last, settings.compile, settings.num_threads, str(runner.inputs.dtype))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _why_float32(choice: Choice, wanted: str) -> str:
    problem = next((problem for runtime, problem in choice.problems.items() if runtime.precision == wanted), None)
    if problem is None:
        return f"as that is faster here than {wanted}, in which the student trains"
    return f"as {wanted}, in which the student trains, changes its outputs too much ({problem})"


def _comparison_reasons(choice: Choice, backends: tuple[str, ...]) -> list[str]:
    """How fast and how close to float32 the choice is."""
    if len(backends) == 1:
        return [choice.agreement]
    if choice.runtime.backend == "openvino":
        factor = choice.times_as_fast_as("pytorch")
        return [f"{factor:.1f} times as fast as PyTorch here, {choice.agreement}"]
    problem = next((problem for runtime, problem in choice.problems.items() if runtime.backend == "openvino"), None)
    if problem is not None:
        return [f"not in OpenVINO: {problem}"]
    return [f"{choice.times_as_fast_as('openvino'):.1f} times as fast as OpenVINO here", choice.agreement]
