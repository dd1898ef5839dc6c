"""What this machine has, what is usable, and what to install."""

import json
import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain, product
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from kd_pipeline._core.child_process import open_report, run_child
from kd_pipeline._core.nvidia_driver import ask_driver
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.tensorrt.package import LOWEST_CAPABILITY

if TYPE_CHECKING:
    # Elsewhere in functions: they stand on NumPy, Pillow and torch, and a broken one is what a doctor is called for.
    from kd_pipeline.data.decode_trial import DecodeTrial

__all__ = ["Ability", "Check", "Gpu", "Report", "diagnose"]

_GIB = 2**30
_GROUPS = (
    ("torch", "torch.cuda", "torchvision", "timm", "lightning"),
    ("nvidia.dali", "cuda.core"),
    ("onnx", "onnxscript", "onnxruntime", "openvino"),
    ("tensorrt",),
    ("tensorrt_rtx",),
)
"""What is tried, each group in a process of its own; within one, what is imported once need not be again."""
_HW_DECODER_LOADS = (0.0, 1.0)
"""Shares of the hardware decoder that are tried: the default, and all that it takes."""
_CUDA_PROVIDER = "CUDAExecutionProvider"
_PRECISIONS = {"FP32": "fp32", "BF16": "bf16", "FP16": "fp16"}
_EXTRAS = {"lightning": "train", "timm": "timm", "torchvision": "timm", "tensorrt": "trt", "tensorrt_rtx": "rtx"}
"""What brings a package that `cpu`, `cu12` and `cu13` do not bring."""

_Kind = Literal["loader", "teacher", "command", "setting"]
_Answer = dict[str, Any]


class Check(Settings):
    """What became of importing one package and trying it out."""

    name: str
    status: Literal["ok", "missing", "broken"]
    version: str | None = None
    detail: str = ""
    """What it can do here, or what went wrong in its own words."""
    capabilities: tuple[str, ...] = ()
    """Precisions of OpenVINO, providers of ONNX Runtime, compute capabilities that TensorRT-RTX builds for."""
    install: str | None = None
    """The command that installs it, where it is missing."""


class Gpu(Settings):
    """One GPU that this process may use."""

    name: str
    compute_capability: str
    memory_bytes: int
    served_by: tuple[str, ...]
    """Which of `tensorrt` and `tensorrt_rtx` work here and support it."""

    def __str__(self) -> str:
        engines = " and ".join(self.served_by) or "no TensorRT that is installed"
        return f"{self.name}, {self.memory_bytes / _GIB:.1f} GiB; supported by {engines}"


class Ability(Settings):
    """Something that the library can or cannot do here."""

    kind: _Kind
    name: str
    works: bool
    detail: str
    """What it still needs, or what it means."""


class Report(Settings):
    """All of it; `model_dump_json()` is for bug reports, `to_text()` for people."""

    kd_pipeline: str
    python: str
    platform: str
    num_cores: int
    num_usable_cores: int
    """Cores that this process may run on."""
    memory_bytes: int
    cuda_driver: str | None
    """Newest CUDA version that the driver serves; None without a working driver."""
    gpus: tuple[Gpu, ...]
    checks: tuple[Check, ...]
    """The NVIDIA driver first, then the packages."""
    abilities: tuple[Ability, ...]

    @property
    def is_usable(self) -> bool:
        """Whether a loader and at least one teacher run."""
        working = {ability.kind for ability in self.abilities if ability.works}
        return {"loader", "teacher"} <= working

    def to_text(self) -> str:
        """Aligned lines for a terminal: the machine, the packages, what is usable."""
        gpus = [("ok", f"GPU {number}", gpu.compute_capability, str(gpu)) for number, gpu in enumerate(self.gpus)]
        checks = [
            (check.status, check.name, check.version or "", "; ".join(filter(None, (check.detail, check.install))))
            for check in self.checks
        ]
        abilities = [("yes" if item.works else "no", item.kind, item.name, item.detail) for item in self.abilities]
        return "\n".join(
            [
                f"kd_pipeline {self.kd_pipeline}, Python {self.python}, {self.platform}",
                f"{self.num_usable_cores} of {self.num_cores} cores, {self.memory_bytes / _GIB:.1f} GiB of memory",
                "",
                *_aligned([*checks[:1], *gpus, *checks[1:]]),
                "",
                "usable",
                *_aligned(abilities),
            ]
        )


