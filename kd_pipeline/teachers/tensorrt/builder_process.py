"""TensorRT's builder in a subprocess: one ONNX file in, one engine out.

The builder can ignore Python's signals for minutes, holds gigabytes, and crashes its process on a bug. The subprocess
reports to its parent in JSON lines on stdout, and dies with it.
"""

import ctypes
import json
import os
import selectors
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.child_process import open_report, start_python
from kd_pipeline._core.files import UntrustedFileError, open_own, read_trusted
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.text import printable
from kd_pipeline.errors import EngineError, KDPipelineError
from kd_pipeline.teachers.tensorrt.package import TensorRT, open_tensorrt

__all__ = ["BuilderJob", "run_builder", "run_job"]

_RUN_JOB = "kd_pipeline.teachers.tensorrt.builder_process:run_job"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_HEARTBEAT_S = 10.0
_MAX_TIMINGS_BYTES = 256 << 20
_SHOWN_BYTES = 2000
"""Of the stderr of a subprocess that died."""


class BuilderJob(Settings):
    """What the builder needs to know."""

    onnx: Path
    """The file to build; the types of its tensors are the engine's."""
    engine: Path
    """The file to write."""
    input_name: str
    image_shape: tuple[int, int, int]
    batch_sizes: tuple[tuple[int, int, int], ...]
    """Smallest, best and largest of each profile."""
    runtime: Literal["tensorrt", "tensorrt_rtx"]
    tf32: bool
    """Whether float32 convolutions and matrix products may round their inputs to TF32."""
    workspace: int | None = None
    """In MiB."""
    builder_optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capability: tuple[str, ...] = ()


def run_builder(job: BuilderJob, folder: Path, report: Callable[[str], None]) -> None:
    """Run `job` in a subprocess, which never outlives this call.

    Args:
        job: what to build.
        folder: for the working files.
        report: called with a line of progress for each phase, and every 10 seconds within a phase.

    Raises:
        EngineError: TensorRT cannot build the file, or the subprocess died; has the reason.
    """
    job_file, log = folder / "job.json", folder / "stderr.txt"
    job_file.write_text(job.model_dump_json(), encoding="utf-8")
    with log.open("wb") as stderr:
        process = start_python(_RUN_JOB, str(job_file), stderr=stderr)
        assert process.stdout is not None
        try:
            error = _receive(process.stdout, report)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if error is not None:
        raise EngineError(printable(error, keep="\n"))
    if status != 0:
        died = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        last = printable(_end_of(log).strip(), keep="\n")
        raise EngineError(
            f"the process of TensorRT's builder ended {died} and reported no error; the end of its stderr: {last}"
        )


def run_job(path: str) -> int:
    """In the subprocess: run the `BuilderJob` in the JSON file `path`, and return the exit status."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets a Ctrl-C too, and kills this process
    with open_report() as stream:

        def send(**message: str) -> None:
            stream.write(f"{json.dumps(message)}\n")

        try:
            _build(BuilderJob.model_validate_json(Path(path).read_bytes()), send)
        except KDPipelineError as error:
            send(error=str(error))
            return 1
        except OSError as exc:
            send(error=f"{exc.filename or 'the engine'} cannot be read or written: {exc.strerror}")
            return 1
    return 0


def _build(job: BuilderJob, send: Callable[..., None]) -> None:
    tensorrt = open_tensorrt(job.runtime)
    builder = tensorrt.check(tensorrt.module.Builder(tensorrt.logger), "TensorRT has no builder here")
    network = builder.create_network(1 << int(tensorrt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(tensorrt, network, job.onnx)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(tensorrt, lambda phase: send(phase=phase))
    for sizes in job.batch_sizes:
        profile = builder.create_optimization_profile()
        profile.set_shape(job.input_name, *((size, *job.image_shape) for size in sizes))
        config.add_optimization_profile(profile)
    _configure(tensorrt, config, job)
    cache = _load_timing_cache(config, job.timing_cache, lambda line: send(line=line))
    plan = tensorrt.check(builder.build_serialized_network(network, config), f"TensorRT cannot build {job.onnx.name}")
    with open_own(job.engine, "w+b") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    if cache is not None and job.timing_cache is not None:
        write_atomic(job.timing_cache, bytes(config.get_timing_cache().serialize()), permissions=0o600)


def _parse(tensorrt: TensorRT, network: Any, onnx: Path) -> None:
    parser = tensorrt.module.OnnxParser(network, tensorrt.logger)
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    texts = [f"{error.node_operator()} node {error.node_name()!r}: {error.desc()}" for error in errors]
    raise EngineError(f"TensorRT cannot parse the ONNX file: {'; '.join(texts) or 'it gives no reason'}")


def _configure(tensorrt: TensorRT, config: Any, job: BuilderJob) -> None:
    module = tensorrt.module
    config.max_aux_streams = 0  # leave the rest of the GPU to the student
    if not job.tf32:
        config.clear_flag(module.BuilderFlag.TF32)  # TensorRT sets it by default
    if job.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, job.workspace << 20)
    if job.builder_optimization_level is not None:
        config.builder_optimization_level = job.builder_optimization_level
    if job.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(module.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # a runtime inside an engine is host code
    if job.hardware_compatible:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.compute_capability:
        config.num_compute_capabilities = len(job.compute_capability)
        for number, capability in enumerate(job.compute_capability):
            name = f"SM{capability.replace('.', '')}"
            if not hasattr(module.ComputeCapability, name):
                known = sorted(int(each[2:]) for each in dir(module.ComputeCapability) if each.startswith("SM"))
                raise EngineError(
                    f"{tensorrt.runtime} {tensorrt.version} cannot build for compute capability {capability}; it knows "
                    f"{', '.join(f'{each / 10}' for each in known)}"
                )
            config.set_compute_capability(getattr(module.ComputeCapability, name), number)


def _load_timing_cache(config: Any, path: Path | None, report: Callable[[str], None]) -> Any:
    if path is None:
        return None
    content = b""
    try:
        content = read_trusted(path, max_bytes=_MAX_TIMINGS_BYTES)
    except FileNotFoundError:
        pass
    except UntrustedFileError as exc:
        report(f"the timings in {path} are not used: {exc.strerror}")
    cache = config.create_timing_cache(content)
    # TensorRT rejects a cache of a different GPU or version; the build then starts with an empty one.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(tensorrt: TensorRT, on_phase: Callable[[str], None]) -> Any:
    """A TensorRT progress monitor that reports the names of the outermost phases."""

    class Monitor(tensorrt.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                on_phase(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            """Nothing to report."""

        def step_complete(self, phase_name: str, step: int) -> bool:
            """True continues the build."""
            return True

    return Monitor()


def _receive(stdout: IO[bytes], report: Callable[[str], None]) -> str | None:
    """Report the phases until the subprocess closes its end, and return its error if it sent one."""
    started, phase, buffered, error = time.monotonic(), "starting", b"", None
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(_HEARTBEAT_S):
                report(f"TensorRT: {phase}, {time.monotonic() - started:.0f} s so far")
                continue
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                return error
            *lines, buffered = (buffered + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                error = message.get("error", error)
                if "line" in message:
                    report(printable(message["line"]))
                if "phase" in message:
                    phase = printable(message["phase"])
                    report(f"TensorRT: {phase}")


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _SHOWN_BYTES))
        return file.read().decode(errors="replace")
