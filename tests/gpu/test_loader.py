"""The whole loader on a GPU: DALI decodes there, teacher and student share one buffer, and nothing synchronizes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd_pipeline.data.auto_augment import RandAugment, TrivialAugment
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.sources import Arrays, FileList, ImageFolder
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.views import FollowingView, TrainView
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.corpus import BROKEN, Broken, photo_of
from tests.gpu.conftest import FEW, SMALL, copies_in, no_synchronization
from tests.networks import ConvNet
from tests.streams import EVAL, TRAIN, assert_same, fields, state_after
from tests.views import PIXELS

LONG = 200_000_000
"""Clock cycles, about a tenth of a second."""


@pytest.fixture
def open_loader(photo_folder: Any, device: torch.device) -> Iterator[Callable[..., KDDataLoader]]:
    """Open loaders of the photographs, and close them after the test."""
    source, opened = ImageFolder(photo_folder), []

    def make(transform: Any = TRAIN, teacher: Teacher | None = None, **options: Any) -> KDDataLoader:
        opened.append(KDDataLoader(source, transform, teacher, device=device, batch_size=8, seed=5, **FEW, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def epoch(loader: KDDataLoader) -> list[dict[str, Tensor]]:
    """All batches of an epoch, on the CPU."""
    return [{name: tensor.cpu() for name, tensor in fields(batch).items()} for batch in loader]


def test_batches_are_on_the_gpu(
    open_loader: Callable[..., KDDataLoader], teacher: Teacher, device: torch.device
) -> None:
    batches = [fields(batch) for batch in open_loader(EVAL, teacher, shuffle=False)]
    assert [len(batch["images"]) for batch in batches] == [8, 8, 8, 8, 5]
    assert all(tensor.device == device for batch in batches for tensor in batch.values())


def test_own_ops_and_sizes_that_change(open_loader: Callable[..., KDDataLoader]) -> None:
    """Each batch is that of a loader with only its size, and own ops have the numbers that they have on a CPU."""
    order = [
        {"factory": "tests.own_ops:mirror", "num_draws": 1},
        {"factory": "tests.own_ops:shift", "num_draws": 1, "probability": 0.5, "kwargs": {"most": 90}},
        {"factory": "tests.own_ops:zoom"},
    ]

    def batches(size: Any, **options: Any) -> list[dict[str, Tensor]]:
        transform = TrainTransform.model_validate({**PIXELS, "size": size, "order": order})
        return epoch(open_loader(transform, plugins=["tests.own_ops"], **options))

    changing, small, large = batches({"choices": [24, 40]}), batches(24), batches(40)
    sizes = [batch["images"].shape[-1] for batch in changing]
    assert set(sizes) == {24, 40}
    for size, batch, *fixed in zip(sizes, changing, small, large, strict=True):
        assert batch["images"].equal(fixed[size == 40]["images"])
    with KDDataLoader(
        open_loader().source,
        TrainTransform.model_validate({**PIXELS, "size": 40, "order": order}),
        **{"batch_size": 8, "seed": 5, "device": "cpu", "plugins": ["tests.own_ops"]},
    ) as on_cpu:
        for ours, theirs in zip(large, epoch(on_cpu), strict=True):
            assert (ours["images"] - theirs["images"]).abs().mean() < 4


def test_logits_belong_to_the_images_of_the_batch(open_loader: Callable[..., KDDataLoader], teacher: Teacher) -> None:
    network = ConvNet().eval()
    for batch in epoch(open_loader(TRAIN, teacher)):
        wanted = network(batch["images"])["logits"].detach()
        torch.testing.assert_close(batch["logits"], wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("ahead", [1, 2])
def test_ahead_does_not_change_batches(open_loader: Callable[..., KDDataLoader], teacher: Teacher, ahead: int) -> None:
    assert_same(epoch(open_loader(TRAIN, teacher, ahead=ahead)), epoch(open_loader(TRAIN, teacher, ahead=0)))


@pytest.mark.parametrize("number", range(5))
def test_resume_continues_with_next_batch(
    open_loader: Callable[..., KDDataLoader], teacher: Teacher, number: int
) -> None:
    stopped = open_loader(TRAIN, teacher, ahead=2)
    resumed = open_loader(TRAIN, teacher, ahead=0, prefetch=1)
    resumed.load_state_dict(state_after(stopped, number))
    assert_same(epoch(resumed), epoch(open_loader(TRAIN, teacher))[number:])


TRANSFORMS = {
    "eval": (EVAL, 1),
    "every op": (TRAIN, 1),
    "float16": (TrainTransform(size=EVAL.size, dtype="float16"), 1),
    "randaugment": (TrainTransform(size=EVAL.size, auto_augment=RandAugment()), 3),
    "trivialaugment": (TrainTransform(size=EVAL.size, auto_augment=TrivialAugment()), 3),
}
"""Transforms, and by how many levels of 255 the GPU may differ on average: some ops amplify differences."""
ARRAYS = Arrays(np.random.default_rng(0).integers(0, 256, (37, 40, 40, 3), dtype=np.uint8), np.arange(37) % 3)


@pytest.mark.parametrize(("transform", "levels"), TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_images_match_the_cpu(
    photo_folder: Any, device: torch.device, transform: Any, levels: float, stores: str
) -> None:
    """Decoders and filters round differently."""
    source = ARRAYS if stores == "pixels" else ImageFolder(photo_folder)
    found = []
    for where in (device, "cpu"):
        with KDDataLoader(source, transform, device=where, batch_size=8, seed=5, **FEW) as loader:
            found.append(epoch(loader))
    level = 1 / 255 / min(transform.std)
    for ours, theirs in zip(*found, strict=True):
        images, their_images = ours.pop("images").float(), theirs.pop("images").float()
        assert_same([ours], [theirs])
        assert (images - their_images).abs().mean() < levels * level


def test_mixing_matches_the_cpu(device: torch.device) -> None:
    found = []
    for where in (device, "cpu"):
        mix = MixSettings(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
        with KDDataLoader(ARRAYS, EVAL, device=where, batch_size=8, seed=5, mix=mix) as loader:
            found.append(epoch(loader))
    level = 1 / 255 / min(EVAL.std)
    for ours, theirs in zip(*found, strict=True):
        assert (ours["images"] - theirs["images"]).abs().mean() < level
        torch.testing.assert_close(ours["labels"], theirs["labels"])
        assert torch.equal(ours["index"], theirs["index"]) and torch.equal(ours["valid"], theirs["valid"])


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_unreadable_file_is_substituted(broken: Broken, photos: Any, tmp_path: Path, device: torch.device) -> None:
    photo = photo_of(photos)
    Image.fromarray(photo).save(tmp_path / "good.jpg")
    broken.put(tmp_path / broken.name, photo)
    names = ["good.jpg"] * 64
    names[43] = broken.name
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{name},0\n" for name in names))
    options = {"batch_size": 64, "shuffle": False, "on_bad_sample": "substitute", "max_bad_fraction": 0.2}
    with KDDataLoader(FileList(tmp_path / "list.csv"), TRAIN, device=device, **FEW, **options) as loader:
        for batch in (*loader, *loader):
            assert (~batch.valid).nonzero().tolist() == [[43]]


def test_teacher_and_student_share_one_buffer(
    open_loader: Callable[..., KDDataLoader], teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    infer = teacher._infer

    def spy(images: Tensor) -> dict[str, Tensor]:
        read.append(images.data_ptr())
        return infer(images)

    monkeypatch.setattr(teacher, "_infer", spy)
    delivered = [batch.images.data_ptr() for batch in open_loader(TRAIN, teacher)]
    assert delivered == read
    assert all(address % 256 == 0 for address in read)


@pytest.mark.filterwarnings("ignore")  # of the profiler's
def test_images_are_not_copied(open_loader: Callable[..., KDDataLoader], teacher: Teacher) -> None:
    loader = open_loader(TRAIN, teacher)
    (image_bytes,) = {batch.images[0].nbytes for batch in loader}
    copies = copies_in(lambda: [batch.teacher["logits"].sum() for batch in loader])
    assert not [copy for copy in copies if "DtoH" in copy[0] and copy[1] > SMALL]
    assert not [copy for copy in copies if copy[1] >= 5 * image_bytes and copy[1] % image_bytes == 0]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_step_never_synchronizes(open_loader: Callable[..., KDDataLoader], teacher: Teacher, ahead: int) -> None:
    loader = open_loader(TRAIN, teacher, ahead=ahead)
    for _ in loader:
        pass
    with no_synchronization():
        sums = [batch.images.sum() + batch.teacher["logits"].sum() for batch in loader]
    assert torch.stack(sums).isfinite().all()


def test_step_returns_while_the_student_runs(
    open_loader: Callable[..., KDDataLoader], teacher: Teacher, device: torch.device
) -> None:
    loader = open_loader(TRAIN, teacher, ahead=1)
    for _ in range(3):  # until DALI has all its memory; allocating it synchronizes
        for _ in loader:
            pass
    batches = iter(loader)
    next(batches)
    torch.cuda._sleep(10 * LONG)
    student = torch.cuda.current_stream(device).record_event()
    next(batches)
    assert not student.query()


@pytest.mark.parametrize("ahead", [0, 2])
def test_slow_student_reads_its_own_batch(
    open_loader: Callable[..., KDDataLoader], teacher: Teacher, device: torch.device, ahead: int
) -> None:
    """Each batch is dropped before the student's stream reaches it, so its buffers could be reused."""
    wanted = [
        batch["images"].double().sum() + batch["logits"].double().sum() for batch in epoch(open_loader(TRAIN, teacher))
    ]
    student, found = torch.cuda.Stream(device), []
    with torch.cuda.stream(student):
        for batch in open_loader(TRAIN, teacher, ahead=ahead):
            torch.cuda._sleep(LONG)
            found.append(batch.images.double().sum() + batch.teacher["logits"].double().sum())
            del batch
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(wanted), rtol=1e-9, atol=1e-6)