def diagnose(*, timeout_s: float = 60.0) -> Report:
    """Import every package that the library can use, try each out, and say what works.

    This happens in processes of their own, so that a package that crashes or hangs is reported like one that raises.

    Args:
        timeout_s: seconds after which a package counts as hanging.
    """
    (driver,) = _ask(["NVIDIA driver"], has_gpu=False, timeout_s=timeout_s)
    cuda_driver, found = driver.pop("cuda", None), driver.pop("gpus", [])
    groups = [[name for name in group if found or name != "torch.cuda"] for group in _GROUPS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        answers = pool.map(lambda names: list(_ask(names, has_gpu=bool(found), timeout_s=timeout_s)), groups)
        checks = [Check(**answer) for answer in [driver, *chain.from_iterable(answers)]]
        has_dali = any(check.name == "nvidia.dali" and check.status == "ok" for check in checks)
        trials = _try_decoding(pool, timeout_s) if found and has_dali else []
        checks += map(_check_of_trial, trials)
    checks = [
        check.model_copy(update={"install": _install_line(check.name, cuda_driver)})
        if check.status == "missing"
        else check
        for check in checks
    ]
    by_name = {check.name: check for check in checks}
    gpus = tuple(Gpu(**gpu, served_by=tuple(_serving(gpu["compute_capability"], by_name))) for gpu in found)
    return Report(
        kd_pipeline=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        num_cores=os.cpu_count() or 1,
        num_usable_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cuda_driver=cuda_driver,
        gpus=gpus,
        checks=tuple(checks),
        abilities=tuple(_abilities(by_name, gpus, trials)),
    )


def _install_line(name: str, cuda_driver: str | None) -> str | None:
    """What brings a missing package, with the wheels that suit the driver."""
    if name == "NVIDIA driver":
        return None
    if name == "torch" or (name == "openvino" and cuda_driver):  # no extra for a GPU brings OpenVINO
        return f"pip install {name}"
    if cuda_driver:
        base = "cu12" if cuda_driver.startswith("12.") else "cu13"
    else:
        base = "cu13" if name == "cuda.core" else "cpu"
    return f"pip install 'kd_pipeline[{_EXTRAS.get(name, base)}]'"


def _serving(compute_capability: str, checks: Mapping[str, Check]) -> Iterator[str]:
    """The TensorRT packages that work here and support such a GPU."""
    major, minor = map(int, compute_capability.split("."))
    if checks["tensorrt"].status == "ok" and (major, minor) >= LOWEST_CAPABILITY:
        yield "tensorrt"
    if compute_capability in checks["tensorrt_rtx"].capabilities:
        yield "tensorrt_rtx"


def _try_decoding(pool: ThreadPoolExecutor, timeout_s: float) -> "list[DecodeTrial]":
    """Every way to decode on the first GPU, each in a process of its own."""
    from kd_pipeline.data.decode_trial import try_decoding

    ways: tuple[Literal["window", "full"], ...] = ("window", "full")
    trials = [
        pool.submit(try_decoding, way, device_id=0, hw_decoder_load=load, timeout_s=2 * timeout_s)
        for load, way in product(_HW_DECODER_LOADS, ways)
    ]
    return [trial.result() for trial in trials]


def _check_of_trial(trial: "DecodeTrial") -> Check:
    """A way to decode on the first GPU, as a check like those of the packages."""
    share = f", hw_decoder_load {trial.hw_decoder_load:g}" if trial.hw_decoder_load else ""
    version = None if trial.nvjpeg is None else f"nvJPEG {trial.nvjpeg[0]}.{trial.nvjpeg[1]}"
    status: Literal["ok", "broken"] = "ok" if trial.works else "broken"
    return Check(name=f"decode: {trial.decode} (GPU{share})", status=status, version=version, detail=trial.detail)


def _decoding(trials: "Sequence[DecodeTrial]") -> Iterator[Ability]:
    """What the trials on the first GPU mean for its loaders; the answer of the default settings is kept for them."""
    from kd_pipeline.data.decode import keep_choice, pick_decode

    window, full = (trial for trial in trials if trial.hw_decoder_load == 0)
    try:
        choice = pick_decode(window, lambda: full)
    except ConfigError as exc:
        yield Ability(kind="loader", name="gpu", works=False, detail=str(exc))
        return
    keep_choice(0, 0.0, choice)
    yield Ability(kind="loader", name="gpu", works=True, detail="")
    yield Ability(kind="setting", name="decode: auto", works=True, detail=f"takes {choice.decode}; {choice.reason}")
    with_hardware = [trial for trial in trials if trial.hw_decoder_load and trial.decode == choice.decode]
    for trial in with_hardware:
        detail = f"{trial}; pixels then depend on the batch" if trial.works else str(trial)
        yield Ability(kind="setting", name="hw_decoder_load", works=trial.works, detail=detail)


def _abilities(checks: Mapping[str, Check], gpus: Sequence[Gpu], trials: "Sequence[DecodeTrial]" = ()) -> list[Ability]:
    def ability(kind: _Kind, name: str, *needed: str) -> Ability:
        """It needs the packages named; anything else that is named is known to be lacking."""
        status = {one: checks[one].status if one in checks else "" for one in needed}
        lacking = ", ".join(f"{one} ({state})" if state else one for one, state in status.items() if state != "ok")
        return Ability(kind=kind, name=name, works=not lacking, detail=lacking and f"needs {lacking}")

    served = [] if any(gpu.served_by for gpu in gpus) else ["a GPU that an installed TensorRT supports"]
    runs_onnx = not gpus or ("onnxruntime" in checks and _CUDA_PROVIDER in checks["onnxruntime"].capabilities)
    provider = [] if runs_onnx else ["onnxruntime-gpu in the place of onnxruntime"]
    # TensorRT-RTX builds without a GPU.
    built = checks["tensorrt_rtx"].status == "ok" or (gpus and checks["tensorrt"].status == "ok")
    builder = [] if built else ["tensorrt_rtx, or tensorrt and a GPU"]
    found = [
        ability("loader", "cpu", "nvidia.dali"),
        *(_decoding(trials) if trials else [ability("loader", "gpu", "nvidia.dali")] if gpus else []),
        ability("teacher", "pytorch", "torch"),
        ability("teacher", "openvino", "openvino", "onnx"),
        ability("teacher", "onnxruntime", "onnxruntime", "onnx", *provider),
        ability("teacher", "tensorrt", "cuda.core", *served),
        ability("command", "export", "onnx", "onnxscript", "onnxruntime"),
        ability("command", "build-engine", "onnx", "onnxscript", "onnxruntime", *builder),
    ]
    works = {item.name: item.works for item in found if item.kind == "teacher"}
    if not gpus:
        backend = "openvino"
    elif works["onnxruntime"] and not works["tensorrt"]:
        backend = "onnxruntime"
    else:
        backend = "tensorrt"
    takes = f"takes pytorch for a module and {backend} for an ONNX file"
    is_usable = works["pytorch"] and works[backend]
    return [*found, Ability(kind="setting", name="backend: auto", works=is_usable, detail=takes)]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ask(names: Sequence[str], *, has_gpu: bool, timeout_s: float) -> Iterator[_Answer]:
    """One answer for each name, from a process that tries them in turn; after a crash, another one goes on."""
    while names:
        gpu = "gpu" if has_gpu else "no gpu"
        child = run_child(f"{__name__}:{_answer.__name__}", gpu, *names, timeout_s=timeout_s)
        yield from map(json.loads, child.lines)
        names = names[len(child.lines) :]
        if names:
            yield {"name": names[0], "status": "broken", "detail": child.failure or "ended Python early"}
            names = names[1:]


def _answer(gpu: str, *names: str) -> None:
    """Try these packages and report a line of JSON about each; runs in a process of its own."""
    answers = open_report()
    for name in names:
        answer: _Answer = {"name": name}
        try:
            answer |= {"status": "ok", **_PROBES[name](gpu == "gpu")}
        except Exception as exc:
            cause = exc.__cause__ if isinstance(exc, ImportError) and exc.__cause__ else exc
            module = cause.name if isinstance(cause, ModuleNotFoundError) else None
            if module is not None and f"{name}.".startswith((f"{module}.", f"{module} ")):
                answer |= {"status": "missing"}
            else:
                detail = textwrap.shorten(f"{type(cause).__name__}: {cause}", 200)
                answer |= {"status": "broken", "detail": detail}
        print(json.dumps(answer), file=answers, flush=True)


def _probe_driver(has_gpu: bool) -> _Answer:
    """Ask the driver itself, so that no CUDA package need be there."""
    try:
        driver = ask_driver()
    except OSError:
        return {"status": "missing", "detail": "no libcuda.so.1; everything runs on the CPU"}
    gpus = [asdict(gpu) for gpu in driver.gpus]
    return {"version": driver.version, "detail": f"serves CUDA {driver.cuda}", "cuda": driver.cuda, "gpus": gpus}


def _probe_torch(has_gpu: bool) -> _Answer:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return {"version": torch.__version__, "detail": build}


def _probe_torch_cuda(has_gpu: bool) -> _Answer:
    import torch

    devices = [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))]
    for device in devices:  # the first one also where torch sees none: using it says why
        torch.ones(2, device=device).sum().item()
    return {"version": torch.version.cuda, "detail": f"computes on {', '.join(devices)}"}


