"""The process that runs TensorRT's builder: one ONNX file in, one engine out.

A process of its own, because the builder can take minutes without looking at Python's signals, holds gigabytes, and
ends the process where it meets a bug. It tells its parent what goes on in JSON lines on stdout, and dies with it.
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import EngineError, KDPipelineError
from kd_pipeline.teachers.tensorrt.package import TensorRT, open_tensorrt

__all__ = ["CompileJob", "compile_engine", "run_compiler", "run_job"]

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_HEARTBEAT_S = 10.0


class CompileJob(Settings):
    """What TensorRT's builder needs to know."""

    onnx: Path
    """The file to build, which carries its precision in its types."""
    engine: Path
    """Where the engine goes."""
    input_name: str
    image_shape: tuple[int, int, int]
    batch_sizes: tuple[tuple[int, int, int], ...]
    """Smallest, usual and largest of each profile."""
    runtime: Literal["tensorrt", "tensorrt_rtx"]
    tf32: bool
    """Whether float32 convolutions and products may round their inputs to TF32."""
    workspace: int | None = None
    """MiB."""
    builder_optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capability: tuple[str, ...] = ()


def compile_engine(job: CompileJob, progress: Callable[[str], None]) -> None:
    """Build `job.onnx` into `job.engine`; `progress` hears the name of each phase of the builder.

    Raises:
        EngineError: TensorRT cannot parse or build the file; holds its own text.
        MissingPackageError: the runtime is not installed.
    """
    tensorrt = open_tensorrt(job.runtime)
    builder = tensorrt.check(tensorrt.module.Builder(tensorrt.logger), "TensorRT has no builder here")
    network = builder.create_network(1 << int(tensorrt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(tensorrt, network, job.onnx)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(tensorrt, progress)
    for sizes in job.batch_sizes:
        profile = builder.create_optimization_profile()
        profile.set_shape(job.input_name, *((size, *job.image_shape) for size in sizes))
        config.add_optimization_profile(profile)
    _configure(tensorrt, config, job)
    cache = _load_timing_cache(config, job.timing_cache)
    plan = tensorrt.check(builder.build_serialized_network(network, config), f"TensorRT cannot build {job.onnx.name}")
    with job.engine.open("wb") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    if cache is not None and job.timing_cache is not None:
        write_whole(job.timing_cache, bytes(config.get_timing_cache().serialize()))


def run_compiler(job: CompileJob, folder: Path, report: Callable[[str], None]) -> None:
    """Do `job` in a process of its own, which ends with this call whatever happens; `folder` is for its papers.

    Raises:
        EngineError: TensorRT cannot build the file, or its process died; holds the reason.
    """
    paper, log = folder / "job.json", folder / "stderr.txt"
    paper.write_text(job.model_dump_json(), encoding="utf-8")
    call = (
        "import sys; from kd_pipeline.teachers.tensorrt.builder_process import run_job; sys.exit(run_job(sys.argv[1]))"
    )
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", call, str(paper)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout is not None
        try:
            error = _listen(process.stdout, report)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if error is not None:
        raise EngineError(error)
    if status != 0:
        died = f"of signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        last = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        raise EngineError(
            f"the process of TensorRT's builder ended {died}, without a word on what it cannot build: {last}"
        )


def run_job(path: str) -> int:
    """Do the `CompileJob` that lies at `path` as JSON, and return the exit status of this process."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which kills this process
    try:
        job = CompileJob.model_validate_json(Path(path).read_bytes())
        compile_engine(job, lambda phase: _say(phase=phase))
    except KDPipelineError as error:
        _say(error=str(error))
        return 1
    except OSError as exc:
        _say(error=f"{exc.filename or 'the engine'} cannot be read or written: {exc.strerror}")
        return 1
    return 0


def _parse(tensorrt: TensorRT, network: Any, onnx: Path) -> None:
    parser = tensorrt.module.OnnxParser(network, tensorrt.logger)
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    texts = [f"{error.node_operator()} node {error.node_name()!r}: {error.desc()}" for error in errors]
    raise EngineError(f"TensorRT cannot parse the ONNX file: {'; '.join(texts) or 'it gives no reason'}")


def _configure(tensorrt: TensorRT, config: Any, job: CompileJob) -> None:
    trt = tensorrt.module
    config.max_aux_streams = 0  # the student wants the rest of the GPU
    if not job.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # which TensorRT sets by itself
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace << 20)
    if job.builder_optimization_level is not None:
        config.builder_optimization_level = job.builder_optimization_level
    if job.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # an engine with a runtime inside is host code
    if job.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.compute_capability:
        config.num_compute_capabilities = len(job.compute_capability)
        for number, capability in enumerate(job.compute_capability):
            name = f"SM{capability.replace('.', '')}"
            if not hasattr(trt.ComputeCapability, name):
                known = sorted(int(each[2:]) for each in dir(trt.ComputeCapability) if each.startswith("SM"))
                raise EngineError(
                    f"{tensorrt.runtime} {tensorrt.version} builds for no compute capability {capability}; it knows "
                    f"{', '.join(f'{each / 10}' for each in known)}"
                )
            config.set_compute_capability(getattr(trt.ComputeCapability, name), number)


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    # A cache of another GPU or version is refused; the build then starts with an empty one.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(tensorrt: TensorRT, progress: Callable[[str], None]) -> Any:
    """TensorRT's progress monitor, reduced to the names of the outermost phases."""

    class Monitor(tensorrt.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                progress(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            """Only beginnings are told."""

        def step_complete(self, phase_name: str, step: int) -> bool:
            """True goes on with the build."""
            return True

    return Monitor()


def _say(**message: str) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _listen(stdout: IO[bytes], report: Callable[[str], None]) -> str | None:
    """Pass on what the child says until it closes its end, and return its error if it had one."""
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
                if not line.startswith(b"{"):
                    continue  # a library below TensorRT that prints
                message = json.loads(line)
                error = message.get("error", error)
                if "phase" in message:
                    phase = message["phase"]
                    report(f"TensorRT: {phase}")
