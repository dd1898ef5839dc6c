"""A user's own loader through a teacher on a GPU: outputs, order between streams, memory, and no synchronization."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kd_pipeline import BatchLoader, KDBatch
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.gpu.conftest import LONG, no_synchronization, recycled
from tests.networks import IMAGE_SHAPE, ConvNet, random_images

SHORT = LONG // 20
ROWS, BATCHES = 8, 6
Places = Callable[[Tensor], Tensor]

PLACES: dict[str, Places] = {
    "pageable": lambda tensor: tensor.clone(),
    "pinned": lambda tensor: tensor.pin_memory(),
    "GPU": lambda tensor: tensor.to(torch.cuda.current_device()),
    "GPU, not torch's": lambda tensor: recycled(tensor.to(torch.cuda.current_device())),
}
"""Where the user's loader has its tensors."""


def values(number: int) -> tuple[Tensor, Tensor]:
    images = random_images(ROWS, seed=number)
    return images, torch.arange(ROWS, dtype=torch.int32) + number


def made(place: Places, number: int) -> dict[str, Any]:
    """A batch of the user's loader."""
    images, labels = values(number)
    return {"images": place(images), "labels": place(labels), "boxes": [labels], "names": ["a"]}


class Batches:
    """A loader that makes batches as they are asked for."""

    def __init__(self, place: Places, num_batches: int = BATCHES) -> None:
        self._place, self._num_batches = place, num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self._num_batches):
            yield made(self._place, number)


