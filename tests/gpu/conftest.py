"""Teachers on a GPU. Without one all tests here are skipped; without a usable TensorRT, those of TensorRT."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from kd_pipeline.bench.measure import traced
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher, why_no_cuda
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.manifest import Profile
from kd_pipeline.teachers.tensorrt.package import why_unusable
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, random_images

MAX_BATCH = 16
FEW = {"num_threads": 2}
"""For the loaders of tests: a decoder takes seconds to open for all cores, and tests run side by side."""
LONG = 2_000_000_000
"""Clock cycles, about a second."""
SMALL = 4096
"""Bytes; shapes and parameters of kernels are smaller, images are larger."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`exported(seed)` is the ONNX file of `ConvNet(seed)`; do not change it."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def export(seed: int) -> Path:
        return export_onnx(ConvNet(seed), folder / f"{seed}.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES)

    return export


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, exported: Callable[[int], Path]) -> Callable[..., Path]:
    """`engine(precision)` is an engine of `ConvNet(seed)` for 1 to 16 images, tuned for 8."""
    if reason := why_unusable(torch.cuda.get_device_capability()):
        pytest.skip(reason)
    from kd_pipeline.teachers.tensorrt.build import BuildSettings, build_engine

    folder = tmp_path_factory.mktemp("engines")

    @cache
    def build(precision: str = "fp32", seed: int = 0) -> Path:
        settings = BuildSettings(
            onnx=exported(seed),
            precision=precision,
            profiles=(Profile(min=1, opt=8, max=MAX_BATCH),),
            runtime="auto",
        )
        return build_engine(settings, save_engine=folder / f"{precision}-{seed}.engine")

    return build


@pytest.fixture
def open_engine(engine: Callable[..., Path], device: torch.device) -> Iterator[Callable[..., Teacher]]:
    """Open engines, and close them after the test."""
    opened: list[Teacher] = []

    def make(precision: str = "fp32", seed: int = 0, **settings: Any) -> Teacher:
        settings = TeacherSettings(backend="tensorrt", engine=engine(precision, seed), **settings)
        opened.append(open_teacher(settings, image_shape=IMAGE_SHAPE, device=device))
        return opened[-1]

    yield make
    for teacher in opened:
        teacher.close()


@pytest.fixture(params=["pytorch", "pytorch graph", "onnxruntime", "tensorrt"])
def teacher(request: pytest.FixtureRequest, device: torch.device, exported: Callable[[int], Path]) -> Iterator[Teacher]:
    """`ConvNet(0)` on the GPU, on each available runtime."""
    opened: Teacher
    match request.param:
        case "tensorrt":
            opened = request.getfixturevalue("open_engine")()
        case "onnxruntime":
            if reason := why_no_cuda():
                pytest.skip(reason)
            opened = OnnxRuntimeTeacher(exported(0), device=device)
        case _:
            graph = {"cuda_graph": True, "batch_size": 8} if request.param == "pytorch graph" else {}
            opened = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE, device=device, **graph)
    yield opened
    opened.close()


def assert_ordered_on_changing_streams(teacher: Teacher) -> None:
    """A teacher whose calls come from different streams, one of them late, returns what it does on a single one."""
    device = teacher.device
    batches = [random_images(8, seed=seed).to(device) for seed in range(30)]
    wanted = [teacher(images)["logits"].clone() for images in batches]
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device), torch.cuda.default_stream(device), torch.cuda.Stream(device)]
    found = []
    for number, images in enumerate(batches):
        with torch.cuda.stream(streams[number % 3]):
            torch.cuda._sleep(LONG // 1000 * (number % 3))
            found.append(teacher(images)["logits"])
    torch.cuda.synchronize(device)
    assert all(map(torch.equal, found, wanted))


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Make torch operations that wait for the GPU an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def copies_in(work: Callable[[], object]) -> list[tuple[str, int]]:
    """What the driver copied during `work`: the name, with a direction such as "HtoD", and the bytes."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize(device)
    with traced(device) as events:
        work()
    assert any(event.get("cat") == "kernel" for event in events), "the profiler saw nothing of the GPU"
    return [(event["name"], event["args"]["bytes"]) for event in events if event.get("cat") == "gpu_memcpy"]


class Recycled:
    """Device memory that is filled with NaN, or -1, on a different stream, once nothing refers to it."""

    kept: ClassVar[list[torch.Tensor]] = []
    """All such memory, so torch does not reuse it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._memory = values.clone()
        self.kept.append(self._memory)
        self._others = torch.cuda.Stream(values.device)
        self.__cuda_array_interface__ = self._memory.__cuda_array_interface__
        torch.cuda.synchronize(values.device)

    def __del__(self) -> None:
        with torch.cuda.stream(self._others):
            self._memory.fill_(float("nan") if self._memory.is_floating_point() else -1)


def recycled(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` on the GPU that is lost once nothing refers to it, as a buffer of DALI may be."""
    return torch.as_tensor(Recycled(values), device=values.device)
