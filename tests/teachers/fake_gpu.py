"""A fake GPU whose streams run late and whose memory turns to NaN when it is freed, for `torch.cuda` and `cuda.core`.

torch's CPU tensors are its device memory. Queued work, of an engine or of torch itself, reads and writes by address,
and only when `Gpu.run` gets to it. So a missing stream synchronization, or a buffer that is freed too early, shows in
the outputs. The classes have the methods and parameters of the real ones that `kd_pipeline` uses, and no others.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

ALIGNMENT = 256
_POISON = 0xFF  # a NaN in float32 and in float16

Work = Callable[[], bool]
"""Does its work and returns True, or returns False to wait for a different stream."""


class _Block:
    """Memory that is never reused: late work finds poison in it."""

    def __init__(self, num_bytes: int, *, is_host: bool = False) -> None:
        self.is_host, self.is_freed, self.is_checked = is_host, False, False
        self.users: list[Queue] = []
        """Streams that use it besides the one that it was allocated on."""
        self._bytes = np.full(num_bytes + ALIGNMENT, _POISON, np.uint8)
        self.start = -self._bytes.ctypes.data % ALIGNMENT
        self.address, self.num_bytes = self._bytes.ctypes.data + self.start, num_bytes
        self.bytes = self._bytes[self.start : self.start + num_bytes]

    def spoil(self) -> bool:
        self.bytes[:] = _POISON
        return True

    def poison(self) -> bool:
        self.is_freed = True
        return self.spoil()


class _Owner:
    """The owner of a tensor's memory; `release` is called when the last tensor is gone."""

    def __init__(self, block: _Block, release: Callable[[], object]) -> None:
        self.__array_interface__ = block.bytes.__array_interface__
        self._release = release

    def __del__(self) -> None:
        self._release()


@dataclass(frozen=True)
class Address:
    """A tensor as a kernel sees it."""

    block: _Block
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        assert not (self.block.is_checked and self.block.is_freed), "late work uses memory that was freed"
        size = self.dtype.itemsize
        end = self.offset + (self.block.num_bytes - self.offset) // size * size
        flat = torch.from_numpy(self.block.bytes[self.offset : end]).view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


class Queue:
    """The work of a stream, in order; during a capture, work goes into `graph` instead."""

    def __init__(self, handle: int) -> None:
        self.handle, self.graph = handle, None
        self._pending: list[Work] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, work: Work) -> None:
        (self._pending if self.graph is None else self.graph).append(work)

    def advance(self, most: int) -> bool:
        """Do up to `most` pieces of work; returns whether any could be done."""
        done = 0
        while self._pending and done < most and self._pending[0]():
            self._pending.pop(0)
            done += 1
        return done > 0


class _Event:
    def __init__(self) -> None:
        self.num_recorded = self.num_passed = 0

    def add_to(self, queue: Queue) -> None:
        assert queue.graph is None, "an event recorded in a capture cannot be queried"
        self.num_recorded += 1
        queue.add(partial(self._pass, self.num_recorded))

    def _pass(self, number: int) -> bool:
        self.num_passed = max(self.num_passed, number)
        return True

    def block(self, queue: Queue) -> None:
        number = self.num_recorded
        queue.add(lambda: self.num_passed >= number)

    def is_done(self) -> bool:
        return self.num_passed == self.num_recorded


