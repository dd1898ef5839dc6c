"""A GPU without a GPU: streams that run late, memory that turns to NaN when it is released, and TensorRT on them.

torch's CPU tensors stand for device memory. Whatever is queued, an engine or one of torch's own operations, reads and
writes by address, and only when `Gpu.run` comes to it; so a missing wait, or a buffer dropped too early, shows in the
numbers. The classes have the methods and parameters of the real ones that `kd_pipeline` uses, and no others.
"""

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ALIGNMENT = 256
_POISON = 0xFF  # four of these are a NaN in float32, two in float16

Work = Callable[[], bool]
"""Does its part and says whether it is through; False waits for another stream."""


class _Block:
    """Memory that stays, so that late work finds poison rather than somebody else's data."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = np.full(num_bytes + ALIGNMENT, _POISON, np.uint8)
        self.start = -self._bytes.ctypes.data % ALIGNMENT
        self.address, self.num_bytes = self._bytes.ctypes.data + self.start, num_bytes
        self.bytes = self._bytes[self.start : self.start + num_bytes]

    def poison(self) -> bool:
        self.bytes[:] = _POISON
        return True


class _Owner:
    """What a tensor holds of its block; when nobody does any more, the block is released."""

    def __init__(self, block: _Block, release: Callable[[], object]) -> None:
        self.__array_interface__ = block.bytes.__array_interface__
        self._release = release

    def __del__(self) -> None:
        self._release()


@dataclass(frozen=True)
class _Address:
    """A tensor as a kernel sees it."""

    block: _Block
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        size = self.dtype.itemsize
        end = self.offset + (self.block.num_bytes - self.offset) // size * size
        flat = torch.from_numpy(self.block.bytes[self.offset : end]).view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


class Queue:
    """Work in order; while it is captured, work goes into `graph` instead."""

    def __init__(self, handle: int) -> None:
        self.handle, self.graph = handle, None
        self._pending: list[Work] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, work: Work) -> None:
        (self._pending if self.graph is None else self.graph).append(work)

    def advance(self, most: int) -> bool:
        """Do up to `most` pieces of work; whether there was one that could be done."""
        done = 0
        while self._pending and done < most and self._pending[0]():
            self._pending.pop(0)
            done += 1
        return done > 0


class _Event:
    def __init__(self, gpu: "Gpu") -> None:
        self._gpu = gpu
        self.num_recorded = self.num_passed = 0

    def add_to(self, queue: Queue) -> None:
        assert queue.graph is None, "an event that is recorded in a capture cannot be asked"
        self.num_recorded += 1
        queue.add(partial(self._pass, self.num_recorded))

    def _pass(self, number: int) -> bool:
        self.num_passed = max(self.num_passed, number)
        return True

    def hold_back(self, queue: Queue) -> None:
        number = self.num_recorded
        queue.add(lambda: self.num_passed >= number)

    def wait_on_host(self) -> None:
        self._gpu.host_waits += 1
        self._gpu.run()


class Gpu(TorchDispatchMode):
    """Streams, memory, and everything of `torch.cuda` and `cuda.core` that works on them.

    Inside of `with torch.cuda.device(...)` torch's operations are queued on the current stream, as they are for CUDA
    tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host_waits = 0
        self.captures_to_break = 0
        self._is_capturing = False
        self.builders: list[GraphBuilder] = []
        self.events: dict[int, Event] = {}
        self._blocks: list[_Block] = []
        self._handles = count(1)
        self.queues: dict[int, Queue] = {}
        self.default, self.other = TorchStream(self, handle=0), TorchStream(self)
        self._current = TorchStream(self)
        self.core = SimpleNamespace(Device=partial(Device, self))

    # Memory

    def images(self, values: Tensor) -> Tensor:
        """`values` in memory that torch does not know: it is used anew as soon as nobody holds it."""
        tensor = self._allocate(values.shape, values.dtype, _Block.poison)
        tensor.copy_(values)
        return tensor

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, release: Callable[[_Block], object]) -> Tensor:
        block = _Block(int(np.prod(shape)) * dtype.itemsize)
        self._blocks.append(block)
        array = np.asarray(_Owner(block, partial(release, block)))
        return torch.from_numpy(array).view(dtype).view(*shape)

    def address(self, address: int, shape: Sequence[int], dtype: torch.dtype, stride: Any = None) -> _Address | None:
        for block in self._blocks:
            if block.address <= address < block.address + block.num_bytes:
                dense = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
                return _Address(block, address - block.address, tuple(shape), tuple(stride or dense), dtype)
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        queue = self.queue(self._current)
        assert self._is_capturing or not any(queue.graph is not None for queue in self.queues.values())
        raw_args = tree_map_only(Tensor, self._raw, args)
        if func._schema.is_mutable:
            queue.add(partial(_call, func, raw_args, kwargs))
            return args[0]
        example = func(*args, **kwargs)
        # As in torch's allocator, memory is used anew only behind the work of the stream that it was allocated on.
        result = self._allocate(example.shape, example.dtype, lambda block: queue.add(block.poison))
        if func is not torch.ops.aten.empty.memory_format:
            queue.add(partial(_call, func, raw_args, kwargs, self._raw(result)))
        return result

    def _raw(self, tensor: Tensor) -> Tensor | _Address:
        return self.address(tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()) or tensor

    # Streams

    def new_queue(self, handle: int | None = None) -> Queue:
        handle = next(self._handles) if handle is None else handle
        return self.queues.setdefault(handle, Queue(handle))

    def queue(self, stream: Any) -> Queue:
        return self.queues[stream.__cuda_stream__()[1]]

    def run(self, *, latest_first: bool = False, most: int = 10**9) -> None:
        """Let every stream come to its end, one as far as it gets before the next."""
        for _ in range(10**6):
            queues = list(self.queues.values())
            # All of them in each round, not only up to the first that advances.
            if not any([queue.advance(most) for queue in (reversed(queues) if latest_first else queues)]):
                break
        assert not any(map(len, self.queues.values())), "streams wait for each other"

    @contextmanager
    def on(self, stream: "TorchStream") -> Iterator[None]:
        """Make `stream` torch's current one."""
        before, self._current = self._current, stream
        yield
        self._current = before

    # torch.cuda

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        with self:
            yield

    def current_stream(self, device: torch.device) -> "TorchStream":
        return self._current

    def stream(self, device: torch.device) -> "TorchStream":
        return TorchStream(self)

    def event(self) -> "TorchEvent":
        return TorchEvent(self)

    @contextmanager
    def capture(self, cuda_graph: "CUDAGraph", capture_error_mode: str) -> Iterator[None]:
        """`torch.cuda.graph`: what is queued inside, on a stream of its own, is kept in place of being done."""
        assert capture_error_mode == "thread_local"
        stream = TorchStream(self)
        queue = self.queue(stream)
        queue.graph, self._is_capturing = [], True
        with self.on(stream):
            try:
                yield
            finally:
                cuda_graph._work, queue.graph, self._is_capturing = queue.graph, None, False
        if self.captures_to_break:
            self.captures_to_break -= 1
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def _call(func: Any, args: Any, kwargs: Any, result: _Address | None = None) -> bool:
    value = func(*tree_map_only(_Address, _Address.tensor, args), **kwargs)
    if result is not None:
        result.tensor().copy_(value)
    return True


