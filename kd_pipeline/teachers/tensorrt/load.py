"""Open an engine as a teacher, if it is trusted, runs on this machine, and agrees with the float32 file."""

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import torch

from kd_pipeline._core.text import printable
from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.parity import check_parity, summary
from kd_pipeline.teachers.tensorrt.manifest import EngineManifest, read_engine, read_own_engine, write_manifest
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.teachers.tensorrt.parity import load_reference
from kd_pipeline.teachers.tensorrt.teacher import TensorRTTeacher

__all__ = ["capability_of", "incompatibilities", "open_engine", "record_engine_parity"]

_logger = logging.getLogger("kd_pipeline")


def open_engine(
    path: Path,
    *,
    device: torch.device,
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto",
    cuda_graph: bool = False,
    trust_engines: Collection[str] = (),
) -> TensorRTTeacher:
    """Open the engine at `path` as a teacher on `device`.

    An engine that has not run on a GPU yet is first checked for parity: its outputs are compared with those of the
    float32 file, which are kept beside it, and the metrics are written to its manifest.

    Args:
        path: the engine.
        device: a GPU.
        runtime: which TensorRT to use; `auto` is the manifest's.
        cuda_graph: as for `TensorRTTeacher`.
        trust_engines: as for `read_engine`.

    Raises:
        EngineError: the engine is not trusted, was built for something else, or fails the parity check; the message
            has the command that builds it again.
    """
    engine = read_engine(path, trust_engines=trust_engines)
    manifest = engine.manifest
    if manifest is None:
        return TensorRTTeacher(engine, device=device, runtime=runtime, cuda_graph=cuda_graph)
    if problems := incompatibilities(manifest, device):
        problem = printable(f"{path} cannot run here: {'; '.join(problems)}")
        raise EngineError(f"{problem}. Build it again: {manifest.command}")
    teacher = TensorRTTeacher(engine, device=device, runtime=runtime, cuda_graph=cuda_graph)
    if manifest.parity.measured_on == "onnx":
        try:
            _record_parity(path, manifest, teacher)
        except BaseException:
            teacher.close()
            raise
    return teacher


def record_engine_parity(path: Path, device: torch.device, report: Callable[[str], None]) -> None:
    """Check the engine at `path` for parity, if it runs on `device`, and write the metrics to its manifest.

    Raises:
        EngineError: it runs and fails the check.
    """
    engine = read_own_engine(path)
    manifest = engine.manifest
    assert manifest is not None  # only an engine that is trusted by its digest may have none
    if problems := incompatibilities(manifest, device):
        report(printable(f"the engine is not for {torch.cuda.get_device_name(device)}: {'; '.join(problems)}"))
        return
    try:
        teacher = TensorRTTeacher(engine, device=device)
    except EngineError as error:
        # It may run on a different machine, and is checked when it is first opened there.
        report(f"the engine does not run on {torch.cuda.get_device_name(device)}: {error}")
        return
    try:
        _record_parity(path, manifest, teacher)
    finally:
        teacher.close()


def capability_of(device: torch.device) -> str:
    """Compute capability of a GPU, such as `9.0`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def incompatibilities(manifest: EngineManifest, device: torch.device) -> list[str]:
    """Why an engine cannot run on `device`: a line for each field of its manifest that does not match."""
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


def _record_parity(path: Path, manifest: EngineManifest, teacher: TensorRTTeacher) -> None:
    batch_sizes = tuple(sorted({size for each in manifest.profiles for size in (1, each.opt, each.max)}))
    dtype = teacher.images.dtype
    outputs = check_parity(
        load_reference(path, manifest.parity),
        lambda images: teacher(images.to(teacher.device, dtype)),
        batch_sizes=batch_sizes,
        precision=manifest.precision,
    )
    parity = manifest.parity.model_copy(
        update={"measured_on": "engine", "batch_sizes": batch_sizes, "outputs": outputs}
    )
    _logger.info(
        "%s: its outputs on %s are close enough to float32: %s",
        path,
        teacher.device,
        summary(outputs, manifest.parity.num_images),
    )
    try:
        write_manifest(path, manifest.model_copy(update={"parity": parity}))
    except OSError as error:
        _logger.warning("%s: the metrics on this GPU could not be written to its manifest: %s", path, error)


def _covers(built_for: str, capability: str) -> bool:
    if built_for.endswith("+"):
        return _release(capability) >= _release(built_for[:-1])
    return built_for in ("any", capability)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if re.fullmatch("[0-9]{1,9}", part))
