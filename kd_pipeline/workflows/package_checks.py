"""Import the NVIDIA driver and each package in child processes, and try them out, for the doctor."""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

from kd_pipeline._core.child_process import open_report, run_child
from kd_pipeline._core.nvidia_driver import query_driver
from kd_pipeline._core.optional import require

# NumPy, Pillow, torch and what needs them are imported inside functions: the doctor must run where one is broken.

__all__ = ["CUDA_PROVIDER", "DRIVER", "PACKAGES", "run_checks"]

DRIVER = "NVIDIA driver"
CUDA_PROVIDER = "CUDAExecutionProvider"
_OPENVINO_PRECISIONS = {"FP32": "fp32", "BF16": "bf16", "FP16": "fp16"}

Fields = dict[str, Any]
"""Fields of a `Check`, as a child process reports them in JSON."""


def run_checks(names: Sequence[str], *, has_gpu: bool, timeout_s: float) -> Iterator[Fields]:
    """Check packages one after the other in one child process, and in a new one after each crash."""
    while names:
        gpu = "gpu" if has_gpu else "no gpu"
        child = run_child(f"{__name__}:{_report_checks.__name__}", gpu, *names, timeout_s=timeout_s)
        yield from map(json.loads, child.lines)
        names = names[len(child.lines) :]
        if names:
            yield {"name": names[0], "status": "broken", "detail": child.failure or "ended Python early"}
            names = names[1:]


def _report_checks(gpu: str, *names: str) -> None:
    """In the child process: check packages and report a line of JSON for each."""
    report = open_report()
    checks = {name: check for group in PACKAGES for name, check in group.items()} | {DRIVER: _check_driver}
    for name in names:
        fields: Fields = {"name": name}
        try:
            fields |= {"status": "ok", **checks[name](gpu == "gpu")}
        except Exception as exc:
            cause = exc.__cause__ if isinstance(exc, ImportError) and exc.__cause__ else exc
            module = cause.name if isinstance(cause, ModuleNotFoundError) else None
            if module is not None and f"{name}.".startswith((f"{module}.", f"{module} ")):
                fields |= {"status": "missing"}
            else:
                detail = textwrap.shorten(f"{type(cause).__name__}: {cause}", 200)
                fields |= {"status": "broken", "detail": detail}
        print(json.dumps(fields), file=report, flush=True)


def _check_driver(has_gpu: bool) -> Fields:
    """Query the driver itself, which needs no CUDA package."""
    try:
        driver = query_driver()
    except OSError:
        return {"status": "missing", "detail": "no libcuda.so.1; everything runs on the CPU"}
    gpus = [asdict(gpu) for gpu in driver.gpus]
    return {"version": driver.version, "detail": f"supports CUDA {driver.cuda}", "cuda": driver.cuda, "gpus": gpus}


def _check_torch(has_gpu: bool) -> Fields:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return {"version": torch.__version__, "detail": build}


def _check_torch_cuda(has_gpu: bool) -> Fields:
    import torch

    devices = [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))]
    for device in devices:  # the first one even if torch sees none: the error says why
        torch.ones(2, device=device).sum().item()
    return {"version": torch.version.cuda, "detail": f"computes on {', '.join(devices)}"}


def _check_dali(has_gpu: bool) -> Fields:
    dali = require("nvidia.dali", extra="cpu")
    from kd_pipeline.data.decode_trial import compare_decoding

    works, _, detail = compare_decoding("full", device_id=None)  # against windows, the other way on a CPU
    if not works:
        raise RuntimeError(f"windows and whole images differ: {detail}")
    return {"version": dali.__version__, "detail": "decodes on the CPU"}


def _check_cuda_core(has_gpu: bool) -> Fields:
    core, bindings = require("cuda.core", extra="cu13"), require("cuda.bindings", extra="cu13")
    if has_gpu:
        core.Device(0).set_current()
    return {"version": core.__version__, "detail": f"on cuda-bindings {bindings.__version__}"}


