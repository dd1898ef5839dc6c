"""A fake TensorRT and TensorRT-RTX on the fake GPU.

The classes have the methods and parameters of the real ones that `kd_pipeline` uses, and no others.
"""

import enum
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.teachers.fake_gpu import ALIGNMENT, Address, Gpu


class DataType(enum.Enum):
    """`tensorrt.DataType`."""

    FLOAT = torch.float32
    HALF = torch.float16
    INT64 = torch.int64


class TensorFormat(enum.Enum):
    """`tensorrt.TensorFormat`."""

    LINEAR = 0
    CHW32 = 1


class TensorIOMode(enum.Enum):
    """`tensorrt.TensorIOMode`."""

    INPUT = 1
    OUTPUT = 2


class EngineValidity(enum.Enum):
    """`tensorrt_rtx.EngineValidity`."""

    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    """`tensorrt_rtx.EngineInvalidityDiagnostics`."""

    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2


class CudaGraphStrategy(enum.Enum):
    """`tensorrt_rtx.CudaGraphStrategy`."""

    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


@dataclass
class Plan:
    """Content of a fake engine file; the logits are the means of the images, the features are the images plus one."""

    image: tuple[str, tuple[int, ...], DataType] = ("images", (-1, 3, 5, 5), DataType.FLOAT)
    outputs: dict[str, tuple[tuple[int, ...], DataType]] = field(
        default_factory=lambda: {"logits": ((-1, 3), DataType.FLOAT)}
    )
    profiles: tuple[tuple[int, int, int], ...] = ((1, 4, 8),)
    layout: TensorFormat = TensorFormat.LINEAR
    more_inputs: tuple[str, ...] = ()
    invalidity: int = 0


class Library:
    """The fake package, as `module`, with what it was called with, what it made, and what is to fail."""

    def __init__(self, gpu: Gpu, runtime: str, plans: dict[bytes, Plan]) -> None:
        self.gpu, self.plans = gpu, plans
        self.calls: list[tuple[Any, ...]] = []
        self.fails: set[str] = set()
        """Names of methods that fail: they return None or False."""
        self.contexts: list[IExecutionContext] = []
        self.caches: list[IRuntimeCache] = []
        self.runtimes: list[Runtime] = []
        self.logger: Any = None
        is_rtx = runtime == "tensorrt_rtx"
        self.module = SimpleNamespace(
            __name__=runtime,
            __version__="12.3",
            ILogger=ILogger,
            Runtime=partial(RtxRuntime if is_rtx else Runtime, self),
            DataType=DataType,
            TensorFormat=TensorFormat,
            TensorIOMode=TensorIOMode,
        )
        if is_rtx:
            self.module.EngineValidity = EngineValidity
            self.module.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
            self.module.CudaGraphStrategy = CudaGraphStrategy

    def fail(self, method: str, reason: str = "") -> bool:
        """Whether `method` fails; logs the reason if it does."""
        if method in self.fails or reason:
            self.logger.log(ILogger.ERROR, f"{method}: {reason or 'failed'}")
            return True
        return False


