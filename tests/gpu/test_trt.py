"""The TensorRT teacher on a GPU: its numbers, its copies, and that nothing synchronizes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from tests.gpu.conftest import (
    LONG,
    MAX_BATCH,
    SMALL,
    assert_ordered_on_changing_streams,
    copies_in,
    no_synchronization,
    recycled,
)
from tests.networks import NUM_CLASSES, random_images

Open = Callable[..., Teacher]

TOLERANCES = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest error of an output, relative to its largest value."""


@pytest.fixture(scope="module")
def reference(exported: Callable[[int], Path]) -> Teacher:
    return OnnxRuntimeTeacher(exported(0))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.cpu() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("num_images", [1, 2, 7, 8, MAX_BATCH])
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_outputs_match_onnx_runtime(
    open_engine: Open, reference: Teacher, precision: str, cuda_graph: bool, num_images: int
) -> None:
    teacher = open_engine(precision, cuda_graph=cuda_graph)
    images = random_images(num_images, seed=num_images)
    outputs, wanted = teacher(images.to(teacher.device)), reference(images)
    assert outputs.keys() == wanted.keys() and teacher.precision == precision
    for name in wanted:
        assert relative_error(outputs[name], wanted[name]) < TOLERANCES[precision]


def test_engine_reads_images_in_place(open_engine: Open, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    addresses = []
    context = open_tensorrt().module.IExecutionContext
    set_address = context.set_tensor_address

    def spy(self: object, name: str, memory: int) -> bool:
        addresses.append(memory)
        return bool(set_address(self, name, memory))

    monkeypatch.setattr(context, "set_tensor_address", spy)
    teacher = open_engine()
    images = random_images(8).to(device)
    outputs = teacher(images)
    assert images.data_ptr() in addresses
    assert all(output.data_ptr() in addresses for output in outputs.values())


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("default_stream", [False, True])
def test_call_does_not_wait_for_earlier_work(
    open_engine: Open, device: torch.device, cuda_graph: bool, default_stream: bool
) -> None:
    teacher = open_engine(cuda_graph=cuda_graph)
    images = random_images(8).to(device)
    stream = torch.cuda.default_stream(device) if default_stream else torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for num_images in (8, 7):
            teacher(images[:num_images])  # creates the contexts
        torch.cuda.synchronize(device)
        with no_synchronization():
            torch.cuda._sleep(LONG)
            earlier = stream.record_event()
            for num_images in (8, 7):
                teacher(images[:num_images])
            assert not earlier.query()


@pytest.mark.filterwarnings("ignore")  # of the profiler's
def test_images_and_outputs_are_not_copied(open_engine: Open, device: torch.device) -> None:
    teacher = open_engine()
    images = random_images(8).to(device)
    teacher(images)
    copies = copies_in(lambda: [teacher(images) for _ in range(3)])
    assert not [copy for copy in copies if copy[1] > SMALL and ("HtoD" in copy[0] or "DtoH" in copy[0])]
    assert images.nbytes not in [num_bytes for _, num_bytes in copies]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_inputs_are_read_before_they_are_recycled(
    open_engine: Open, reference: Teacher, device: torch.device, cuda_graph: bool
) -> None:
    teacher = open_engine(cuda_graph=cuda_graph)
    results = []
    for seed in range(50):
        images = random_images(1 + seed % MAX_BATCH, seed=seed)
        buffer = recycled(images.to(device))
        torch.cuda._sleep(LONG // 500)  # the teacher reads it long after the host has dropped it
        results.append((images, teacher(buffer)))
        del buffer
    for images, outputs in results:
        assert relative_error(outputs["logits"], reference(images)["logits"]) < TOLERANCES["fp32"]


def test_recycling_overwrites_unheld_buffers(
    device: torch.device,
) -> None:
    buffer = recycled(torch.ones(1024, device=device))
    address, later = buffer.data_ptr(), torch.cuda.Stream(device)
    view = torch.as_tensor(_Raw(address, 1024), device=device)
    with torch.cuda.stream(later):
        torch.cuda._sleep(LONG // 10)
        seen = view.sum()
        del buffer
    torch.cuda.synchronize(device)
    assert seen.isnan()


class _Raw:
    """Memory at an address, without a reference to it."""

    def __init__(self, address: int, num_floats: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_floats,),
            "typestr": "<f4",
            "version": 3,
        }


def test_cuda_graphs_do_not_change_outputs(open_engine: Open, device: torch.device) -> None:
    plain, graphed = open_engine(), open_engine(cuda_graph=True)
    for num_images in (8, 8, 3, MAX_BATCH, 3, 8, 1):
        images = random_images(num_images, seed=num_images).to(device)
        found, wanted = graphed(images), plain(images)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_unaligned_slice_equals_its_copy(open_engine: Open, device: torch.device) -> None:
    teacher = open_engine()
    flat = torch.zeros(8 * 3 * 32 * 32 + 1, device=device)
    images = flat[1:].view(8, 3, 32, 32)
    images.copy_(random_images(8))
    assert images.data_ptr() % 256 != 0
    assert torch.equal(teacher(images)["logits"], teacher(images.clone())["logits"])


def test_teachers_on_two_streams_are_independent(open_engine: Open, device: torch.device) -> None:
    teachers = [open_engine(seed=0), open_engine(seed=1)]
    batches = [random_images(8, seed=seed).to(device) for seed in range(20)]
    wanted = [[teacher(images)["logits"].clone() for images in batches] for teacher in teachers]
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in teachers]
    found: list[list[Tensor]] = [[], []]
    for images in batches:
        for number, teacher in enumerate(teachers):
            with torch.cuda.stream(streams[number]):
                found[number].append(teacher(images)["logits"])
    torch.cuda.synchronize(device)
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_one_teacher_on_changing_streams_is_ordered(open_engine: Open, cuda_graph: bool) -> None:
    assert_ordered_on_changing_streams(open_engine(cuda_graph=cuda_graph))


def test_outputs_survive_closing_the_teacher(open_engine: Open, device: torch.device) -> None:
    teacher = open_engine()
    images = random_images(8).to(device)
    outputs = teacher(images)
    kept = {name: output.clone() for name, output in outputs.items()}
    teacher.close()
    open_engine(seed=1)(images)
    assert all(torch.equal(outputs[name], kept[name]) for name in kept)
    assert kept["logits"].shape == (8, NUM_CLASSES)