class TorchStream:
    """`torch.cuda.Stream`."""

    def __init__(self, gpu: Gpu, handle: int | None = None) -> None:
        self._gpu, self._queue = gpu, gpu.new_queue(handle)
        self.cuda_stream = self._queue.handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.cuda_stream

    def wait_event(self, event: "TorchEvent") -> None:
        event._event.hold_back(self._queue)

    def record_event(self, event: "TorchEvent | None" = None) -> "TorchEvent":
        event = TorchEvent(self._gpu) if event is None else event
        event._event.add_to(self._queue)
        return event

    def synchronize(self) -> None:
        self._gpu.host_waits += 1
        self._gpu.run()

    def wait_stream(self, stream: "TorchStream") -> None:
        self.wait_event(stream.record_event(TorchEvent(self._gpu)))


class TorchEvent:
    """`torch.cuda.Event`."""

    def __init__(self, gpu: Gpu) -> None:
        self._event = _Event(gpu)

    def synchronize(self) -> None:
        self._event.wait_on_host()

    def query(self) -> bool:
        return self._event.num_passed == self._event.num_recorded


class CUDAGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._work, self._num_replays = gpu, [], 0

    def replay(self) -> None:
        self._num_replays += 1
        for work in self._work:
            self._gpu.queue(self._gpu._current).add(work)