def _probe_dali(has_gpu: bool) -> _Answer:
    dali = require("nvidia.dali", extra="cpu")
    from kd_pipeline.data.decode_trial import compare_decoding

    works, detail = compare_decoding("full", device_id=None)  # with windows, the CPU's other way
    if not works:
        raise RuntimeError(f"windows and whole images differ: {detail}")
    return {"version": dali.__version__, "detail": "decodes on the CPU"}


def _probe_cuda_core(has_gpu: bool) -> _Answer:
    core, bindings = require("cuda.core", extra="cu13"), require("cuda.bindings", extra="cu13")
    if has_gpu:
        core.Device(0).set_current()
    return {"version": core.__version__, "detail": f"on cuda-bindings {bindings.__version__}"}


def _probe_onnxruntime(has_gpu: bool) -> _Answer:
    onnxruntime = require("onnxruntime", extra="cpu")
    providers = onnxruntime.get_available_providers()
    detail = ", ".join(providers)
    if has_gpu and _CUDA_PROVIDER in providers:
        try:
            works = _runs_on_gpu(onnxruntime)
        except Exception as exc:
            works, detail = False, f"{detail}; {_CUDA_PROVIDER}: {exc}"
        if not works:
            providers.remove(_CUDA_PROVIDER)
            detail = f"{detail}; {_CUDA_PROVIDER} does not run here"
    return {"version": onnxruntime.__version__, "detail": textwrap.shorten(detail, 300), "capabilities": providers}