def _check_onnxruntime(has_gpu: bool) -> Fields:
    onnxruntime = require("onnxruntime", extra="cpu")
    providers = onnxruntime.get_available_providers()
    detail = ", ".join(providers)
    if has_gpu and CUDA_PROVIDER in providers:
        try:
            works = _runs_on_gpu(onnxruntime)
        except Exception as exc:
            works, detail = False, f"{detail}; {CUDA_PROVIDER}: {exc}"
        if not works:
            providers.remove(CUDA_PROVIDER)
            detail = f"{detail}; {CUDA_PROVIDER} does not run here"
    return {"version": onnxruntime.__version__, "detail": textwrap.shorten(detail, 300), "supports": providers}


def _runs_on_gpu(onnxruntime: ModuleType) -> bool:
    """Whether ONNX Runtime runs a model of one node on the first GPU."""
    import torch  # noqa: F401  # loads the CUDA libraries that ONNX Runtime needs

    onnx = require("onnx", extra="cpu")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CUDA_PROVIDER])
    session.run(None, {"x": onnx.numpy_helper.to_array(onnx.helper.make_tensor("x", 1, [1], [1.0]))})
    return CUDA_PROVIDER in session.get_providers()


def _check_openvino(has_gpu: bool) -> Fields:
    openvino = require("openvino", extra="cpu")
    core = openvino.Core()
    found = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = [name for theirs, name in _OPENVINO_PRECISIONS.items() if theirs in found]
    cpu = core.get_property("CPU", "FULL_DEVICE_NAME").strip()
    version = openvino.__version__.partition("-")[0]
    return {"version": version, "detail": f"{', '.join(precisions)} on {cpu}", "supports": precisions}


def _check_tensorrt(has_gpu: bool) -> Fields:
    trt = require("tensorrt", extra="trt")
    return _build_engine(trt) if has_gpu else {"version": trt.__version__, "detail": "needs a GPU, also to build"}


def _check_tensorrt_rtx(has_gpu: bool) -> Fields:
    trt = require("tensorrt_rtx", extra="rtx")
    numbers = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    capabilities = [f"{number[:-1]}.{number[-1]}" for number in numbers]
    fields = _build_engine(trt)
    return fields | {"detail": f"{fields['detail']} for {', '.join(capabilities)}", "supports": capabilities}


def _build_engine(trt: ModuleType) -> Fields:
    """Create TensorRT's runtime and build an engine of one layer."""
    logger = trt.Logger(trt.Logger.ERROR)
    trt.Runtime(logger)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    layer = network.add_activation(network.add_input("images", trt.float32, (1, 3)), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    if builder.build_serialized_network(network, builder.create_builder_config()) is None:
        raise RuntimeError("it does not build a network of one layer")
    return {"version": trt.__version__, "detail": "builds engines"}


def _check_import(module: ModuleType) -> Fields:
    return {"version": module.__version__}


PACKAGES: tuple[dict[str, Callable[[bool], Fields]], ...] = (
    {
        "torch": _check_torch,
        "torch.cuda": _check_torch_cuda,
        "torchvision": lambda has_gpu: _check_import(require("torchvision", extra="timm")),
        "timm": lambda has_gpu: _check_import(require("timm", extra="timm")),
        "lightning": lambda has_gpu: _check_import(require("lightning", extra="train")),
    },
    {"nvidia.dali": _check_dali, "cuda.core": _check_cuda_core},
    {
        "onnx": lambda has_gpu: _check_import(require("onnx", extra="cpu")),
        "onnxscript": lambda has_gpu: _check_import(require("onnxscript", extra="cpu")),
        "onnxruntime": _check_onnxruntime,
        "openvino": _check_openvino,
    },
    {"tensorrt": _check_tensorrt},
    {"tensorrt_rtx": _check_tensorrt_rtx},
)
"""By package, in groups that share a child process, where what one imports need not be imported again by the next. Each
gets whether there is a GPU, and returns fields of a `Check` or raises."""
