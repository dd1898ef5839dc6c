"""ONNX Runtime's CUDA provider on a GPU that runs late: the order with the caller's stream, memory, and refusals."""

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
from kd_pipeline.teachers import onnxruntime as ort
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher, why_no_cuda
from tests.teachers.fake_tensorrt import Gpu
from tests.teachers.onnx_models import linear_model

onnxruntime = pytest.importorskip("onnxruntime")
DEVICE = torch.device("cuda", 0)
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
DTYPES = {np.float32: torch.float32, np.float16: torch.float16}


class Binding:
    """`onnxruntime.IOBinding` of memory on the fake GPU, or of the runtime's own where no address is given."""

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
    """`onnxruntime.InferenceSession`: queues reading and writing on the stream it was given; the CPU computes."""

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
        if run_options is None:  # with the host waiting at the end
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
    for module in (ort, session):
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


def teach(gpu: Gpu, teacher: OnnxRuntimeTeacher, values: Tensor) -> dict[str, Tensor]:
    """Have the teacher answer for a buffer that nobody holds afterward; past the check of the device, a CPU here."""
    images = gpu.images(values)
    with gpu.device(DEVICE):
        return teacher._infer(images)


def wanted(teacher: OnnxRuntimeTeacher, values: Tensor) -> list[Tensor]:
    real = onnxruntime.InferenceSession(teacher._file.path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value).float() for value in real.run(None, {"images": values.numpy()})]


@pytest.mark.parametrize("latest_first", [False, True])
@pytest.mark.parametrize(("io", "dtype"), [(FLOAT, torch.float32), (FLOAT16, torch.float16)], ids=["fp32", "fp16"])
def test_each_call_has_the_answers_to_its_own_images(
    gpu: Gpu, open_teacher: Callable[..., OnnxRuntimeTeacher], latest_first: bool, io: int, dtype: torch.dtype
) -> None:
    teacher = open_teacher(io)
    found = [teach(gpu, teacher, noise(1 + seed, seed, dtype)) for seed in range(4)]
    gpu.run(latest_first=latest_first)
    for seed, outputs in enumerate(found):
        assert list(outputs) == ["logits", "features"]
        assert {output.dtype for output in outputs.values()} == {torch.float32}
        torch.testing.assert_close(list(outputs.values()), wanted(teacher, noise(1 + seed, seed, dtype)))


def test_nothing_waits_and_the_images_are_read_at_their_own_address(
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
def test_work_of_the_callers_before_and_after_keeps_its_place(
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


def test_images_are_let_go_once_they_have_been_read(gpu: Gpu, open_teacher: Callable[..., OnnxRuntimeTeacher]) -> None:
    teacher = open_teacher()
    for seed in range(10):
        teach(gpu, teacher, noise(2, seed))
        gpu.run()
    assert len(teacher._order._held) <= 1
    teacher.close()
    assert not teacher._order._held and gpu.host_waits


def test_sizes_that_the_file_leaves_open_are_asked_for_once(
    gpu: Gpu, runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]
) -> None:
    teacher = open_teacher(sizes=("height", "width"))
    for _ in range(2):
        outputs = teach(gpu, teacher, noise(3))
        gpu.run()
        assert outputs["features"].shape == (3, 3, 8, 8)
        torch.testing.assert_close(outputs["features"], noise(3))
    assert len(runtime.sessions[0].bindings) == 3


def test_the_provider_gets_the_device_the_stream_and_full_float32(
    gpu: Gpu, runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]
) -> None:
    teacher = open_teacher()
    settings = runtime.sessions[0].settings
    assert settings["device_id"] == "0" and settings["use_tf32"] == "0"
    assert settings["user_compute_stream"] == str(teacher._order._stream.cuda_stream)
    assert (teacher.device, teacher.precision, teacher.backend) == (DEVICE, "fp32", "onnxruntime")


def test_a_provider_that_does_not_load_is_an_error(
    runtime: Runtime, open_teacher: Callable[..., OnnxRuntimeTeacher]
) -> None:
    runtime.has_cuda = False
    with pytest.raises(TeacherError, match="ONNX Runtime cannot use cuda:0: its CUDA provider does not load"):
        open_teacher()


@pytest.mark.parametrize(("cuda", "line"), [("13.0", "onnxruntime-gpu>=1.27"), ("12.8", "onnxruntime-gpu<1.27")])
def test_what_is_missing_is_said_with_the_package_for_torchs_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str, line: str
) -> None:
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


def test_the_fakes_have_the_parameters_of_the_real_ones() -> None:
    for fake, real in ((Binding, onnxruntime.IOBinding), (Session, onnxruntime.InferenceSession)):
        names = [name for name, value in vars(fake).items() if inspect.isfunction(value) and not name.startswith("_")]
        for name in names:
            ours, theirs = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (fake, real))
            assert theirs[: len(ours)] == ours
    assert ort._CUDA in onnxruntime.capi._pybind_state.get_all_providers()