def _runs_on_gpu(onnxruntime: ModuleType) -> bool:
    """Whether ONNX Runtime runs a model of one node on the first GPU."""
    import torch  # noqa: F401  # which loads the CUDA libraries that ONNX Runtime uses

    onnx = require("onnx", extra="cpu")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[_CUDA_PROVIDER])
    session.run(None, {"x": onnx.numpy_helper.to_array(onnx.helper.make_tensor("x", 1, [1], [1.0]))})
    return _CUDA_PROVIDER in session.get_providers()


def _probe_openvino(has_gpu: bool) -> _Answer:
    openvino = require("openvino", extra="cpu")
    core = openvino.Core()
    found = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = [ours for own, ours in _PRECISIONS.items() if own in found]
    name = core.get_property("CPU", "FULL_DEVICE_NAME").strip()
    return {
        "version": openvino.__version__.partition("-")[0],
        "detail": f"{', '.join(precisions)} on {name}",
        "capabilities": precisions,
    }


def _probe_tensorrt(has_gpu: bool) -> _Answer:
    trt = require("tensorrt", extra="trt")
    return _build(trt) if has_gpu else {"version": trt.__version__, "detail": "needs a GPU, also to build"}


def _probe_tensorrt_rtx(has_gpu: bool) -> _Answer:
    trt = require("tensorrt_rtx", extra="rtx")
    numbers = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    capabilities = [f"{number[:-1]}.{number[-1]}" for number in numbers]
    answer = _build(trt)
    return answer | {"detail": f"{answer['detail']} for {', '.join(capabilities)}", "capabilities": capabilities}


def _build(trt: ModuleType) -> _Answer:
    """Construct TensorRT's runtime and build an engine of one layer."""
    logger = trt.Logger(trt.Logger.ERROR)
    trt.Runtime(logger)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    layer = network.add_activation(network.add_input("images", trt.float32, (1, 3)), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    if builder.build_serialized_network(network, builder.create_builder_config()) is None:
        raise RuntimeError("it does not build a network of one layer")
    return {"version": trt.__version__, "detail": "builds engines"}


def _probe_import(module: ModuleType) -> _Answer:
    return {"version": module.__version__}


_PROBES: dict[str, Callable[[bool], _Answer]] = {
    "NVIDIA driver": _probe_driver,
    "torch": _probe_torch,
    "torch.cuda": _probe_torch_cuda,
    "torchvision": lambda has_gpu: _probe_import(require("torchvision", extra="timm")),
    "timm": lambda has_gpu: _probe_import(require("timm", extra="timm")),
    "lightning": lambda has_gpu: _probe_import(require("lightning", extra="train")),
    "nvidia.dali": _probe_dali,
    "cuda.core": _probe_cuda_core,
    "onnx": lambda has_gpu: _probe_import(require("onnx", extra="cpu")),
    "onnxscript": lambda has_gpu: _probe_import(require("onnxscript", extra="cpu")),
    "onnxruntime": _probe_onnxruntime,
    "openvino": _probe_openvino,
    "tensorrt": _probe_tensorrt,
    "tensorrt_rtx": _probe_tensorrt_rtx,
}
"""Each is told whether there is a GPU, and returns fields of a `Check` or raises what is wrong."""
