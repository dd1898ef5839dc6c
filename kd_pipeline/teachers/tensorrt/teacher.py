"""TensorRT as the teacher's runtime: an engine on a GPU, queued on the caller's stream without a host sync."""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.tensorrt.manifest import EngineFile, Profile
from kd_pipeline.teachers.tensorrt.runtime import LoadedEngine, load_engine

__all__ = ["TensorRTTeacher"]

_logger = logging.getLogger("kd_pipeline")

_ALIGNMENT = 256
"""In bytes; TensorRT reads and writes only at multiples of it."""
_MAX_CAPTURES = 3
"""Attempts to capture one CUDA graph."""


class TensorRTTeacher(Teacher):
    """An engine run by TensorRT or TensorRT-RTX, through `cuda.core`.

    The engine reads the images in place and writes to output tensors that the caller gets. Copies are made only of
    images that do not start at a multiple of 256 bytes (a slice of a batch may not) or are fewer than every fitting
    profile takes, and of float16 outputs, to float32.
    """

    def __init__(
        self,
        engine: EngineFile,
        *,
        device: torch.device,
        runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto",
        cuda_graph: bool = False,
    ) -> None:
        """Load `engine` on a GPU.

        Args:
            engine: the engine, with its manifest if it has one.
            device: a GPU.
            runtime: which TensorRT to use; `auto` is the manifest's.
            cuda_graph: replay each batch size as one captured CUDA graph. It saves launches, and costs a copy of images
                and outputs, and memory for each batch size.

        Raises:
            EngineError: TensorRT rejects the engine, it is no teacher, or it does not match its manifest.
            MissingPackageError: TensorRT is not installed.
        """
        device = torch.empty(0, device=device).device  # with its index
        with torch.cuda.device(device):
            self._engine = loaded = load_engine(engine, runtime=runtime, cuda_graph=cuda_graph)
            self._cuda = _Cuda(device)
        self._sizes = [size for size in loaded.image.shape[1:] if size is not None]
        self._runners: dict[int, _Runner] = {}
        self._graphs: dict[int, _CudaGraph] = {}
        self._held: deque[tuple[Any, Tensor, Tensor]] = deque()
        self._captures = cuda_graph and loaded.tensorrt.runtime == "tensorrt"  # TensorRT-RTX has its own
        manifest = engine.manifest
        super().__init__(
            backend="tensorrt",
            precision="unknown" if manifest is None else manifest.precision,
            device=device,
            images=TensorSpec(loaded.image.shape, getattr(torch, loaded.image.dtype)),
            outputs={
                name: TensorSpec(output.shape, torch.float32, output.num_prefix_tokens)
                for name, output in loaded.outputs.items()
            },
            max_batch=max(profile.max for profile in loaded.profiles),
            classes=None if manifest is None else manifest.classes,
            fingerprint=_fingerprint(engine),
        )
        if self._captures:
            # Now, because DALI synchronizes the device from its own thread, which breaks a capture.
            for profile in loaded.profiles:
                self(torch.zeros(profile.opt, *self._sizes, dtype=self.images.dtype, device=device))

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        index = _choose_profile(self._engine.profiles, len(images))
        num_rows = max(len(images), self._engine.profiles[index].min)
        with self._cuda.ordered():
            while self._held and self._held[0][0].is_done:
                self._held.popleft()
            consumed = self._cuda.device.create_event()
            if self._captures:
                if num_rows not in self._graphs:
                    self._graphs[num_rows] = self._make_graph(index, num_rows)
                read, outputs = images, self._graphs[num_rows].run(images, consumed)
            else:
                if index not in self._runners:
                    self._runners[index] = self._make_runner(index)
                runner, read = self._runners[index], _readable(images, num_rows)
                outputs = runner.allocate_outputs(read)
                with self._cuda.stream() as stream:
                    runner.enqueue(read, outputs, stream, consumed)
            # DALI recycles the memory of images as soon as nobody holds them, whatever is still queued.
            self._held.append((consumed, images, read))
            return {
                name: output[: len(images)].float()
                for name, output in zip(self._engine.outputs, outputs, strict=True)
                if name in self.outputs
            }

    def _release(self) -> None:
        try:
            self._cuda.synchronize()
            self._engine.save_kernels()
        finally:
            self._held.clear()
            self._graphs.clear()
            self._runners.clear()
            del self._engine

    def _make_runner(self, index: int) -> "_Runner":
        """A runner with its own execution context for the profile `index`."""
        context = self._engine.create_context()
        with self._cuda.stream() as stream:
            is_set = context.set_optimization_profile_async(index, int(stream.handle))
        self._engine.tensorrt.check(is_set, f"TensorRT cannot use the profile {index}")
        return _Runner(self._engine, context)

    def _make_graph(self, index: int, num_rows: int) -> "_CudaGraph":
        """A graph with its own context, whose memory it refers to, and whose shape stays the captured one."""
        images = torch.zeros(num_rows, *self._sizes, dtype=self.images.dtype, device=self.device)
        return _CudaGraph(self._cuda, self._make_runner(index), images)