class ILogger:
    """`tensorrt.ILogger`."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    """`tensorrt.Runtime`."""

    def __init__(self, library: Library, logger: Any) -> None:
        assert isinstance(logger, ILogger)
        self._library, library.logger = library, logger
        self.engine_host_code_allowed: bool | None = None
        library.runtimes.append(self)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        library = self._library
        if serialized_engine not in library.plans:
            library.fail("deserialize_cuda_engine", "magicTag is wrong")
        if serialized_engine not in library.plans or library.fail("deserialize_cuda_engine"):
            return None
        kind = RtxEngine if isinstance(self, RtxRuntime) else ICudaEngine
        return kind(library, library.plans[serialized_engine])


class RtxRuntime(Runtime):
    """`tensorrt_rtx.Runtime`."""

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        plan = self._library.plans.get(buffer)
        invalidity = EngineInvalidityDiagnostics.VERSION_MISMATCH if plan is None else plan.invalidity
        return (EngineValidity.INVALID if invalidity else EngineValidity.VALID), int(invalidity)


class ICudaEngine:
    """`tensorrt.ICudaEngine`."""

    def __init__(self, library: Library, plan: Plan) -> None:
        self._library, self._plan = library, plan
        name, shape, dtype = plan.image
        self._inputs = {name: (shape, dtype), **{more: (shape, dtype) for more in plan.more_inputs}}
        self._tensors = {**self._inputs, **plan.outputs}
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = len(plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensors[name][1]

    def get_tensor_format(self, name: str) -> TensorFormat:
        return self._plan.layout

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(size, *self._tensors[name][0][1:]) for size in self._plan.profiles[profile_index]]

    def create_execution_context(self) -> Any:
        return self._make_context()

    def _make_context(self) -> Any:
        if self._library.fail("create_execution_context"):
            return None
        self._library.contexts.append(IExecutionContext(self._library, self._plan))
        return self._library.contexts[-1]


class RtxEngine(ICudaEngine):
    """`tensorrt_rtx.ICudaEngine`."""

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig(self._library)

    def create_execution_context(self, runtime_config: "IRuntimeConfig") -> Any:  # type: ignore[override]
        context = self._make_context()
        context._config = runtime_config
        runtime_config._cache.content += b"compiled;"
        return context


class IRuntimeConfig:
    """`tensorrt_rtx.IRuntimeConfig`."""

    def __init__(self, library: Library) -> None:
        self._library, self._cache = library, None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def create_runtime_cache(self) -> "IRuntimeCache":
        self._library.caches.append(IRuntimeCache())
        return self._library.caches[-1]

    def set_runtime_cache(self, cache: "IRuntimeCache") -> bool:
        self._cache = cache
        return True


class IRuntimeCache:
    """`tensorrt_rtx.IRuntimeCache`."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"compiled;"):
            self.content = blob
        return self.content == blob

    def serialize(self) -> bytes:
        return self.content


class IExecutionContext:
    """`tensorrt.IExecutionContext`; an engine reads its input to scratch memory first, and then writes its outputs."""

    def __init__(self, library: Library, plan: Plan) -> None:
        self._library, self._plan = library, plan
        self._profile: int | None = None
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._consumed = 0
        self._scratch: Tensor | None = None
        self._has_run_with: tuple[int, ...] | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._library.calls.append(("profile", profile_index))
        self._profile = profile_index
        return not self._library.fail("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._library.calls.append(("shape", shape))
        least, _, most = self._plan.profiles[self._profile]
        self._shape = shape
        out_of_range = "" if least <= shape[0] <= most else f"{shape[0]} is not in {least}..{most}"
        return not self._library.fail("set_input_shape", out_of_range)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._shape[0], *self._plan.outputs[name][0][1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._library.calls.append(("address", name, memory))
        self._addresses[name] = memory
        return not self._library.fail("set_tensor_address", "not aligned" if memory % ALIGNMENT else "")

    def set_input_consumed_event(self, event: int) -> bool:
        self._library.calls.append(("event", event))
        self._consumed = event
        return not self._library.fail("set_input_consumed_event")

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._library.calls.append(("execute", stream_handle))
        assert stream_handle, "TensorRT would synchronize the device on the default stream"
        queue = self._library.gpu.queues[stream_handle]
        if queue.graph is not None and self._has_run_with != self._shape:
            return not self._library.fail("execute_async_v3", "deferred updates in a capture")
        if self._library.fail("execute_async_v3"):
            return False
        name, _, dtype = self._plan.image
        images = self._library.gpu.address(self._addresses[name], self._shape, dtype.value)
        outputs = {
            output: self._library.gpu.address(self._addresses[output], self.get_tensor_shape(output), kind.value)
            for output, (_, kind) in self._plan.outputs.items()
        }
        queue.add(partial(self._read, images))
        if self._consumed:
            self._library.gpu.events[self._consumed]._event.add_to(queue)
        queue.add(partial(self._write, outputs))
        self._has_run_with = self._shape
        return True

    def _read(self, images: Address) -> bool:
        self._scratch = images.tensor().float().clone()
        return True

    def _write(self, outputs: dict[str, Address]) -> bool:
        for name, output in outputs.items():
            output.tensor().copy_(engine_outputs(self._scratch)["features" if name == "features" else "logits"])
        return True


def engine_outputs(images: Tensor) -> dict[str, Tensor]:
    """What every fake engine computes."""
    return {"logits": images.float().mean((2, 3)), "features": images.float() + 1.0}
