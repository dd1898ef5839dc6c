"""A module as a CUDA graph on a fake GPU that runs late: correct outputs, and the fallback without a graph."""

import logging

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.teachers import pytorch
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.teachers.fake_gpu import Gpu

SHAPE = (3, 5, 5)
BATCH_SIZE = 4


class Means(nn.Module):
    """Counts how often Python runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.num_calls = 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        Means.num_calls += 1
        return {"logits": images.mean((2, 3)) * self.scale, "images": images}


def wanted(images: Tensor) -> dict[str, Tensor]:
    return {"logits": images.mean((2, 3)) * 2, "images": images}


def noise(num_images: int, seed: int = 0) -> Tensor:
    return torch.randn(num_images, *SHAPE, generator=torch.Generator().manual_seed(seed))


def open_graphed(gpu: Gpu, **options: object) -> PyTorchTeacher:
    Means.num_calls = 0
    teacher = PyTorchTeacher(Means(), image_shape=SHAPE, batch_size=BATCH_SIZE, cuda_graph=True, **options)
    gpu.run()
    return teacher


def infer(gpu: Gpu, teacher: PyTorchTeacher, values: Tensor) -> dict[str, Tensor]:
    with gpu.device(torch.device("cpu")):
        return teacher(gpu.images(values))


@pytest.mark.parametrize("latest_first", [False, True])
def test_outputs_belong_to_their_call(gpu: Gpu, latest_first: bool) -> None:
    teacher = open_graphed(gpu)
    num_calls = Means.num_calls
    held = [gpu.images(noise(BATCH_SIZE, seed)) for seed in range(5)]
    with gpu.device(torch.device("cpu")):
        found = [teacher(images) for images in held]
    gpu.run(latest_first=latest_first)
    assert Means.num_calls == num_calls  # replayed, not run
    for seed, outputs in enumerate(found):
        torch.testing.assert_close(outputs, wanted(noise(BATCH_SIZE, seed)))


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("latest_first", [False, True])
def test_calls_on_different_streams_are_ordered(gpu: Gpu, latest_first: bool, most: int) -> None:
    teacher, found = open_graphed(gpu), []
    streams = [gpu.stream(torch.device("cpu")), gpu.other, gpu.default]
    held = [gpu.images(noise(BATCH_SIZE, seed)) for seed in range(6)]
    gpu.run()
    for seed, images in enumerate(held):
        with gpu.on(streams[seed % 3]), gpu.device(torch.device("cpu")):
            found.append(teacher(images))
    gpu.run(latest_first=latest_first, most=most)
    for seed, outputs in enumerate(found):
        torch.testing.assert_close(outputs, wanted(noise(BATCH_SIZE, seed)))


def test_other_batch_sizes_run_without_graph(gpu: Gpu) -> None:
    teacher = open_graphed(gpu)
    for num_images in (1, BATCH_SIZE - 1, BATCH_SIZE + 1):
        num_calls, outputs = Means.num_calls, infer(gpu, teacher, noise(num_images))
        gpu.run()
        assert Means.num_calls == num_calls + 1
        torch.testing.assert_close(outputs, wanted(noise(num_images)))


def test_half_precision_is_cast_into_graph(gpu: Gpu) -> None:
    teacher = open_graphed(gpu, precision="bf16")
    outputs = infer(gpu, teacher, noise(BATCH_SIZE))
    gpu.run()
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    torch.testing.assert_close(outputs, wanted(noise(BATCH_SIZE)), rtol=0.02, atol=0.02)
    assert not torch.equal(outputs["images"], noise(BATCH_SIZE))


def test_failed_capture_runs_without_graph(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.captures_to_break, current = 1, gpu.current_stream(torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        teacher = open_graphed(gpu)
    assert not teacher.has_cuda_graph
    assert gpu.current_stream(torch.device("cpu")) is current and not gpu.pools
    assert "no CUDA graph for the teacher, which runs without one: CUDA error" in caplog.text
    outputs = infer(gpu, teacher, noise(BATCH_SIZE))
    gpu.run()
    torch.testing.assert_close(outputs, wanted(noise(BATCH_SIZE)))


def test_num_warm_up_passes(gpu: Gpu) -> None:
    open_graphed(gpu)
    # To learn the outputs, with the usual batch, to warm up, and in the capture.
    assert Means.num_calls == 1 + 1 + pytorch._NUM_WARM_UP + 1


def test_usual_batch_is_run_on_open(gpu: Gpu) -> None:
    Means.num_calls = 0
    PyTorchTeacher(Means(), image_shape=SHAPE, batch_size=BATCH_SIZE)
    assert Means.num_calls == 2
