"""Batches of a user's own loader on a fake GPU that runs late: order, memory, and what is left of a loop that ends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline import BatchLoader, KDBatch
from kd_pipeline.errors import TeacherError
from kd_pipeline.loader import batch_loader
from kd_pipeline.loader.streams import _CudaSync
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.teachers.fake_gpu import Gpu, install, install_tensors

SHAPE, ROWS, BATCHES = (3, 4, 5), 3, 6
CPU = torch.device("cpu")
Make = Callable[[Gpu, Tensor], Tensor]

PLACES: dict[str, Make] = {
    "pageable": lambda gpu, values: values.clone(),
    "pinned": lambda gpu, values: gpu.images(values, is_host=True),
    "GPU": lambda gpu, values: gpu.images(values),
}
"""Where the user's loader has its tensors; all but the pageable ones are lost once nobody holds them."""


class Means(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.factor


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    install(gpu, monkeypatch)
    install_tensors(gpu, monkeypatch)
    monkeypatch.setattr(batch_loader, "open_stream_sync", lambda device, ahead: _CudaSync(device, max_kept=99))
    return gpu


def values(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(ROWS, *SHAPE, generator=generator)
    return images, torch.randint(0, 3, (ROWS,), generator=generator)


class OneByOne:
    """A loader of dicts, each of which it forgets once it gave it away."""

    def __init__(self, gpu: Gpu, make: Make) -> None:
        self._left = [
            {"images": make(gpu, images), "labels": make(gpu, labels), "boxes": [make(gpu, labels.float())]}
            for images, labels in map(values, range(BATCHES))
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._left:
            yield self._left.pop(0)


def open_loader(gpu: Gpu, raw: Any, teacher: Teacher | None = None, **options: Any) -> BatchLoader:
    teacher = teacher or PyTorchTeacher(Means(), image_shape=SHAPE)
    loader = BatchLoader(raw, teacher, device="cpu", batch_size=ROWS, **options)
    gpu.run()
    return loader


def student(batch: KDBatch) -> tuple[Tensor, ...]:
    """New tensors, of work that is queued."""
    assert batch.labels is not None
    return batch.images * 1.0, batch.labels * 1, batch.index * 1, *(each * 1.0 for each in batch.teacher.values())


def check(found: list[tuple[Tensor, ...]], factors: tuple[float, ...] = (2.0,)) -> None:
    for number, (images, labels, index, *outputs) in enumerate(found):
        wanted, wanted_labels = values(number)
        assert torch.equal(images, wanted) and torch.equal(labels, wanted_labels)
        assert index.tolist() == [*range(number * ROWS, (number + 1) * ROWS)]
        for output, factor in zip(outputs, factors, strict=True):
            torch.testing.assert_close(output, wanted.mean((2, 3)) * factor)


@pytest.mark.parametrize("latest_first", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_late_student_reads_its_own_batch(gpu: Gpu, place: str, ahead: int, latest_first: bool) -> None:
    loader = open_loader(gpu, OneByOne(gpu, PLACES[place]), ahead=ahead)
    with gpu:
        found = [student(batch) for batch in loader]
        gpu.host_waits = 0
    gpu.run(latest_first=latest_first)
    assert len(found) == BATCHES
    check(found)


@pytest.mark.parametrize("place", PLACES)
def test_the_host_does_not_wait(gpu: Gpu, place: str) -> None:
    loader = open_loader(gpu, OneByOne(gpu, PLACES[place]), ahead=1)
    with gpu:
        found = [student(batch) for batch in loader]
        assert gpu.host_waits == 0 and any(map(len, gpu.queues.values()))
    gpu.run()
    check(found)


@pytest.mark.parametrize("latest_first", [False, True])
@pytest.mark.parametrize("most", [1, 100])
def test_tensors_that_the_loader_makes_on_the_gpu(gpu: Gpu, most: int, latest_first: bool) -> None:
    """They are made late, on the stream that is current in the loop, and the loader uses its dict again."""

    class Made:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            batch: dict[str, Tensor] = {}
            for images, labels in held:
                batch |= {"images": images * 1.0, "labels": labels.int() * 1}  # of which the batch has a copy
                yield batch

    held = [values(number) for number in range(BATCHES)]
    loader = open_loader(gpu, Made(), ahead=1)
    with gpu:
        found = [student(batch) for batch in loader]
    gpu.run(latest_first=latest_first, most=most)
    check(found)


@pytest.mark.parametrize("place", ["pinned", "GPU"])
@pytest.mark.parametrize("end", ["break", "error", "close"])
def test_a_loop_that_ends_early_leaves_nothing_behind(gpu: Gpu, end: str, place: str) -> None:
    """What was read ahead is kept until the teacher is done with it, and no longer."""
    loader, found = open_loader(gpu, OneByOne(gpu, PLACES[place]), ahead=2), []
    with gpu:
        try:
            for batch in loader:
                found.append(student(batch))
                if len(found) == 2:
                    if end == "break":
                        break
                    if end == "error":
                        raise KeyError("student")
                    loader.close()
                    break
        except KeyError:
            pass
        del batch
        gpu.run(latest_first=True)
        loader.close()
        assert not any(map(len, gpu.queues.values())) and not loader._sync._kept
    check(found)


def test_an_error_of_the_teacher_comes_after_its_good_batches(gpu: Gpu) -> None:
    batches = [values(0), values(1), (torch.zeros(ROWS, 1, 1), torch.zeros(ROWS, dtype=torch.long))]
    loader, found = open_loader(gpu, batches, ahead=1), []
    with gpu, pytest.raises(TeacherError):
        for batch in loader:
            found.append(student(batch))
    gpu.run(latest_first=True)
    assert len(found) == 2
    check(found)


def test_a_look_is_the_first_batch_of_the_loop(gpu: Gpu) -> None:
    loader = open_loader(gpu, OneByOne(gpu, PLACES["pinned"]), ahead=1)
    with gpu:
        looked = student(loader.peek())
        found = [student(batch) for batch in loader]
    gpu.run(latest_first=True)
    check([looked])
    check(found)


def test_several_teachers(gpu: Gpu) -> None:
    first, second, third = (PyTorchTeacher(Means(factor), image_shape=SHAPE) for factor in (1.0, 3.0, 5.0))
    both = EnsembleTeacher([first, second], average="logits")
    loader = open_loader(gpu, OneByOne(gpu, PLACES["pinned"]), TeacherGroup({"a": both, "b": third}), ahead=1)
    with gpu:
        found = [student(batch) for batch in loader]
    gpu.run(latest_first=True)
    check(found, (2.0, 5.0))


def test_a_teacher_that_comes_later_completes_what_was_read(gpu: Gpu) -> None:
    loader = BatchLoader(OneByOne(gpu, PLACES["pinned"]), device="cpu", batch_size=ROWS, ahead=1)
    with gpu:
        loader.peek()
        loader.attach_teacher(PyTorchTeacher(Means(), image_shape=SHAPE))
        found = [student(batch) for batch in loader]
    gpu.run(latest_first=True)
    check(found)
