"""The PyTorch teacher on a GPU: its precisions, its CUDA graph, `torch.compile`, and that nothing synchronizes."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.outputs_check import check_outputs
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.gpu.conftest import LONG, MAX_BATCH, SMALL, assert_ordered_on_changing_streams, copies_in, no_synchronization
from tests.networks import IMAGE_SHAPE, ConvNet, LogitsOnly, random_images

Open = Callable[..., PyTorchTeacher]

TOLERANCES = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest error of an output, relative to its largest value; convolutions in fp32 are in TF32."""
MODES = [
    pytest.param({"compile": compile, "cuda_graph": graph}, marks=[pytest.mark.slow] if compile else [], id=name)
    for (compile, graph), name in zip(
        product([False, True], repeat=2), ["eager", "graph", "compiled", "compiled graph"], strict=True
    )
]


@pytest.fixture
def open_on_gpu(device: torch.device) -> Iterator[Open]:
    """Open teachers for 8 images at a time, and close them after the test."""
    opened: list[PyTorchTeacher] = []

    def make(**options: Any) -> PyTorchTeacher:
        options = {"batch_size": 8, "max_batch": MAX_BATCH, **options}
        opened.append(PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE, device=device, **options))
        return opened[-1]

    yield make
    for teacher in opened:
        teacher.close()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == torch.float32
    return ((found.cpu() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_match_the_cpu(open_on_gpu: Open, mode: dict[str, bool], precision: str, dtype: torch.dtype) -> None:
    teacher = open_on_gpu(precision=precision, dtype=dtype, **mode)
    assert (teacher._cuda_graph is not None) == mode["cuda_graph"]
    reference = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE)
    for num_images in (8, 3, 8) if mode["compile"] else (8, 3, 8, MAX_BATCH, 1):
        images = random_images(num_images, seed=num_images).to(dtype)
        outputs, wanted = teacher(images.to(teacher.device)), reference(images.float())
        assert outputs.keys() == wanted.keys()
        for name in wanted:
            assert relative_error(outputs[name], wanted[name]) < TOLERANCES[precision]


@pytest.mark.parametrize("mode", MODES)
def test_outputs_do_not_depend_on_earlier_calls(open_on_gpu: Open, mode: dict[str, bool], device: torch.device) -> None:
    teacher = open_on_gpu(**mode)
    images = {num_images: random_images(num_images).to(device) for num_images in (8, 5, 1)}
    first = {num_images: teacher(batch) for num_images, batch in images.items()}
    for num_images in (8, 5, 1, 5, 8):
        for name, output in teacher(images[num_images]).items():
            assert torch.equal(output, first[num_images][name])


def test_graph_gives_the_outputs_of_eager_mode(open_on_gpu: Open, device: torch.device) -> None:
    plain, graphed = open_on_gpu(), open_on_gpu(cuda_graph=True)
    for num_images in (8, 8, 3, MAX_BATCH, 3, 8, 1):
        images = random_images(num_images, seed=num_images).to(device)
        found, wanted = graphed(images), plain(images)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_failed_capture_leaves_torch_as_it_was(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """On its stream, and with an allocator that frees what several streams have used."""

    class Reads(LogitsOnly):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits * logits.sum().item() if torch.cuda.is_current_stream_capturing() else logits

    current, other = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    options = {"batch_size": 8, "cuda_graph": True}
    teacher = PyTorchTeacher(Reads(), image_shape=IMAGE_SHAPE, device=device, **options)
    assert "no CUDA graph for the teacher" in caplog.text and not teacher.has_cuda_graph
    assert torch.cuda.current_stream(device) == current
    assert teacher(random_images(8).to(device))["logits"].isfinite().all()
    num_bytes = 1 << 22
    before = torch.cuda.memory_stats(device)["active_bytes.all.current"]
    for _ in range(5):
        torch.empty(num_bytes, dtype=torch.uint8, device=device).record_stream(other)
    torch.cuda.synchronize(device)
    torch.empty(num_bytes, dtype=torch.uint8, device=device)  # torch looks for what is done when it allocates
    assert torch.cuda.memory_stats(device)["active_bytes.all.current"] - before < 2 * num_bytes
    teacher.close()


@pytest.mark.parametrize("mode", MODES)
def test_autocast_of_the_caller_changes_nothing(open_on_gpu: Open, mode: dict[str, bool], device: torch.device) -> None:
    teacher, images = open_on_gpu(**mode), random_images(8).to(device)
    wanted = teacher(images)
    with torch.autocast("cuda", torch.bfloat16):
        found = teacher(images)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("mode", MODES)
def test_call_does_not_wait_for_earlier_work(open_on_gpu: Open, mode: dict[str, bool], device: torch.device) -> None:
    teacher, images = open_on_gpu(**mode), random_images(8).to(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for num_images in (8, 7):
            teacher(images[:num_images])  # compiles, and allocates
        torch.cuda.synchronize(device)
        with no_synchronization():
            torch.cuda._sleep(LONG)
            earlier = stream.record_event()
            for num_images in (8, 7):
                teacher(images[:num_images])
            assert not earlier.query()


@pytest.mark.filterwarnings("ignore")  # of the profiler's
@pytest.mark.parametrize("mode", MODES)
def test_nothing_crosses_the_bus(open_on_gpu: Open, mode: dict[str, bool], device: torch.device) -> None:
    teacher, images = open_on_gpu(**mode), random_images(8).to(device)
    teacher(images)
    copies = copies_in(lambda: [teacher(images) for _ in range(3)])
    assert not [copy for copy in copies if copy[1] > SMALL and ("HtoD" in copy[0] or "DtoH" in copy[0])]


@pytest.mark.parametrize("mode", MODES)
def test_changing_streams_are_ordered(open_on_gpu: Open, mode: dict[str, bool]) -> None:
    assert_ordered_on_changing_streams(open_on_gpu(**mode))


def test_auto_is_half_precision_without_problems(device: torch.device) -> None:
    settings = TeacherSettings(compile=False)
    teacher = open_teacher(settings, module=ConvNet(), image_shape=IMAGE_SHAPE, device=device, batch_size=8)
    assert teacher.precision == ("bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16")
    assert teacher.problems == ()
    teacher.close()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_repeated_outputs_are_no_problem(device: torch.device, precision: str) -> None:
    settings = TeacherSettings(compile=False, cuda_graph=True, precision=precision)
    teacher = open_teacher(settings, module=ConvNet(), image_shape=IMAGE_SHAPE, device=device, batch_size=8)
    assert teacher.problems == ()
    teacher.close()


def test_check_leaves_the_random_numbers_of_the_run(device: torch.device) -> None:
    class Noisy(LogitsOnly):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + torch.rand(1, device=images.device)

    teacher = PyTorchTeacher(Noisy(), image_shape=IMAGE_SHAPE, device=device)
    state = torch.cuda.get_rng_state(device)
    assert check_outputs(teacher, image_shape=IMAGE_SHAPE, normalization=Normalization())
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    teacher.close()


@pytest.mark.slow
def test_compiled_by_default(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    teacher = open_teacher(
        TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE, device=device, batch_size=8, strict=True
    )
    assert "torch.compile fails" not in caplog.text
    wanted = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE)(random_images(8))
    found = teacher(random_images(8).to(device))
    assert relative_error(found["logits"], wanted["logits"]) < TOLERANCES["bf16"]
    teacher.close()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_float16_images_reach_the_teacher(photo_folder: Any, device: torch.device, precision: str) -> None:
    transform = EvalTransform(size=IMAGE_SHAPE[1], dtype="float16")
    teacher = PyTorchTeacher(
        ConvNet(), image_shape=IMAGE_SHAPE, device=device, dtype=torch.float16, precision=precision, batch_size=8
    )
    reference = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE)
    with KDDataLoader(ImageFolder(photo_folder), transform, teacher, device=device, batch_size=8) as loader:
        for batch in loader:
            assert batch.images.dtype == torch.float16
            wanted = reference(batch.images.float().cpu())["logits"]
            assert relative_error(batch.teacher["logits"], wanted) < TOLERANCES[precision]
    teacher.close()