class Gpu(TorchDispatchMode):
    """Streams and memory, and the parts of `torch.cuda` and `cuda.core` that use them.

    Inside `with torch.cuda.device(...)` torch's operations are queued on the current stream, as for CUDA tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host_waits = 0
        self.captures_to_break = 0
        self.is_strict = False
        """Whether late work may not even touch memory that was freed, whatever becomes of its result."""
        self.pools: set[tuple[int, int]] = set()
        """Of captures that torch's allocator takes for under way."""
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

    def images(self, values: Tensor, *, is_host: bool = False) -> Tensor:
        """`values` in memory that torch did not allocate: it is poisoned as soon as nobody holds it.

        With `is_host` it is pinned memory of the host.
        """
        tensor = self._allocate(values.shape, values.dtype, _Block.poison, is_host=is_host)
        tensor.copy_(values)
        return tensor

    def _allocate(
        self, shape: Sequence[int], dtype: torch.dtype, release: Callable[[_Block], object], *, is_host: bool = False
    ) -> Tensor:
        block = _Block(int(np.prod(shape)) * dtype.itemsize, is_host=is_host)
        block.is_checked = self.is_strict
        self._blocks.append(block)
        array = np.asarray(_Owner(block, partial(release, block)))
        return torch.from_numpy(array).view(dtype).view(*shape)

    def address(self, address: int, shape: Sequence[int], dtype: torch.dtype, stride: Any = None) -> Address | None:
        for block in self._blocks:
            if block.address <= address < block.address + block.num_bytes:
                dense = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
                return Address(block, address - block.address, tuple(shape), tuple(stride or dense), dtype)
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
        result = self._allocate(example.shape, example.dtype, partial(self._free, queue))
        if func is not torch.ops.aten.empty.memory_format:
            queue.add(partial(_call, func, raw_args, kwargs, self._raw(result)))
        return result

    def _free(self, queue: Queue, block: _Block) -> None:
        """As torch's allocators: memory is reused after the work of the stream that it was allocated on, and of those
        that were recorded."""
        if not block.users:
            # What was freed in a capture is the graph's own, which uses it again at each replay.
            queue.add(block.poison if queue.graph is None else block.spoil)
            return
        reuse = self.new_queue()
        for user in (queue, *block.users):
            event = _Event()
            event.add_to(user)
            event.block(reuse)
        reuse.add(block.poison)

    def _block(self, tensor: Tensor) -> _Block | None:
        address = self.address(tensor.data_ptr(), (), tensor.dtype)
        return None if address is None else address.block

    # torch.Tensor

    def is_cuda(self, tensor: Tensor) -> bool:
        block = self._block(tensor)
        return block is not None and not block.is_host

    def record_stream(self, tensor: Tensor, stream: "TorchStream") -> None:
        block = self._block(tensor)
        assert block is not None and not block.is_host, "torch has no record_stream for tensors on the CPU"
        block.users.append(stream._queue)

    def pin_memory(self, tensor: Tensor) -> Tensor:
        """A copy by the host in torch's pinned memory, which torch reuses after the copies from it."""
        if (block := self._block(tensor)) is not None:
            assert block.is_host, "torch pins only tensors on the CPU"
            return tensor

        def release(block: _Block) -> None:
            self._free(block.users.pop(), block) if block.users else block.poison()

        with _disable_current_modes():
            return self._allocate(tensor.shape, tensor.dtype, release, is_host=True).copy_(tensor)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy from the host that does not wait."""
        if (block := self._block(tensor)) is None:
            raise AssertionError("a copy from pageable memory may wait for the stream")
        if not block.is_host:
            return tensor
        queue = self.queue(self._current)
        block.users.append(queue)
        copy = self._allocate(tensor.shape, tensor.dtype, partial(self._free, queue))
        queue.add(partial(_call, torch.clone, (self._raw(tensor),), {}, self._raw(copy)))
        return copy

    def _raw(self, tensor: Tensor) -> Tensor | Address:
        return self.address(tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()) or tensor

    # Streams

    def new_queue(self, handle: int | None = None) -> Queue:
        handle = next(self._handles) if handle is None else handle
        return self.queues.setdefault(handle, Queue(handle))

    def queue(self, stream: Any) -> Queue:
        return self.queues[stream.__cuda_stream__()[1]]

    def run(self, *, latest_first: bool = False, most: int = 10**9) -> None:
        """Run every stream to its end, each as far as it gets before the next."""
        with _disable_current_modes():
            for _ in range(10**6):
                queues = list(self.queues.values())
                # A list, to advance all of them in each round.
                if not any([queue.advance(most) for queue in (reversed(queues) if latest_first else queues)]):
                    break
        assert not any(map(len, self.queues.values())), "deadlock between streams"

    def wait_on_host(self) -> None:
        self.host_waits += 1
        self.run()

    @contextmanager
    def on(self, stream: "TorchStream") -> Iterator[None]:
        """Make `stream` torch's current one."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
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
    def capture(
        self, cuda_graph: "CUDAGraph", pool: tuple[int, int], stream: "TorchStream", capture_error_mode: str
    ) -> Iterator[None]:
        """`torch.cuda.graph`: keeps what is queued inside, on `stream`, instead of doing it.

        As that of torch 2.11, it leaves its stream and its pool in use if it fails.
        """
        assert capture_error_mode == "thread_local"
        self.run()  # torch waits for the device
        before, self._current = self._current, stream
        self.pools.add(pool)
        queue = self.queue(self._current)
        queue.graph, self._is_capturing = [], True
        try:
            yield
        finally:
            cuda_graph._work, queue.graph, self._is_capturing = queue.graph, None, False
            if self.captures_to_break:
                self.captures_to_break -= 1
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.end_allocate_to_pool(0, pool)
            self._current = before

    def end_allocate_to_pool(self, device: int, pool: tuple[int, int]) -> None:
        """`torch._C._cuda_endAllocateToPool`."""
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)


def install(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `gpu` the one of `torch.cuda` and `cuda.core`."""
    monkeypatch.setattr(torch.cuda, "device", gpu.device)
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    monkeypatch.setattr(torch.cuda, "Stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: CUDAGraph(gpu))
    monkeypatch.setattr(torch.cuda, "graph", gpu.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", gpu.end_allocate_to_pool)
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.core)


def install_tensors(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors say where they are, and be copied from the host to the device, which torch calls `cpu` too."""
    to, gpu.is_strict = Tensor.to, True

    def copied(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args == (torch.device("cpu"),) and kwargs == {"non_blocking": True}:
            return gpu.to_device(tensor)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", copied)
    monkeypatch.setattr(Tensor, "is_cuda", property(gpu.is_cuda))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: gpu.record_stream(tensor, stream))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: gpu.pin_memory(tensor))


def _call(func: Any, args: Any, kwargs: Any, result: Address | None = None) -> bool:
    value = func(*tree_map_only(Address, Address.tensor, args), **kwargs)
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
        event._event.block(self._queue)

    def record_event(self, event: "TorchEvent | None" = None) -> "TorchEvent":
        event = TorchEvent(self._gpu) if event is None else event
        event._event.add_to(self._queue)
        return event

    def synchronize(self) -> None:
        self._gpu.wait_on_host()

    def wait_stream(self, stream: "TorchStream") -> None:
        self.wait_event(stream.record_event(TorchEvent(self._gpu)))


class TorchEvent:
    """`torch.cuda.Event`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._event = gpu, _Event()

    def synchronize(self) -> None:
        self._gpu.wait_on_host()

    def query(self) -> bool:
        return self._event.is_done()


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
        self._event = _Event()
        self.handle = id(self)
        gpu.events[self.handle] = self

    @property
    def is_done(self) -> bool:
        return self._event.is_done()


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
