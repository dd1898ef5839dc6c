"""A batch on a GPU depends on its place in the order alone: not on run, batch size, group, rank or stream."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays, ImageFolder, Source
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.gpu.conftest import FEW, no_synchronization
from tests.networks import IMAGE_SHAPE, ConvNet
from tests.streams import TRAIN, Fields, assert_same, fields, global_rows, rows, run, state_after

NUM_EPOCHS, NUM_BATCHES = 3, 5
POSITIONS = random.Random(0).sample([(epoch, batch) for epoch in range(NUM_EPOCHS) for batch in range(NUM_BATCHES)], 6)
"""Epoch and batch."""
MIX = MixSettings(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
TEACHERS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "graph": {"cuda_graph": True},
    "compiled": {"compile": True, "precision": "bf16"},
}
"""Options of the teacher."""


@pytest.fixture(scope="module", params=["files", "pixels"])
def source(request: pytest.FixtureRequest, photo_folder: Path) -> Source:
    """37 photographs, or arrays."""
    if request.param == "files":
        return ImageFolder(photo_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 40, 40, 3), dtype=np.uint8)
    return Arrays(pixels, np.arange(37) % 3)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name == "compiled" else []) for name in TEACHERS],
)
def taught(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Teacher | None]:
    """A teacher, or none."""
    options = TEACHERS[request.param]
    if options is None:
        yield None
        return
    teacher = PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE, device=device, batch_size=8, **options)
    yield teacher
    teacher.close()


@pytest.fixture
def open_loader(source: Source, device: torch.device) -> Iterator[Callable[..., KDDataLoader]]:
    """Open loaders of `source`, and close them after the test."""
    opened: list[KDDataLoader] = []

    def make(teacher: Teacher | None = None, transform: TrainTransform = TRAIN, **options: Any) -> KDDataLoader:
        options = {"batch_size": 8, "seed": 5, **FEW, **options}
        opened.append(KDDataLoader(source, transform, teacher, device=device, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


Open = Callable[..., KDDataLoader]


def test_second_run_has_equal_bits(open_loader: Open, taught: Teacher | None) -> None:
    assert_same(run(open_loader(taught)), run(open_loader(taught)))


def test_resume_anywhere_has_equal_bits(open_loader: Open, taught: Teacher | None) -> None:
    whole = run(open_loader(taught), NUM_EPOCHS)
    for epoch, batch in POSITIONS:
        stopped = open_loader(taught, ahead=2)
        stopped.set_epoch(epoch)
        resumed = open_loader(taught, ahead=0, prefetch=1)
        resumed.load_state_dict(state_after(stopped, batch) if batch else stopped.state_dict())
        assert_same(run(resumed, NUM_EPOCHS), whole[epoch * NUM_BATCHES + batch :])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resume_of_mixed_batches_has_equal_bits(open_loader: Open, dtype: Any) -> None:
    transform = TRAIN.model_copy(update={"dtype": dtype})
    whole = run(open_loader(transform=transform, mix=MIX), 2)
    resumed = open_loader(transform=transform, mix=MIX)
    resumed.load_state_dict(state_after(open_loader(transform=transform, mix=MIX), 3))
    assert_same(run(resumed, 2), whole[3:])


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_ahead_and_prefetch_change_nothing(open_loader: Open, taught: Teacher | None, ahead: int) -> None:
    assert_same(run(open_loader(taught, ahead=ahead, prefetch=4)), run(open_loader(taught, ahead=0, prefetch=1)))


@pytest.mark.parametrize("batch_size", [1, 3, 16, 37])
def test_view_does_not_depend_on_batch_size(open_loader: Open, batch_size: int) -> None:
    assert_same(rows(run(open_loader(batch_size=batch_size), 2)), rows(run(open_loader(), 2)))


def test_view_does_not_depend_on_group(open_loader: Open) -> None:
    """DALI processes 1, 2, 4, … batches at once; after a resume it starts with one."""
    whole = run(open_loader(batch_size=2), 1)
    resumed = open_loader(batch_size=2)
    for number in range(0, len(whole), 4):
        resumed.load_state_dict(state_after(open_loader(batch_size=2), number))
        assert_same([fields(next(iter(resumed)))], whole[number : number + 1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_view_does_not_depend_on_rank(open_loader: Open, world_size: int) -> None:
    ranks = [run(open_loader(batch_size=4, shard=Shard(rank, world_size)), 2) for rank in range(world_size)]
    assert_same([row for row in global_rows(ranks) if row["valid"]], rows(run(open_loader(), 2)))


def test_consumer_may_change_streams(open_loader: Open, taught: Teacher | None, device: torch.device) -> None:
    wanted = [total(batch) for batch in run(open_loader(taught, ahead=0), 2)]
    streams = [torch.cuda.Stream(device), torch.cuda.default_stream(device), torch.cuda.Stream(device)]
    found = []
    loader = open_loader(taught, ahead=2)
    for _ in range(2):
        batches = iter(loader)
        for number in range(len(loader)):
            with torch.cuda.stream(streams[number % 3]):
                batch = next(batches)
                torch.cuda._sleep(20_000_000 * (number % 3))
                found.append(total(fields(batch)))
                del batch
        assert next(batches, None) is None
    torch.cuda.synchronize(device)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-9, atol=1e-6)


def total(batch: Fields) -> torch.Tensor:
    return torch.stack([tensor.double().sum() for tensor in batch.values()]).sum()


@pytest.mark.parametrize("ahead", [0, 1])
def test_mixed_step_never_synchronizes(open_loader: Open, taught: Teacher | None, ahead: int) -> None:
    loader = open_loader(taught, mix=MIX, ahead=ahead)
    for _ in loader:
        pass
    with no_synchronization():
        sums = [batch.images.sum() + batch.labels.sum() for batch in loader]
    assert torch.stack(sums).isfinite().all()
