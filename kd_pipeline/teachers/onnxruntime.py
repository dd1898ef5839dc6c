"""ONNX Runtime as the teacher's runtime: an ONNX file on a CPU or an NVIDIA GPU, in the file's own precision."""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import MissingPackageError, TeacherError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.session import open_session
from kd_pipeline.teachers.base import Teacher

__all__ = ["OnnxRuntimeTeacher", "why_no_cuda"]

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}
_CUDA = "CUDAExecutionProvider"
_CUDA_13_SINCE = "1.27"
"""The first onnxruntime-gpu on PyPI that is built for CUDA 13; those before it are for CUDA 12."""


class OnnxRuntimeTeacher(Teacher):
    """An ONNX file run by ONNX Runtime's CPU provider, or on a GPU by its CUDA provider.

    The runtime reads the images where they lie and writes outputs that are the caller's. On a GPU its work is queued
    between two waits of the caller's stream, and the host waits for nothing.

    `precision` must be that of the file's weights, because the runtime changes nothing about it; None takes whatever
    it is. `num_threads` defaults to the cores of this process. `as_written` runs each node as the file has it: the
    runtime's optimizer would join nodes, and leave out roundings between them that a file asks for to emulate another
    precision.
    """

    def __init__(
        self,
        onnx: Path,
        *,
        device: torch.device | str = "cpu",
        precision: str | None = "fp32",
        max_batch: int = 1024,
        num_threads: int | None = None,
        as_written: bool = False,
    ) -> None:
        onnxruntime = require("onnxruntime", extra="cpu")
        self._file = file = read_onnx(onnx)
        if precision not in (None, file.precision):
            raise TeacherError(
                f"{file.path} holds {file.precision} weights, wanted {precision}; ONNX Runtime runs a file as it is: "
                f"set the teacher's precision to {file.precision}, or export the teacher in {precision}"
            )
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        self._order = _OnCuda(where) if where.type == "cuda" else _OnCpu()
        try:
            self._session = open_session(
                file.path, providers=self._order.providers, num_threads=num_threads, optimize=not as_written
            )
        except Exception as exc:
            raise TeacherError(f"ONNX Runtime cannot load {file.path}: {exc}") from exc
        if where.type == "cuda" and _CUDA not in self._session.get_providers():
            raise TeacherError(
                f"ONNX Runtime cannot use {where}: {why_no_cuda() or 'its CUDA provider does not load, as it has said'}"
            )
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._sizes: dict[torch.Size, list[tuple[int, ...]]] = {}
        """Of the outputs for one image, by the size of the image."""
        super().__init__(
            backend="onnxruntime",
            precision=file.precision,
            device=where,
            images=file.images,
            outputs={name: TensorSpec(spec.shape, torch.float32) for name, spec in file.outputs.items()},
            max_batch=max_batch,
            classes=file.classes,
            fingerprint=file.fingerprint("onnxruntime", file.precision),
        )

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        dtypes = [spec.dtype for spec in self._file.outputs.values()]
        outputs = [
            torch.empty(len(images), *sizes, dtype=dtype, device=images.device)
            for dtype, sizes in zip(dtypes, self._sizes_of(images), strict=True)
        ]
        binding = self._bind(images)
        for own, output in zip(self._file.output_names.values(), outputs, strict=True):
            binding.bind_output(own, *self._place(output))
        with self._order.turn(images):
            self._session.run_with_iobinding(binding, self._run_options)
        return {name: output.float() for name, output in zip(self.outputs, outputs, strict=True)}

    def _release(self) -> None:
        self._order.wait()
        del self._session

    def _sizes_of(self, images: Tensor) -> list[tuple[int, ...]]:
        """Of each output for one image; where the file leaves them open, the runtime is asked once."""
        size = images.shape[1:]
        if size not in self._sizes:
            known = [spec.shape[1:] for spec in self._file.outputs.values()]
            self._sizes[size] = (
                self._ask_sizes(images[:1]) if any(None in sizes for sizes in known) else known  # type: ignore[assignment]
            )
        return self._sizes[size]

    def _ask_sizes(self, image: Tensor) -> list[tuple[int, ...]]:
        binding = self._bind(image)
        for own in self._file.output_names.values():
            binding.bind_output(own)  # in the runtime's own memory, on the CPU
        with self._order.turn(image):
            self._session.run_with_iobinding(binding)
        return [tuple(value.shape())[1:] for value in binding.get_outputs()]

    def _bind(self, images: Tensor) -> Any:
        binding = self._session.io_binding()
        binding.bind_input(self._file.input_name, *self._place(images))
        return binding

    def _place(self, tensor: Tensor) -> tuple[str, int, type, tuple[int, ...], int]:
        """A tensor as the runtime's bindings take it."""
        dtype = _NUMPY_DTYPES[tensor.dtype]
        return self.device.type, self.device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr()


class _OnCpu:
    """Nothing to order: the runtime returns when the outputs are there."""

    providers: tuple[Any, ...] = ()

    def turn(self, images: Tensor) -> AbstractContextManager[None]:
        """The runtime's call."""
        return nullcontext()

    def wait(self) -> None:
        """Nothing is left to wait for."""


class _OnCuda:
    """A stream for the runtime, which takes one only when a session is made, and its order with the caller's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        options = {
            "device_id": str(device.index),
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",  # float32 is what the file says
            "cudnn_conv_algo_search": "HEURISTIC",  # the default measures, and waits for it, at every new batch size
        }
        self.providers = ((_CUDA, options),)
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @contextmanager
    def turn(self, images: Tensor) -> Iterator[None]:
        """What the runtime queues inside comes after the caller's earlier work and before its later work.

        So the caller's stream owns images and outputs as if it had done the work itself. Memory that is not torch's is
        reused once nobody holds it, so the images are held until they have been read.
        """
        while self._held and self._held[0][0].query():  # type: ignore[no-untyped-call]
            self._held.popleft()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            yield
        finally:
            current.wait_stream(self._stream)
            self._held.append((self._stream.record_event(), images))

    def wait(self) -> None:
        """Let the host wait for all turns."""
        self._stream.synchronize()
        self._held.clear()


def why_no_cuda() -> str | None:
    """Why ONNX Runtime runs nothing on an NVIDIA GPU, and what to type; None where its package is made for one."""
    try:
        onnxruntime = require("onnxruntime", extra="cpu")
    except MissingPackageError:
        return f"ONNX Runtime is not installed: {_install_line()}"
    if _CUDA in onnxruntime.get_available_providers():
        return None
    return f"the installed onnxruntime is for CPUs: pip uninstall -y onnxruntime, then {_install_line()}"


def _install_line() -> str:
    """For the CUDA version of torch, whose libraries ONNX Runtime uses."""
    version = f"<{_CUDA_13_SINCE}" if (torch.version.cuda or "").startswith("12.") else f">={_CUDA_13_SINCE}"
    return f"pip install 'onnxruntime-gpu{version}'"