class Device:
    """`cuda.core.Device`."""

    def __init__(self, gpu: Gpu, device_id: int | None) -> None:
        self._gpu, self._is_current = gpu, False

    def set_current(self) -> None:
        self._is_current = True

    def create_stream(self, obj: Any) -> "Stream":
        assert self._is_current
        return Stream(self._gpu.queue(obj))

    def create_event(self) -> "Event":
        assert self._is_current
        return Event(self._gpu)

    def create_graph_builder(self) -> "GraphBuilder":
        assert self._is_current
        return GraphBuilder(self._gpu)


class Stream:
    """`cuda.core.Stream`."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self.handle = queue, queue.handle

    def record(self, event: "Event") -> "Event":
        event._event.add_to(self._queue)
        return event


class Event:
    """`cuda.core.Event`."""

    def __init__(self, gpu: Gpu) -> None:
        self._event = _Event(gpu)
        self.handle = id(self)
        gpu.events[self.handle] = self

    @property
    def is_done(self) -> bool:
        return self._event.num_passed == self._event.num_recorded


class GraphBuilder:
    """`cuda.core.graph.GraphBuilder`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._queue, self._is_closed = gpu, gpu.new_queue(), False
        self.stream = Stream(self._queue)
        gpu.builders.append(self)

    def begin_building(self, mode: str) -> "GraphBuilder":
        assert mode == "thread_local"
        self._queue.graph = []
        return self

    def end_building(self) -> "GraphBuilder":
        self._work, self._queue.graph = self._queue.graph, None
        if self._gpu.captures_to_break:
            self._gpu.captures_to_break -= 1
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        return self

    def complete(self) -> "Graph":
        return Graph(self._work)

    def close(self) -> None:
        self._queue.graph, self._is_closed = None, True


class Graph:
    """`cuda.core.graph.Graph`."""

    def __init__(self, work: list[Work]) -> None:
        self._work, self.num_launches = work, 0

    def launch(self, stream: Stream) -> None:
        self.num_launches += 1
        for work in self._work:
            stream._queue.add(work)


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
    """What an engine file says, for the fake: the logits are the images' means, the features the images plus one."""

    image: tuple[str, tuple[int, ...], DataType] = ("images", (-1, 3, 5, 5), DataType.FLOAT)
    outputs: dict[str, tuple[tuple[int, ...], DataType]] = field(
        default_factory=lambda: {"logits": ((-1, 3), DataType.FLOAT)}
    )
    profiles: tuple[tuple[int, int, int], ...] = ((1, 4, 8),)
    layout: TensorFormat = TensorFormat.LINEAR
    more_inputs: tuple[str, ...] = ()
    invalidity: int = 0


class Library:
    """What is loaded and made, and how it is to fail; `module` is what `import tensorrt` gives."""

    def __init__(self, gpu: Gpu, runtime: str, plans: dict[bytes, Plan]) -> None:
        self.gpu, self.plans = gpu, plans
        self.calls: list[tuple[Any, ...]] = []
        self.fails: set[str] = set()
        """Names of methods that return None or False."""
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
            **(
                {
                    "EngineValidity": EngineValidity,
                    "EngineInvalidityDiagnostics": EngineInvalidityDiagnostics,
                    "CudaGraphStrategy": CudaGraphStrategy,
                }
                if is_rtx
                else {}
            ),
        )

    def fail(self, method: str, reason: str = "") -> bool:
        """Whether `method` is to fail; then the logger has heard why."""
        if method in self.fails or reason:
            self.logger.log(ILogger.ERROR, f"{method}: {reason or 'as told'}")
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
    """`tensorrt.IExecutionContext`; an engine reads its input first and writes its outputs from scratch memory."""

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

    def _read(self, images: _Address) -> bool:
        self._scratch = images.tensor().float().clone()
        return True

    def _write(self, outputs: dict[str, _Address]) -> bool:
        for name, output in outputs.items():
            output.tensor().copy_(answers(self._scratch)["features" if name == "features" else "logits"])
        return True


def answers(images: Tensor) -> dict[str, Tensor]:
    """What every fake engine computes."""
    return {"logits": images.float().mean((2, 3)), "features": images.float() + 1.0}
