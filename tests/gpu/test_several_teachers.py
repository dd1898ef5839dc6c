"""Teachers around others, and recorded outputs, on a GPU: the same numbers as alone, and no synchronization."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import PermutedTeacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.once_per_batch import OncePerBatch
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.sized import SizedTeacher
from tests.gpu.conftest import LONG, assert_ordered_on_changing_streams, no_synchronization
from tests.networks import CLASSES, IMAGE_SHAPE, NUM_CLASSES, ConvNet, random_images
from tests.recordings import INT8, TOP_2, small_recording

ROWS, SMALL_SHAPE = 8, (3, 24, 24)
Open = Callable[..., Teacher]


@pytest.fixture
def open_net(device: torch.device) -> Iterator[Open]:
    """`open_net(seed)` is `ConvNet(seed)` with class names; it is closed after the test."""
    opened: list[Teacher] = []

    def make(seed: int, shape: tuple[int, ...] = IMAGE_SHAPE, view: str = "images") -> Teacher:
        teacher = PyTorchTeacher(ConvNet(seed), image_shape=shape, device=device)
        teacher.classes, teacher.view = CLASSES, view
        opened.append(teacher)
        return teacher

    yield make
    for teacher in opened:
        teacher.close()


def ensemble(open_net: Open) -> tuple[Teacher, Callable[[Tensor], Tensor]]:
    members = [open_net(seed) for seed in range(3)]

    def wanted(images: Tensor) -> Tensor:
        return torch.stack([member(images)["logits"].softmax(1) for member in members]).mean(0).log()

    return EnsembleTeacher(members), wanted


def averaged(open_net: Open) -> tuple[Teacher, Callable[[Tensor], Tensor]]:
    members = [open_net(seed) for seed in range(2)]

    def wanted(images: Tensor) -> Tensor:
        return 0.25 * members[0](images)["logits"] + 0.75 * members[1](images)["logits"]

    return EnsembleTeacher(members, weights=[1, 3], average="logits"), wanted


def permuted(open_net: Open) -> tuple[Teacher, Callable[[Tensor], Tensor]]:
    net = open_net(0)
    return PermutedTeacher(net, CLASSES[::-1]), lambda images: net(images)["logits"].flip(1)


def sized(open_net: Open) -> tuple[Teacher, Callable[[Tensor], Tensor]]:
    net = open_net(0)
    return SizedTeacher({SMALL_SHAPE[1:]: open_net(1, SMALL_SHAPE), IMAGE_SHAPE[1:]: net}), lambda images: net(images)[
        "logits"
    ]


TEACHERS = {"ensemble": ensemble, "averaged": averaged, "permuted": permuted, "sized": sized}


@pytest.mark.parametrize("name", TEACHERS)
def test_outputs_are_made_of_the_members(open_net: Open, device: torch.device, name: str) -> None:
    teacher, wanted = TEACHERS[name](open_net)
    for num_rows in (ROWS, 3, 1):
        images = random_images(num_rows, seed=num_rows).to(device)
        found = teacher(images)["logits"]
        assert found.device == device and found.shape == (num_rows, NUM_CLASSES)
        torch.testing.assert_close(found, wanted(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_call_does_not_wait(open_net: Open, device: torch.device, name: str) -> None:
    (teacher, _), images = TEACHERS[name](open_net), random_images(ROWS).to(device)
    teacher(images)
    torch.cuda.synchronize(device)
    with no_synchronization():
        torch.cuda._sleep(LONG)
        earlier = torch.cuda.current_stream(device).record_event()
        teacher(images)
        assert not earlier.query()


@pytest.mark.parametrize("name", TEACHERS)
def test_changing_streams_are_ordered(open_net: Open, name: str) -> None:
    assert_ordered_on_changing_streams(TEACHERS[name](open_net)[0])


def test_members_of_a_group_see_their_views(open_net: Open, device: torch.device) -> None:
    members = {
        "whole": EnsembleTeacher([open_net(0), open_net(1)]),
        "local": PermutedTeacher(open_net(2, SMALL_SHAPE, view="local"), CLASSES[::-1]),
    }
    group = TeacherGroup(members)
    batch = KDBatch(
        images=random_images(ROWS).to(device),
        index=torch.arange(ROWS, device=device),
        valid=torch.ones(ROWS, dtype=torch.bool, device=device),
        views={"local": torch.rand(ROWS, 2, *SMALL_SHAPE, device=device)},
    )
    group.with_outputs(batch)
    with no_synchronization():
        found = group.with_outputs(batch)
        rows = found.of_view("local")
    wanted = members["local"](batch.views["local"].flatten(0, 1))
    assert found.teacher_views == {name: "local" for name in found.teacher if name.startswith("local.")}
    torch.testing.assert_close(found.teacher["local.logits"].flatten(0, 1), wanted["logits"])
    torch.testing.assert_close(found.teacher["whole.logits"], members["whole"](batch.images)["logits"])
    assert len(rows) == 2 * ROWS and all(each.device == device for each in rows.tensors())


def test_once_per_batch_runs_once(open_net: Open, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    net, num_calls = open_net(0), 0
    infer = net._infer

    def counted(images: Tensor) -> dict[str, Tensor]:
        nonlocal num_calls
        num_calls += 1
        return infer(images)

    monkeypatch.setattr(net, "_infer", counted)
    once, images = OncePerBatch(net), random_images(ROWS).to(device)
    first, again = once(images), once(images)
    assert num_calls == 1 and all(torch.equal(first[name], again[name]) for name in first)
    once(images.clone())
    assert num_calls == 2


@pytest.mark.parametrize("outputs", [{"logits": {"shape": [3]}}, TOP_2, INT8], ids=["float32", "top_k", "int8"])
def test_recorded_outputs_are_those_of_the_cpu(tmp_path: Path, device: torch.device, outputs: dict) -> None:
    """They are copied late, from memory that the host fills again at once, and the host does not wait."""
    recording = Recording(small_recording(tmp_path / "recording", outputs=outputs))
    batches = [np.arange(start, start + 10) for start in range(0, 40, 10)] * 5
    wanted = [recording.replay(0, rows, rows) for rows in batches]
    stream = torch.cuda.Stream(device)
    for _ in range(2):  # at first pinned memory is allocated, which may wait
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream), no_synchronization():
            torch.cuda._sleep(LONG // 4)
            earlier = stream.record_event()
            found = [recording.replay(0, rows, rows, device=device) for rows in batches]
            is_late = not earlier.query()
    assert is_late
    torch.cuda.synchronize(device)
    for ours, theirs in zip(found, wanted, strict=True):
        for name, output in theirs.items():
            assert ours[name].device == device
            torch.testing.assert_close(ours[name].cpu(), output)
    recording.close()
