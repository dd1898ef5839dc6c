"""PyTorch as the teacher's runtime: an `nn.Module`, on any device."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.torch_compile import torch_compile
from kd_pipeline.errors import TeacherError
from kd_pipeline.models.backbone import prefix_tokens_of
from kd_pipeline.models.modules import frozen_copy, named_outputs
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.example import has_free_sizes, input_specs, trial_rows

__all__ = ["PyTorchTeacher", "module_digest", "runtime_fingerprint"]

_logger = logging.getLogger("kd_pipeline")

Inputs = TypeVar("Inputs", Tensor, Tensor | Mapping[str, Tensor])

_NUM_WARM_UP = 3
"""Forward passes before a capture, in which libraries select kernels and allocate; as in PyTorch's own examples."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PyTorchTeacher(Teacher):
    """A frozen copy of a module that returns logits, other features, or a mapping of tensors by name."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        module: nn.Module,
        *,
        image_shape: Sequence[int | None] | None = None,
        example: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        precision: str = "fp32",
        max_batch: int = 1024,
        channels_last: bool = True,
        compile: bool = False,
        batch_size: int | None = None,
        cuda_graph: bool = False,
        digest: str | None = None,
    ) -> None:
        """Copy `module`, and run the copy once to learn its outputs.

        Args:
            module: the model; it stays as it is.
            image_shape: `(3, H, W)`, or the sizes of one row of another only input; None is any size.
            example: inputs by name, each `[N, ...]`, instead of an `image_shape` and `dtype`; see `input_specs`.
            device: where to run.
            dtype: of the images: float32 or float16.
            precision: dtype of the parameters and of the floating-point inputs that the module sees: `fp32`, `bf16` or
                `fp16`, even under autocast. On a GPU, `fp32` follows the TF32 switches in `torch.backends`.
            max_batch: largest number of images in one call.
            channels_last: run in NHWC.
            compile: use `torch.compile`, which compiles at the first call and again at a new batch size.
            batch_size: usual number of images in one call; runs the first such call here.
            cuda_graph: replay calls with `batch_size` images as one captured CUDA graph, and run others without it.
                https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs lists the conditions for the module.
            digest: the `module_digest` of the module, if it is known already.

        Raises:
            TeacherError: the module cannot be copied, fails, writes to its input, or returns something else.
        """
        model = frozen_copy(module)
        fingerprint = runtime_fingerprint("pytorch", precision, digest or module_digest(model))
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._dtype, self._device_type = _DTYPES[precision], torch.device(device).type
        self._model: Callable[..., object] = model.to(device, self._dtype).to(memory_format=self._memory_format)
        specs = input_specs(image_shape, dtype, example)
        rows = {name: each.to(device) for name, each in trial_rows(specs, example).items()}
        super().__init__(
            backend="pytorch",
            precision=precision,
            device=next(iter(rows.values())).device,
            inputs=specs,
            outputs=self._learn_outputs(rows, has_free_sizes=has_free_sizes(specs)),
            max_batch=max_batch,
            classes=None,
            fingerprint=fingerprint,
        )
        if compile:
            self._model = torch_compile(self._model)
        self._cuda_graph: _CudaGraph | None = None
        if batch_size is not None:
            usual = {name: each[torch.arange(batch_size) % 2] for name, each in rows.items()}
            self(usual)
            if cuda_graph:
                self._cuda_graph = _capture(self._forward, self._cast(next(iter(usual.values()))))
        if self.device.type == "cuda":
            # The weights are there for the first call, on whatever stream it is.
            torch.cuda.synchronize(self.device)

    @property
    def has_cuda_graph(self) -> bool:
        """Whether calls with `batch_size` images replay a CUDA graph; false also if it could not be captured."""
        return self._cuda_graph is not None

    def _infer(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self._cuda_graph
        if graph is not None and isinstance(images, Tensor) and images.shape == graph.shape:
            return graph.run(images, self.outputs)
        return _owned(self._forward(self._cast(images)), self.outputs)

    def _release(self) -> None:
        del self._model, self._cuda_graph

    def _cast(self, inputs: Inputs) -> Inputs:
        """In the module's dtype and layout; indices and masks stay what they are."""
        if not isinstance(inputs, Tensor):
            return {name: self._cast(each) for name, each in inputs.items()}
        if not inputs.is_floating_point():
            return inputs
        if inputs.ndim != 4:
            return inputs.to(self._dtype)
        return inputs.to(self._dtype, memory_format=self._memory_format)

    def _forward(self, inputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.autocast(self._device_type, enabled=False):
            return named_outputs(self._model(inputs) if isinstance(inputs, Tensor) else self._model(**inputs))

    def _learn_outputs(self, rows: Mapping[str, Tensor], *, has_free_sizes: bool) -> dict[str, TensorSpec]:
        """Run the module once on two rows and check its outputs."""
        name = type(self._model).__qualname__
        inputs = self._cast(next(iter(rows.values())) if len(rows) == 1 else rows)
        tensors = [inputs] if isinstance(inputs, Tensor) else [*inputs.values()]
        versions = [each._version for each in tensors]
        try:
            outputs = self._forward(inputs)
        except TeacherError:
            raise
        except Exception as exc:
            found = " and ".join(f"{key} {list(each.shape)}" for key, each in rows.items())
            raise TeacherError(f"the teacher {name} fails on {found}: {exc}") from exc
        if versions != [each._version for each in tensors]:
            raise TeacherError(
                f"the teacher {name} writes to its input in place, which the student reads too; "
                "make its first operation out of place"
            )
        for key, output in outputs.items():
            if output.ndim == 0 or len(output) != 2 or (key == "logits" and output.ndim not in (2, 4)):
                wanted = "[2, K] or [2, K, h, w]" if key == "logits" else "[2, ...]"
                raise TeacherError(
                    f"the teacher {name} returns {key!r} {list(output.shape)} for 2 images, not {wanted}"
                )
        assert isinstance(self._model, nn.Module)  # it is compiled later
        prefix = prefix_tokens_of(self._model, outputs)
        return {
            key: TensorSpec((None, *_output_sizes(output, has_free_sizes=has_free_sizes)), torch.float32, prefix[key])
            for key, output in outputs.items()
        }


def _output_sizes(output: Tensor, *, has_free_sizes: bool) -> tuple[int | None, ...]:
    """The sizes of one row; those that may come from a free size of the input are free too."""
    sizes: tuple[int | None, ...] = tuple(output.shape[1:])
    if not has_free_sizes or len(sizes) < 2:
        return sizes
    if len(sizes) == 2:  # tokens [N, L, D]
        return None, sizes[1]
    return sizes[0], *(None for _ in sizes[1:])


class _CudaGraph:
    """The forward pass of one batch size as a CUDA graph, with images and outputs at fixed addresses."""

    def __init__(self, forward: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor) -> None:
        self._images, self._device = images, images.device
        self._done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            side_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side_stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side_stream):
                for _ in range(_NUM_WARM_UP):
                    forward(images)
            torch.cuda.current_stream(self._device).wait_stream(side_stream)
            self._graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            try:
                # The outer context ends with the stream that was current, where that of a failed capture does not.
                # torch's own stream is that of the first capture, perhaps on another GPU. The mode lets other threads,
                # such as DALI's, allocate and copy during the capture.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(self._device)),
                    torch.cuda.graph(self._graph, pool=pool, stream=side_stream, capture_error_mode="thread_local"),
                ):
                    self._outputs = forward(images)
            except Exception:
                _end_failed_capture(self._device, pool)
                raise

    @property
    def shape(self) -> torch.Size:
        """The one shape of images that it can run."""
        return self._images.shape

    def run(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """The outputs `names`; queues the graph on the current stream, after its earlier runs on any stream."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._done)
            self._images.copy_(images)  # the cast to the module's dtype and layout
            self._graph.replay()
            outputs = _owned(self._outputs, names)
            current.record_event(self._done)
            return outputs


def _capture(forward: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor) -> _CudaGraph | None:
    try:
        return _CudaGraph(forward, images)
    except Exception as exc:  # a module may do anything that a graph cannot capture
        _logger.warning("no CUDA graph for the teacher, which runs without one: %s", exc)
        return None


def _end_failed_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Let torch free memory again.

    Before https://github.com/pytorch/pytorch/pull/180395 its allocator takes a failed capture for one that is still
    under way, during which it keeps all memory that several streams have used.
    """
    with suppress(RuntimeError):  # torch has ended it
        torch._C._cuda_endAllocateToPool(device.index, pool)


def _owned(outputs: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Float32 copies of the outputs `names`: a module may return a view of the images or of its own buffers."""
    to_own = partial(Tensor.to, dtype=torch.float32, memory_format=torch.contiguous_format, copy=True)
    return {name: to_own(outputs[name]) for name in names}


def module_digest(model: nn.Module) -> str:
    """Hex digest of the layers of `model` with their settings, its parameters and its buffers."""
    digest = hashlib.sha256()
    for name, layer in model.named_modules(remove_duplicate=False):
        digest.update(f"{name} {type(layer).__qualname__} {layer.extra_repr()}\n".encode())
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def runtime_fingerprint(backend: str, precision: str, digest: str) -> str:
    """Fingerprint of a teacher that runs the module with this digest, wherever and whenever it was exported."""
    return hashlib.sha256(f"{backend} {precision} {digest}".encode()).hexdigest()
