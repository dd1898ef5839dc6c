"""ONNX Runtime's CUDA provider on a fake GPU that runs late: stream order, memory, and errors."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx import session
from kd_pipeline.teachers import onnxruntime as backend
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher, why_no_cuda
from tests.teachers.fake_gpu import Gpu
from tests.teachers.onnx_models import linear_model

onnxruntime = pytest.importorskip("onnxruntime")
DEVICE = torch.device("cuda", 0)
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
DTYPES = {np.float32: torch.float32, np.float16: torch.float16}


class Binding:
    """`onnxruntime.IOBinding` to memory of the fake GPU, or to the runtime's own if no address is given."""

    def __init__(self, session: "Session") -> None:
        self._session, self.inputs, self.outputs = session, {}, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = (tuple(shape), DTYPES[element_type], buffer_ptr)

    def bind_output(self, name, device_type="cpu", device_id=0, element_type=None, shape=None, buffer_ptr=None) -> None:
        if buffer_ptr is None:
            self.outputs[name] = None
        else:
            assert (device_type, device_id) == ("cuda", 0)
            self.outputs[name] = (tuple(shape), DTYPES[element_type], buffer_ptr)

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(shape=lambda value=value: value.shape) for value in self._session.values]


class Session:
    """`onnxruntime.InferenceSession`: queues reads and writes on its stream, and computes on the CPU."""

    def __init__(self, gpu: Gpu, has_cuda: bool, path: Path, options: Any, providers: list[Any]) -> None:
        self._gpu, self._has_cuda = gpu, has_cuda
        (self.provider, self.settings), fallback = providers
        assert (self.provider, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        self._real = onnxruntime.InferenceSession(path, providers=[fallback])
        self.values: list[np.ndarray] = []
        self.bindings: list[Binding] = []

    def get_providers(self) -> list[str]:
        return [*([self.provider] if self._has_cuda else []), "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        self.bindings.append(Binding(self))
        return self.bindings[-1]

    def run_with_iobinding(self, iobinding: Binding, run_options: Any = None) -> None:
        queue = self._gpu.queues[int(self.settings["user_compute_stream"])]
        ((name, (shape, dtype, address)),) = iobinding.inputs.items()
        images = self._gpu.address(address, shape, dtype)
        queue.add(partial(self._read, name, images))
        if run_options is None:  # the host waits at the end
            self._gpu.run()
            return
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        places = [self._gpu.address(place[2], *place[:2]) for place in iobinding.outputs.values()]
        queue.add(partial(self._write, places))

    def _read(self, name: str, images: Any) -> bool:
        self.values = self._real.run(None, {name: images.tensor().numpy().copy()})
        return True

    def _write(self, places: list[Any]) -> bool:
        for place, value in zip(places, self.values, strict=True):
            place.tensor().copy_(torch.from_numpy(value))
        return True


class Runtime:
    """The package `onnxruntime` for the fake GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.has_cuda, self.sessions = True, []
        self.module = SimpleNamespace(
            SessionOptions=onnxruntime.SessionOptions,
            RunOptions=onnxruntime.RunOptions,
            GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
            InferenceSession=lambda *arguments, **options: self._open(gpu, *arguments, **options),
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        )

    def _open(self, gpu: Gpu, *arguments: Any, **options: Any) -> Session:
        self.sessions.append(Session(gpu, self.has_cuda, *arguments, **options))
        return self.sessions[-1]


@pytest.fixture
def runtime(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(gpu)
    for module in (backend, session):
        monkeypatch.setattr(module, "require", lambda name, extra: runtime.module)
    return runtime


@pytest.fixture
def open_teacher(runtime: Runtime, tmp_path: Path) -> Callable[..., OnnxRuntimeTeacher]:
    def make(io: int = FLOAT, sizes: Any = (8, 8)) -> OnnxRuntimeTeacher:
        path, shape = tmp_path / "teacher.onnx", ["N", 3, *sizes]
        outputs = [("logits", io, ["N", 5]), ("features", io, shape)]
        onnx.save(linear_model(inputs=[("images", io, shape)], outputs=outputs), path)
        return OnnxRuntimeTeacher(path, device=DEVICE)

    return make


def noise(num_images: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def infer(gpu: Gpu, teacher: OnnxRuntimeTeacher, values: Tensor) -> dict[str, Tensor]:
    """Run the teacher on a buffer that nobody holds afterward; skips its check of the device, here a CPU."""
    images = gpu.images(values)
    with gpu.device(DEVICE):
        return teacher._infer(images)


def wanted(teacher: OnnxRuntimeTeacher, values: Tensor) -> list[Tensor]:
    real = onnxruntime.InferenceSession(teacher._file.path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value).float() for value in real.run(None, {"images": values.numpy()})]


@pytest.mark.parametrize("latest_first", [False, True])
@pytest.mark.parametrize(("io", "dtype"), [(FLOAT, torch.float32), (FLOAT16, torch.float16)], ids=["fp32", "fp16"])
def test_outputs_belong_to_their_call(
    gpu: Gpu, open_teacher: Callable[..., OnnxRuntimeTeacher], latest_first: bool, io: int, dtype: torch.dtype
) -> None:
    teacher = open_teacher(io)
    found = [infer(gpu, teacher, noise(1 + seed, seed, dtype)) for seed in range(4)]
    gpu.run(latest_first=latest_first)
    for seed, outputs in enumerate(found):
        assert list(outputs) == ["logits", "features"]
        assert {output.dtype for output in outputs.values()} == {torch.float32}
        torch.testing.assert_close(list(outputs.values()), wanted(teacher, noise(1 + seed, seed, dtype)))


def test_no_sync_and_images_read_in_place(
    gpu: Gpu, runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]
) -> None:
    teacher = open_teacher()
    images = gpu.images(noise(4))
    gpu.run()
    waits = gpu.host_waits
    with gpu.device(DEVICE):
        outputs = teacher._infer(images)
    assert gpu.host_waits == waits and any(map(len, gpu.queues.values()))
    (binding,) = runtime.sessions[0].bindings
    assert binding.inputs["images"] == ((4, 3, 8, 8), torch.float32, images.data_ptr())
    assert [place[2] for place in binding.outputs.values()] == [output.data_ptr() for output in outputs.values()]


@pytest.mark.parametrize("latest_first", [False, True])
def test_callers_work_keeps_its_order(
    gpu: Gpu, open_teacher: Callable[..., OnnxRuntimeTeacher], latest_first: bool
) -> None:
    teacher, images, values = open_teacher(), gpu.images(noise(3)), noise(3, seed=1)
    for stream in (gpu.other, gpu.default):
        with gpu.on(stream), gpu.device(DEVICE):
            images.copy_(values)
            logits = teacher._infer(images)["logits"].clone()
            images.fill_(0)
        gpu.run(latest_first=latest_first)
        torch.testing.assert_close(logits, wanted(teacher, values)[0])


def test_images_are_released_after_read(gpu: Gpu, open_teacher: Callable[..., OnnxRuntimeTeacher]) -> None:
    teacher = open_teacher()
    for seed in range(10):
        infer(gpu, teacher, noise(2, seed))
        gpu.run()
    assert len(teacher._stream._held) <= 1
    teacher.close()
    assert not teacher._stream._held and gpu.host_waits


def test_open_sizes_are_learned_once(
    gpu: Gpu, runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]
) -> None:
    teacher = open_teacher(sizes=("height", "width"))
    for _ in range(2):
        outputs = infer(gpu, teacher, noise(3))
        gpu.run()
        assert outputs["features"].shape == (3, 3, 8, 8)
        torch.testing.assert_close(outputs["features"], noise(3))
    assert len(runtime.sessions[0].bindings) == 3


def test_provider_options(gpu: Gpu, runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]) -> None:
    teacher = open_teacher()
    settings = runtime.sessions[0].settings
    assert settings["device_id"] == "0" and settings["use_tf32"] == "0"
    assert settings["user_compute_stream"] == str(teacher._stream._stream.cuda_stream)
    assert (teacher.device, teacher.precision, teacher.backend) == (DEVICE, "fp32", "onnxruntime")


def test_failing_provider_is_error(runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]) -> None:
    runtime.has_cuda = False
    with pytest.raises(TeacherError, match="ONNX Runtime cannot use cuda:0: its CUDA provider does not load"):
        open_teacher()


@pytest.mark.parametrize(("cuda", "line"), [("13.0", "onnxruntime-gpu>=1.27"), ("12.8", "onnxruntime-gpu<1.27")])
def test_missing_package_matches_torch_cuda(monkeypatch: pytest.MonkeyPatch, cuda: str, line: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    package = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    assert why_no_cuda() == (
        f"the installed onnxruntime is for CPUs: pip uninstall -y onnxruntime, then pip install '{line}'"
    )
    package.get_available_providers = lambda: ["CUDAExecutionProvider"]
    assert why_no_cuda() is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert why_no_cuda() == f"ONNX Runtime is not installed: pip install '{line}'"


def test_fakes_have_real_signatures() -> None:
    for fake, real in ((Binding, onnxruntime.IOBinding), (Session, onnxruntime.InferenceSession)):
        names = [name for name, value in vars(fake).items() if inspect.isfunction(value) and not name.startswith("_")]
        for name in names:
            ours, theirs = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (fake, real))
            assert theirs[: len(ours)] == ours
    assert backend._CUDA in onnxruntime.capi._pybind_state.get_all_providers()