VIEWS = {
    "teacher": FollowingView(follow="images", size=EVAL.size + 8),
    "clean": FollowingView(follow="images", size=EVAL.size, color="none", erase="none"),
    "local": TrainView(size=EVAL.size // 2, area=(0.05, 0.4), count=3),
}


@pytest.mark.parametrize("decode", ["window", "full"])
def test_views_leave_images_as_they_are(open_loader: Callable[..., KDDataLoader], decode: str) -> None:
    with_views = epoch(open_loader(TRAIN, views=VIEWS, decode=decode))
    kept = [{name: batch[name] for name in ("index", "images", "labels", "valid")} for batch in with_views]
    assert_same(kept, epoch(open_loader(TRAIN, decode=decode)))


def test_views_are_on_the_gpu_and_resume(
    open_loader: Callable[..., KDDataLoader], teacher: Teacher, device: torch.device
) -> None:
    whole = [fields(batch) for batch in open_loader(TRAIN, teacher, views=VIEWS)]
    assert all(tensor.device == device for batch in whole for tensor in batch.values())
    resumed = open_loader(TRAIN, teacher, views=VIEWS, ahead=0, prefetch=1)
    resumed.load_state_dict(state_after(open_loader(TRAIN, teacher, views=VIEWS, ahead=2), 2))
    cpu = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in whole]
    assert_same(epoch(resumed), cpu[2:])


def test_each_teacher_reads_the_buffer_of_its_view(
    open_loader: Callable[..., KDDataLoader], device: torch.device
) -> None:
    sizes = {"teacher": EVAL.size + 8, "local": EVAL.size // 2}
    read: dict[str, list[int]] = {view: [] for view in sizes}

    class Reads(nn.Module):
        def __init__(self, view: str) -> None:
            super().__init__()
            self.view, self.weight = view, nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            read[self.view].append(images.data_ptr())
            return images.mean((2, 3)) * self.weight

    members = {
        view: open_teacher(
            TeacherSettings(view=view, precision="fp32", compile=False, channels_last=False),
            module=Reads(view),
            image_shape=(3, size, size),
            device=device,
        )
        for view, size in sizes.items()
    }
    for pointers in read.values():
        pointers.clear()  # of the trial runs
    batches = [*open_loader(TRAIN, TeacherGroup(members), views=VIEWS)]
    for view, pointers in read.items():
        assert pointers == [batch.views[view].data_ptr() for batch in batches]
        for batch in batches:
            torch.testing.assert_close(batch.teacher[f"{view}.logits"], batch.views[view].mean((-2, -1)))