class _Cuda:
    """torch's current stream as a `cuda.core.Stream`, and the order of the teacher's work across streams."""

    def __init__(self, device: torch.device) -> None:
        core = require("cuda.core", extra="cu13")
        self._torch_device = device
        self.device = core.Device(device.index)
        self.device.set_current()
        self._side_stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._wrapped: dict[int, Any] = {}

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Order what is queued inside after all earlier calls, on whatever stream they were.

        The contexts of an engine, and the fixed buffers of a graph, serve one call at a time.
        """
        with torch.cuda.device(self._torch_device):
            self.device.set_current()  # cuda.core needs it once per thread
            current = torch.cuda.current_stream(self._torch_device)
            current.wait_event(self._done)
            try:
                yield
            finally:
                current.record_event(self._done)

    @contextmanager
    def stream(self) -> Iterator[Any]:
        """A `cuda.core.Stream` for TensorRT: torch's current one, or a substitute for the default stream.

        On the default stream TensorRT synchronizes the device at each call. There it gets a side stream instead, which
        is synchronized with the default stream on the GPU.
        """
        current = torch.cuda.current_stream(self._torch_device)
        if current.cuda_stream:
            yield self._wrap(current)
        else:
            self._side_stream.wait_stream(current)
            try:
                yield self._wrap(self._side_stream)
            finally:
                current.wait_stream(self._side_stream)

    def synchronize(self) -> None:
        """Let the host wait for all calls so far."""
        self._done.synchronize()

    def _wrap(self, stream: Any) -> Any:
        handle = stream.cuda_stream
        if handle not in self._wrapped:
            self._wrapped[handle] = self.device.create_stream(stream)
        return self._wrapped[handle]


class _Runner:
    """An execution context of one profile: sets shapes, then addresses, then queues the engine."""

    def __init__(self, engine: LoadedEngine, context: Any) -> None:
        self._check, self._context = engine.tensorrt.check, context
        self._image, self._outputs = engine.image, list(engine.outputs.values())
        self._shape: tuple[int, ...] | None = None
        self._output_shapes: list[tuple[int, ...]] = []

    def allocate_outputs(self, images: Tensor) -> list[Tensor]:
        """Set the shape of `images`, and allocate uninitialized outputs for them."""
        shape = tuple(images.shape)
        if shape != self._shape:
            self._shape = None
            self._check(
                self._context.set_input_shape(self._image.name, shape), f"TensorRT rejects images {list(shape)}"
            )
            self._output_shapes = [tuple(self._context.get_tensor_shape(output.name)) for output in self._outputs]
            self._shape = shape
        return [
            torch.empty(shape, dtype=getattr(torch, output.dtype), device=images.device)
            for shape, output in zip(self._output_shapes, self._outputs, strict=True)
        ]

    def enqueue(self, images: Tensor, outputs: list[Tensor], stream: Any, consumed: Any = None) -> None:
        """Queue the engine on `stream`, and record the event `consumed` when it has read `images`."""
        for io, tensor in zip((self._image, *self._outputs), (images, *outputs), strict=True):
            is_set = self._context.set_tensor_address(io.name, tensor.data_ptr())
            self._check(is_set, f"TensorRT rejects the address {tensor.data_ptr():#x} for {io.name!r}")
        handle = 0 if consumed is None else int(consumed.handle)
        self._check(self._context.set_input_consumed_event(handle), "TensorRT rejects an event")
        self._check(self._context.execute_async_v3(int(stream.handle)), "TensorRT cannot run the engine")


class _CudaGraph:
    """A context with fixed buffers and, once captured, the CUDA graph that replays it."""

    def __init__(self, cuda: _Cuda, runner: _Runner, images: Tensor) -> None:
        self._cuda, self._runner, self._images = cuda, runner, images
        self._outputs = runner.allocate_outputs(images)
        self._graph: Any = None
        self._captures_left = _MAX_CAPTURES

    def run(self, images: Tensor, consumed: Any) -> list[Tensor]:
        """Queue the engine on a copy of `images`, return copies of its outputs, and capture it if not done yet."""
        self._images[: len(images)].copy_(images)
        with self._cuda.stream() as stream:
            stream.record(consumed)
            if self._graph is None:
                self._runner.enqueue(self._images, self._outputs, stream)
            else:
                self._graph.launch(stream)
        if self._graph is None and self._captures_left:
            self._capture()  # TensorRT needs one plain call with these shapes before
        return [output.clone() for output in self._outputs]

    def _capture(self) -> None:
        self._captures_left -= 1
        try:
            # This mode lets other threads allocate and copy; no mode lets them synchronize the device.
            builder = self._cuda.device.create_graph_builder().begin_building(mode="thread_local")
            try:
                self._runner.enqueue(self._images, self._outputs, builder.stream)
                self._graph = builder.end_building().complete()
            finally:
                builder.close()
        except Exception as exc:  # cuda.core has its own error classes
            _logger.warning(
                "no CUDA graph for %d images, which run without one; %d more attempts: %s",
                len(self._images),
                self._captures_left,
                exc,
            )


def _choose_profile(profiles: tuple[Profile, ...], num_images: int) -> int:
    """The profile with the smallest maximum that takes so many images; those without padding come first."""
    fitting = [index for index, profile in enumerate(profiles) if num_images <= profile.max]
    return min(fitting, key=lambda index: (profiles[index].min > num_images, profiles[index].max))


def _readable(images: Tensor, num_rows: int) -> Tensor:
    """`images` if TensorRT can read them in place, else a copy, with zeros up to `num_rows`."""
    if len(images) == num_rows and images.data_ptr() % _ALIGNMENT == 0:
        return images
    copy = images.new_zeros(num_rows, *images.shape[1:])
    copy[: len(images)].copy_(images)
    return copy


def _fingerprint(file: EngineFile) -> str:
    """Equal for engines of one model at one precision, wherever they were built and run."""
    manifest = file.manifest
    if manifest is None:
        return hashlib.sha256(b"tensorrt " + file.content).hexdigest()
    model = ("onnx_sha256", "input_adapter", "extra_outputs", "half_io", "calibration_sha256", "converter")
    content = json.dumps(manifest.model_dump(mode="json", include=set(model)), sort_keys=True)
    return hashlib.sha256(f"tensorrt {manifest.precision} {content}".encode()).hexdigest()
