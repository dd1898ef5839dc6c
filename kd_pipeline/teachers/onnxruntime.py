"""ONNX Runtime as the teacher's runtime: an ONNX file on a CPU or an NVIDIA GPU, in the file's own precision."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline.errors import MissingPackageError, TeacherError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.session import fused_types, open_session
from kd_pipeline.onnx.weights import shortened
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.example import input_name

__all__ = ["OnnxRuntimeTeacher", "why_no_cuda"]

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}
_INT8_LAYERS = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"}
_FLOAT_LAYERS = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
"""Products of activations, as in attention, among them."""
_CUDA = "CUDAExecutionProvider"
_CUDA_13_SINCE = "1.27"
"""The first onnxruntime-gpu on PyPI for CUDA 13; earlier ones are for CUDA 12."""


class OnnxRuntimeTeacher(Teacher):
    """An ONNX file run by ONNX Runtime's CPU provider, or on a GPU by its CUDA provider.

    The runtime reads the images in place and writes to output tensors that the caller gets. On a GPU it works on a
    stream of its own, which waits for the caller's stream and which the caller's stream waits for; the host does not.
    """

    def __init__(
        self,
        onnx: Path,
        *,
        device: torch.device | str = "cpu",
        precision: str | None = "fp32",
        max_batch: int = 1024,
        num_threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        """Open the file `onnx`.

        Args:
            onnx: the exported teacher.
            device: a CPU or an NVIDIA GPU.
            precision: that of the file's weights, which the runtime cannot change; None takes any, and `int8` is for a
                file with Q/DQ nodes on a CPU.
            max_batch: largest number of images in one call.
            num_threads: threads of the CPU provider; defaults to the cores of this process.
            optimize: let the runtime fuse nodes, which drops the roundings with which a file emulates a precision.

        Raises:
            TeacherError: the file is no teacher, has a different precision, or the runtime cannot load it.
            MissingPackageError: ONNX Runtime is not installed.
        """
        onnxruntime = require("onnxruntime", extra="cpu")
        self._file = file = read_onnx(onnx)
        found = "int8" if precision == "int8" else file.precision
        if precision not in (None, found):
            raise TeacherError(
                f"{file.path} holds {file.precision} weights, wanted {precision}; ONNX Runtime runs a file as it is: "
                f"set the teacher's precision to {file.precision}, or export the teacher in {precision}"
            )
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._stream = _CudaStream(device) if device.type == "cuda" else None
        providers = [] if self._stream is None else [self._stream.provider]
        with file.private_copy() as copy:
            try:
                self._session = open_session(copy, providers=providers, num_threads=num_threads, optimize=optimize)
                if precision == "int8":
                    _check_int8(fused_types(copy), file.path)
            except TeacherError:
                raise
            except Exception as exc:
                raise TeacherError(f"ONNX Runtime cannot load {file.path}: {shortened(exc, copy, file.path)}") from exc
        if self._stream is not None and _CUDA not in self._session.get_providers():
            raise TeacherError(
                f"ONNX Runtime cannot use {device}: {why_no_cuda() or 'its CUDA provider does not load, see its log'}"
            )
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._output_sizes: dict[torch.Size, dict[str, tuple[Any, ...]]] = {}
        """Of each output for one image, by the size of the image."""
        super().__init__(
            backend="onnxruntime",
            precision=found,
            device=device,
            inputs={input_name(file.images): file.images},
            outputs={name: replace(spec, dtype=torch.float32) for name, spec in file.outputs.items()},
            max_batch=max_batch,
            classes=file.classes,
            fingerprint=file.fingerprint("onnxruntime", found),
        )
        self.num_parameters = file.num_parameters

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        sizes, file = self._sizes_for(images), self._file
        outputs = {
            name: torch.empty(len(images), *sizes[name], dtype=file.outputs[name].dtype, device=images.device)
            for name in self.outputs
        }
        binding = self._bind(images)
        for name, output in outputs.items():
            binding.bind_output(file.output_names[name], *self._place(output))
        with self._ordered(images):
            self._session.run_with_iobinding(binding, self._run_options)
        return {name: output.float() for name, output in outputs.items()}

    def _release(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        del self._session

    def _sizes_for(self, images: Tensor) -> dict[str, tuple[Any, ...]]:
        """Size of each output for one image; if the file leaves one open, the model is run once to learn it."""
        size = images.shape[1:]
        if size not in self._output_sizes:
            sizes = {name: spec.shape[1:] for name, spec in self._file.outputs.items()}
            if any(None in each for each in sizes.values()):
                binding = self._bind(images[:1])
                for own_name in self._file.output_names.values():
                    binding.bind_output(own_name)  # in the runtime's own CPU memory
                with self._ordered(images):
                    self._session.run_with_iobinding(binding)
                values = binding.get_outputs()
                sizes = {
                    name: tuple(value.shape())[1:] for name, value in zip(self._file.output_names, values, strict=True)
                }
            self._output_sizes[size] = sizes
        return self._output_sizes[size]

    def _bind(self, images: Tensor) -> Any:
        binding = self._session.io_binding()
        binding.bind_input(self._file.input_name, *self._place(images))
        return binding

    def _place(self, tensor: Tensor) -> tuple[str, int, type, tuple[int, ...], int]:
        """A tensor as the runtime's bindings take it."""
        dtype = _NUMPY_DTYPES[tensor.dtype]
        return self.device.type, self.device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr()

    def _ordered(self, images: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else self._stream.ordered(images)


def _check_int8(types: Sequence[str], path: Path) -> None:
    """Raise a TeacherError unless most layers run in int8."""
    num_int8, num_float = (sum(name in names for name in types) for names in (_INT8_LAYERS, _FLOAT_LAYERS))
    if num_int8 <= num_float:
        raise TeacherError(
            f"ONNX Runtime runs {num_int8} of {num_int8 + num_float} layers of {path} in int8; set the teacher's "
            "precision to fp32"
        )


class _CudaStream:
    """The stream that the runtime works on, which it takes only when a session is made, synchronized with torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        options = {
            "device_id": str(device.index),
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",  # float32 is what the file says
            "cudnn_conv_algo_search": "HEURISTIC",  # the default benchmarks, and waits, at every new batch size
        }
        self.provider = (_CUDA, options)
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @contextmanager
    def ordered(self, images: Tensor) -> Iterator[None]:
        """Order what the runtime queues inside after the caller's earlier work and before its later work.

        So the caller's stream owns images and outputs as if it had done the work itself. Memory that torch did not
        allocate is reused as soon as nobody holds it, so the images are held until they have been read.
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

    def synchronize(self) -> None:
        """Let the host wait for all queued work."""
        self._stream.synchronize()
        self._held.clear()


def why_no_cuda() -> str | None:
    """Why the installed ONNX Runtime cannot use an NVIDIA GPU, and the command that fixes it; None if it can."""
    try:
        onnxruntime = require("onnxruntime", extra="cpu")
    except MissingPackageError:
        return f"ONNX Runtime is not installed: {_install_line()}"
    if _CUDA in onnxruntime.get_available_providers():
        return None
    return f"the installed onnxruntime is for CPUs: pip uninstall -y onnxruntime, then {_install_line()}"


def _install_line() -> str:
    """Depends on torch's CUDA version, as ONNX Runtime uses torch's libraries."""
    version = f"<{_CUDA_13_SINCE}" if (torch.version.cuda or "").startswith("12.") else f">={_CUDA_13_SINCE}"
    return f"pip install 'onnxruntime-gpu{version}'"