class Once:
    """A loader of one epoch whose batches are there, and which forgets each when it gives it away."""

    def __init__(self, place: Places) -> None:
        self._left = [made(place, number) for number in range(BATCHES)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._left:
            yield self._left.pop(0)


@pytest.fixture
def open_loader(device: torch.device) -> Iterator[Callable[..., BatchLoader]]:
    """Open loaders, and close them after the test."""
    opened: list[BatchLoader] = []

    def make(batches: Any, teacher: Any = None, **options: Any) -> BatchLoader:
        opened.append(BatchLoader(batches, teacher, device=device, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


@pytest.fixture
def net(device: torch.device) -> Iterator[Teacher]:
    """`ConvNet(0)` for 8 images at a time."""
    teacher = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE, device=device, batch_size=ROWS)
    yield teacher
    teacher.close()


def sums(batch: KDBatch) -> Tensor:
    """What a student reads of a batch, queued on the current stream."""
    assert batch.labels is not None
    logits = batch.teacher["logits"]
    return torch.stack([batch.images.double().sum(), batch.labels.double().sum(), logits.double().sum()])


def wanted_sums(teacher: Teacher, num_batches: int = BATCHES) -> Tensor:
    """The same of the teacher alone, `[BATCHES, 3]`."""
    found = []
    for images, labels in map(values, range(num_batches)):
        images = images.to(teacher.device)
        logits = teacher(images)["logits"]
        found.append([images.double().sum().item(), labels.double().sum().item(), logits.double().sum().item()])
    return torch.tensor(found, dtype=torch.float64)


def assert_sums(found: list[Tensor], wanted: Tensor) -> None:
    torch.testing.assert_close(torch.stack(found).cpu(), wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("pin_memory", [False, True], ids=["pageable", "pinned"])
def test_outputs_are_those_of_the_teacher(
    open_loader: Callable[..., BatchLoader], teacher: Teacher, device: torch.device, pin_memory: bool, ahead: int
) -> None:
    images = random_images(3 * ROWS + 5)
    dataset = TensorDataset(images, torch.arange(len(images)))
    own = DataLoader(dataset, batch_size=ROWS, pin_memory=pin_memory and device.type == "cuda")
    batches = [*open_loader(own, teacher, ahead=ahead)]
    assert [len(batch) for batch in batches] == [ROWS, ROWS, ROWS, 5]
    for number, batch in enumerate(batches):
        raw = images[number * ROWS : (number + 1) * ROWS]
        assert all(each.device == device for each in batch.tensors())
        assert torch.equal(batch.images.cpu(), raw) and batch.index.cpu().tolist() == batch.labels.cpu().tolist()
        wanted = teacher(batch.images)
        for name, output in batch.teacher.items():
            torch.testing.assert_close(output, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_slow_student_reads_its_own_batch(
    open_loader: Callable[..., BatchLoader], net: Teacher, device: torch.device, place: str, ahead: int
) -> None:
    """Each batch, and what the loader gave, is dropped before the student's stream reaches it."""
    wanted = wanted_sums(net)
    student, found = torch.cuda.Stream(device), []
    student.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(student):
        for batch in open_loader(Once(PLACES[place]), net, ahead=ahead):
            torch.cuda._sleep(SHORT)
            found.append(sums(batch))
            del batch
    assert_sums(found, wanted)


def test_what_is_no_tensor_of_the_batch_stays_where_it_is(
    open_loader: Callable[..., BatchLoader], net: Teacher
) -> None:
    for batch in open_loader(Batches(PLACES["pinned"]), net, ahead=1):
        assert batch.extra["names"] == ["a"] and batch.extra["boxes"][0].device.type == "cpu"


def test_tensors_made_on_another_stream(
    open_loader: Callable[..., BatchLoader], net: Teacher, device: torch.device
) -> None:
    """By a loader that prefetches: it lets the current stream wait for its own, late."""

    class Prefetches:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in held:
                with torch.cuda.stream(side):
                    torch.cuda._sleep(SHORT)
                    batch = images * 1.0, labels.int() * 1
                torch.cuda.current_stream(device).wait_stream(side)
                for each in batch:
                    each.record_stream(torch.cuda.current_stream(device))
                yield batch

    side, wanted = torch.cuda.Stream(device), wanted_sums(net)
    held = [tuple(each.to(device) for each in values(number)) for number in range(BATCHES)]
    side.wait_stream(torch.cuda.current_stream(device))
    assert_sums([sums(batch) for batch in open_loader(Prefetches(), net, ahead=1)], wanted)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("place", ["pageable", "pinned"])
def test_step_never_synchronizes(open_loader: Callable[..., BatchLoader], net: Teacher, place: str, ahead: int) -> None:
    loader, wanted = open_loader(Batches(PLACES[place]), net, ahead=ahead), wanted_sums(net)
    for _ in range(2):  # rows of the first batch are kept, and memory is allocated
        for _ in loader:
            pass
    with no_synchronization():
        found = [sums(batch) for batch in loader]
    assert_sums(found, wanted)


@pytest.mark.parametrize("place", ["pageable", "pinned"])
def test_copy_does_not_wait_for_the_teacher(open_loader: Callable[..., BatchLoader], net: Teacher, place: str) -> None:
    """A copy from pageable memory would wait for all earlier work of its stream, which is the teacher's."""
    loader = open_loader(Batches(PLACES[place]), net, ahead=1)
    for _ in range(2):
        for _ in loader:
            pass
    batches = iter(loader)
    next(batches)
    with torch.cuda.stream(loader._sync.stream):
        torch.cuda._sleep(LONG)
        earlier = loader._sync.stream.record_event()
    next(batches)
    assert not earlier.query()


def test_step_returns_while_the_student_runs(
    open_loader: Callable[..., BatchLoader], net: Teacher, device: torch.device
) -> None:
    loader = open_loader(Batches(PLACES["pinned"]), net, ahead=1)
    for _ in range(2):
        for _ in loader:
            pass
    batches = iter(loader)
    next(batches)
    torch.cuda._sleep(LONG)
    student = torch.cuda.current_stream(device).record_event()
    next(batches)
    assert not student.query()


@pytest.mark.parametrize("place", ["pageable", "pinned", "GPU"])
def test_memory_is_constant(
    open_loader: Callable[..., BatchLoader], net: Teacher, device: torch.device, place: str
) -> None:
    """At the end of an epoch, but for what is kept for a few batches."""
    loader, allocated = open_loader(Batches(PLACES[place], num_batches=20), net, ahead=1), []
    for _ in range(6):
        for batch in loader:
            sums(batch)
        batch_bytes = batch.images.nbytes
        del batch
        torch.cuda.synchronize(device)
        allocated.append(torch.cuda.memory_allocated(device))
    assert max(allocated[1:]) - min(allocated[1:]) <= 10 * batch_bytes


@pytest.mark.parametrize("end", ["break", "error", "close"])
def test_loop_that_ends_early_leaves_nothing_behind(
    open_loader: Callable[..., BatchLoader], net: Teacher, device: torch.device, end: str
) -> None:
    """With two batches ahead, in memory that is lost once nobody holds it."""
    loader, wanted = open_loader(Once(PLACES["GPU, not torch's"]), net, ahead=2), wanted_sums(net)
    found = []
    try:
        for batch in loader:
            torch.cuda._sleep(SHORT)
            found.append(sums(batch))
            if len(found) == 2:
                if end == "error":
                    raise KeyError("student")
                if end == "close":
                    loader.close()
                break
    except KeyError:
        pass
    loader.close()
    assert loader._sync.stream.query() and not loader._sync._kept
    assert_sums(found, wanted[:2])
    assert net(random_images(ROWS).to(device))["logits"].isfinite().all()  # it stays open


def test_peeked_batch_is_the_first(open_loader: Callable[..., BatchLoader], net: Teacher) -> None:
    loader, wanted = open_loader(Batches(PLACES["pinned"]), net, ahead=1), wanted_sums(net)
    looked = sums(loader.peek())
    found = [sums(batch) for batch in loader]
    assert_sums([looked], wanted[:1])
    assert_sums(found, wanted)
    assert loader.example()["images"].device.type == "cpu"


def test_attached_teacher_completes_what_was_read(open_loader: Callable[..., BatchLoader], net: Teacher) -> None:
    loader, wanted = open_loader(Batches(PLACES["pinned"]), ahead=1), wanted_sums(net)
    loader.peek()
    loader.attach_teacher(net)
    assert_sums([sums(batch) for batch in loader], wanted)


def test_prepare_runs_on_the_gpu_before_the_teacher(
    open_loader: Callable[..., BatchLoader], net: Teacher, device: torch.device
) -> None:
    def flipped(batch: KDBatch) -> KDBatch:
        assert batch.images.device == device
        return batch.replace(images=batch.images.flip(3))

    for number, batch in enumerate(open_loader(Batches(PLACES["pinned"]), net, ahead=1, prepare=flipped)):
        images = values(number)[0].flip(3)
        assert torch.equal(batch.images.cpu(), images)
        wanted = net(images.to(device))["logits"]
        torch.testing.assert_close(batch.teacher["logits"], wanted, rtol=1e-4, atol=1e-4)


def test_group_of_teachers(open_loader: Callable[..., BatchLoader], device: torch.device) -> None:
    members = {
        f"seed{seed}": PyTorchTeacher(ConvNet(seed), image_shape=IMAGE_SHAPE, device=device) for seed in range(2)
    }
    wanted = {name: wanted_sums(member) for name, member in members.items()}
    found = [*open_loader(Batches(PLACES["pinned"]), TeacherGroup(members), ahead=1)]
    for name in members:
        alone = [sums(batch.replace(teacher={"logits": batch.teacher[f"{name}.logits"]})) for batch in found]
        assert_sums(alone, wanted[name])


@pytest.mark.slow
def test_module_is_opened_for_the_first_batch(open_loader: Callable[..., BatchLoader], device: torch.device) -> None:
    """In half precision, and compiled."""
    module = ConvNet()
    state = torch.cuda.get_rng_state(device)
    loader = open_loader(Batches(PLACES["pinned"]), module, ahead=1)
    reference = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE)
    for number, batch in enumerate(loader):
        wanted = reference(values(number)[0])["logits"]
        assert (batch.teacher["logits"].cpu() - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert loader.teacher is not None and loader.teacher.device == device
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert next(module.parameters()).device.type == "cpu"
