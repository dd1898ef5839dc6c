"""From an engine file to a teacher: trusted, fit for this machine, and compared with the float32 file's answers."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.manifest import Manifest, read_engine, write_manifest
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.teachers.tensorrt.parity import compare, load_exam
from kd_pipeline.teachers.tensorrt.teacher import TensorRTTeacher

__all__ = ["capability_of", "complete_parity", "open_engine", "unfit"]

_logger = logging.getLogger("kd_pipeline")


def open_engine(
    path: Path,
    *,
    device: torch.device,
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto",
    cuda_graph: bool = False,
    trust_engine: str | None = None,
) -> TensorRTTeacher:
    """Open the engine at `path` as a teacher on `device`.

    The first time that an engine from another machine runs here, its own answers are compared with the float32
    file's, which were kept beside it, and the figures go into its manifest.

    Raises:
        EngineError: the engine is not to be trusted, was built for something else, or gives wrong answers; the
            message holds the command that builds it again.
    """
    engine = read_engine(path, trust_engine=trust_engine)
    manifest = engine.manifest
    if manifest is None:
        _logger.warning("%s has no manifest: nobody has compared its answers with the float32 model's", path)
        return TensorRTTeacher(engine, device=device, runtime=runtime, cuda_graph=cuda_graph)
    problems = unfit(manifest, device)
    if problems:
        raise EngineError(f"{path} cannot run here: {'; '.join(problems)}. Build it again: {manifest.command}")
    teacher = TensorRTTeacher(engine, device=device, runtime=runtime, cuda_graph=cuda_graph)
    if manifest.parity.measured_on == "onnx":
        try:
            _complete(path, manifest, teacher)
        except BaseException:
            teacher.close()
            raise
    return teacher


def complete_parity(path: Path, device: torch.device, report: Callable[[str], None]) -> None:
    """Compare the engine at `path` on `device`, if it runs there, and write the figures into its manifest.

    Raises:
        EngineError: it runs, and its answers are too far off.
    """
    engine = read_engine(path)
    manifest = engine.manifest
    assert manifest is not None  # as it is not vouched for
    if problems := unfit(manifest, device):
        report(f"the engine is not for {torch.cuda.get_device_name(device)}: {'; '.join(problems)}")
        return
    try:
        teacher = TensorRTTeacher(engine, device=device)
    except EngineError as error:
        # It may run elsewhere, and where it is opened first it is compared first.
        report(f"the engine does not run on {torch.cuda.get_device_name(device)}: {error}")
        return
    try:
        _complete(path, manifest, teacher)
    finally:
        teacher.close()


def capability_of(device: torch.device) -> str:
    """Compute capability of a GPU, such as `9.0`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def unfit(manifest: Manifest, device: torch.device) -> list[str]:
    """Why an engine cannot run on `device`, a line for each field of its manifest that stands against it."""
    if device.type != "cuda":
        return [f"an engine runs on an NVIDIA GPU and the images are on {device}"]
    problems = []
    version = open_tensorrt(manifest.runtime).version
    found = manifest.runtime_version
    if version != found and not (manifest.version_compatible and _release(version) > _release(found)):
        problems.append(f"runtime_version: found {found}, here is {version}")
    name, capability = torch.cuda.get_device_name(device), capability_of(device)
    if manifest.gpu not in ("any", name):
        problems.append(f"gpu: found {manifest.gpu}, here is {name}")
    if not any(_covers(each, capability) for each in manifest.compute_capability):
        problems.append(f"compute_capability: found {', '.join(manifest.compute_capability)}, here is {capability}")
    return problems


def _complete(path: Path, manifest: Manifest, teacher: TensorRTTeacher) -> None:
    exam = load_exam(path, manifest.parity)
    batch_sizes = tuple(sorted({size for each in manifest.profiles for size in (1, each.opt, each.max)}))
    dtype = teacher.images.dtype
    figures = compare(
        exam,
        lambda images: teacher(images.to(teacher.device, dtype)),
        batch_sizes=batch_sizes,
        precision=manifest.precision,
    )
    parity = manifest.parity.model_copy(update={"measured_on": "engine", "batch_sizes": batch_sizes, **figures})
    _logger.info("%s: its answers on %s are as close to float32 as they should be: %s", path, teacher.device, figures)
    try:
        write_manifest(path, manifest.model_copy(update={"parity": parity}))
    except OSError as error:
        _logger.warning("%s: the figures of this GPU could not be written beside it: %s", path, error)


def _covers(built_for: str, capability: str) -> bool:
    if built_for.endswith("+"):
        return _release(capability) >= _release(built_for[:-1])
    return built_for in ("any", capability)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
