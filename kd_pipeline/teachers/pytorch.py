"""PyTorch as the teacher's runtime: an `nn.Module`, on any device."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.torch_compile import torch_compile
from kd_pipeline.errors import TeacherError
from kd_pipeline.models.backbone import prefix_tokens_of
from kd_pipeline.models.modules import frozen_copy, named_outputs
from kd_pipeline.teachers.base import Teacher

__all__ = ["PyTorchTeacher", "module_digest", "runtime_fingerprint"]

_logger = logging.getLogger("kd_pipeline")

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
        image_shape: tuple[int, int, int],
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
            image_shape: `(3, H, W)`.
            device: where to run.
            dtype: of the images: float32 or float16.
            precision: dtype of the parameters and of the images that the module sees: `fp32`, `bf16` or `fp16`, even
                under autocast. On a GPU, `fp32` follows the TF32 switches in `torch.backends`.
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
        self._dtype = _DTYPES[precision]
        self._model: Callable[[Tensor], object] = model.to(device, self._dtype).to(memory_format=self._memory_format)
        zeros = torch.zeros(2, *image_shape, dtype=dtype, device=device)
        super().__init__(
            backend="pytorch",
            precision=precision,
            device=zeros.device,
            images=TensorSpec((None, *image_shape), dtype),
            outputs=self._learn_outputs(zeros),
            max_batch=max_batch,
            classes=None,
            fingerprint=fingerprint,
        )
        if compile:
            self._model = torch_compile(self._model)
        self._cuda_graph: _CudaGraph | None = None
        if batch_size is not None:
            usual = zeros.new_zeros(batch_size, *image_shape)
            self(usual)
            if cuda_graph:
                self._cuda_graph = _capture(self._forward, self._cast(usual))
        if zeros.is_cuda:
            # The weights are there for the first call, on whatever stream it is.
            torch.cuda.synchronize(zeros.device)

    @property
    def has_cuda_graph(self) -> bool:
        """Whether calls with `batch_size` images replay a CUDA graph; false also if it could not be captured."""
        return self._cuda_graph is not None

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        if self._cuda_graph is not None and len(images) == self._cuda_graph.num_images:
            return self._cuda_graph.run(images, self.outputs)
        return _owned(self._forward(self._cast(images)), self.outputs)

    def _release(self) -> None:
        del self._model, self._cuda_graph

    def _cast(self, images: Tensor) -> Tensor:
        return images.to(self._dtype, memory_format=self._memory_format)

    def _forward(self, images: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            return named_outputs(self._model(images))

    def _learn_outputs(self, zeros: Tensor) -> dict[str, TensorSpec]:
        """Run the module once and check its outputs."""
        name, images = type(self._model).__qualname__, self._cast(zeros)
        version = images._version
        try:
            outputs = self._forward(images)
        except TeacherError:
            raise
        except Exception as exc:
            raise TeacherError(f"the teacher {name} fails on zeros {list(zeros.shape)}: {exc}") from exc
        if images._version != version:
            raise TeacherError(
                f"the teacher {name} writes to its input in place, which the student reads too; "
                "make its first operation out of place"
            )
        for key, output in outputs.items():
            if output.ndim == 0 or len(output) != 2 or (key == "logits" and output.ndim != 2):
                wanted = "[2, K]" if key == "logits" else "[2, ...]"
                raise TeacherError(
                    f"the teacher {name} returns {key!r} {list(output.shape)} for 2 images, not {wanted}"
                )
        assert isinstance(self._model, nn.Module)  # it is compiled later
        prefix = prefix_tokens_of(self._model, outputs)
        return {
            key: TensorSpec((None, *output.shape[1:]), torch.float32, prefix[key]) for key, output in outputs.items()
        }


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
            self._graph = torch.cuda.CUDAGraph()
            # This mode lets other threads, such as DALI's, allocate and copy during the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = forward(images)

    @property
    def num_images(self) -> int:
        """The one batch size that it can run."""
        return len(self._images)

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
