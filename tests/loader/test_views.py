"""Streams with several views: `images` stays as it was, and every view is as exact as it is."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline.data.auto_augment import RandAugment
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.data.views import EvalView, FollowingView, TrainView
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from tests.streams import SIZE, TRAIN, Fields, assert_same, conv_teacher, global_rows, rows, run, state_after

ALL = TRAIN.model_copy(update={"auto_augment": RandAugment()})
VIEWS = {
    "teacher": FollowingView(follow="images", size=SIZE + 8),
    "clean": FollowingView(follow="images", size=[SIZE, SIZE + 4], color="none", erase="own"),
    "local": TrainView(size=SIZE // 2, area=(0.05, 0.4), count=3, hue=0.1),
    "locals_teacher": FollowingView(follow="local", size=SIZE),
    "whole": EvalView(size=SIZE),
}
NUM_EPOCHS, PER_EPOCH = 2, 5


@pytest.fixture(scope="module")
def open_loader(photo_folder: Path) -> Callable[..., KDDataLoader]:
    source = ImageFolder(photo_folder)

    def make(**options: Any) -> KDDataLoader:
        return KDDataLoader(source, ALL, **{"views": VIEWS, "batch_size": 8, "seed": 5, **options})

    return make


@pytest.fixture(scope="module")
def whole_run(open_loader: Callable[..., KDDataLoader]) -> list[Fields]:
    with open_loader() as loader:
        batches = run(loader, NUM_EPOCHS)
    assert len(batches) == NUM_EPOCHS * PER_EPOCH
    assert {name for name in batches[0] if name.startswith("view ")} == {f"view {name}" for name in VIEWS}
    return batches


def plain(batches: list[Fields]) -> list[Fields]:
    return [{name: each for name, each in batch.items() if not name.startswith("view ")} for batch in batches]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode": "full"},
        {"mix": MixSettings(mixup=0.4, cutmix=1.0)},
        {"repeats": 2, "mix": MixSettings(cutmix=1.0)},
        {"batch_size": 4, "shuffle": False},
    ],
    ids=str,
)
def test_images_are_those_without_views(open_loader, options):
    with open_loader(**options) as loader, open_loader(**options, views=None) as without:
        assert_same(plain(run(loader, NUM_EPOCHS)), run(without, NUM_EPOCHS))


def test_a_view_is_the_same_beside_others(open_loader, whole_run):
    for names in (["clean"], ["whole", "local"], [*reversed(VIEWS)]):
        with open_loader(views={name: VIEWS[name] for name in names}) as loader:
            found = run(loader, NUM_EPOCHS)
        kept = found[0].keys()
        assert_same(found, [{name: batch[name] for name in kept} for batch in whole_run])


@pytest.mark.parametrize("stop", range(NUM_EPOCHS * PER_EPOCH + 1))
def test_resume_at_every_step(open_loader, whole_run, stop):
    with open_loader() as loader:
        state = None
        for epoch in range(NUM_EPOCHS):
            if stop >= (epoch + 1) * PER_EPOCH:
                loader.set_epoch(epoch + 1)
        state = state_after(loader, stop % PER_EPOCH)
    with open_loader(num_threads=1 + stop % 2, prefetch=1 + stop % 3) as loader:
        loader.load_state_dict(state)
        assert_same(run(loader, NUM_EPOCHS), whole_run[stop:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_stream(open_loader, world_size):
    with open_loader(batch_size=16, last_batch="drop") as loader:
        alone = rows(run(loader, NUM_EPOCHS))
    ranks = []
    for rank in range(world_size):
        shard = Shard(rank, world_size)
        with open_loader(batch_size=16 // world_size, last_batch="drop", shard=shard) as loader:
            ranks.append(run(loader, NUM_EPOCHS))
    assert_same(global_rows(ranks), alone)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_batch_size_changes_nothing(open_loader, whole_run, batch_size):
    with open_loader(batch_size=batch_size) as loader:
        assert_same(rows(run(loader, NUM_EPOCHS)), rows(whole_run))


def test_substitute_is_in_every_view(photo_folder, tmp_path, open_loader):
    """As if the next sample had been there."""
    shutil.copytree(photo_folder, tmp_path / "photos")
    bad = sorted((tmp_path / "photos").rglob("*.jpg"))[4]
    bad.write_bytes(bad.read_bytes()[:100])
    options = {"on_bad_sample": "substitute", "shuffle": False, "batch_size": 4}
    source = ImageFolder(tmp_path / "photos")
    with KDDataLoader(source, ALL, views=VIEWS, seed=5, **options) as loader:
        found = rows(run(loader, 1))
        (sample,) = loader.bad_samples
    assert sample.path.endswith(bad.name)
    place, substitute = sample.index, found[sample.index]["index"].item()
    assert substitute != place and not found[place]["valid"]
    other = next(row for row in found if row["index"] == substitute and row["valid"])
    for name in found[place].keys() - {"valid"}:
        assert torch.equal(found[place][name], other[name]), name


def test_epochs_and_copies_differ(whole_run):
    first, second = (rows(whole_run[start : start + PER_EPOCH]) for start in (0, PER_EPOCH))
    later = {row["index"].item(): row for row in second}
    for row in first:
        local = row["view local"]
        assert not torch.equal(local[0], local[1]) and not torch.equal(local[1], local[2])
        again = later[row["index"].item()]["view local"]
        assert not any(torch.equal(local[copy], again[copy]) for copy in range(3))
        assert torch.equal(row["view whole"], later[row["index"].item()]["view whole"])


def test_all_views_are_mixed_with_the_same_partners(open_loader):
    """Mixup is linear: the same sum of the unmixed views, at every size and of every copy."""
    with open_loader(mix=MixSettings(mixup=0.8)) as mixed, open_loader() as unmixed:
        for ours, theirs in islice(zip(mixed, unmixed, strict=True), 3):
            assert torch.equal(ours.index, theirs.index)
            partners = theirs.images.view(-1, 2, *theirs.images.shape[1:]).flip(1).flatten(0, 1)
            own, other = theirs.images.flatten(1).double(), partners.flatten(1).double()
            difference = own - other
            weight = ((ours.images.flatten(1).double() - other) * difference).sum(1) / difference.square().sum(1)
            for name, view in theirs.views.items():
                swapped = view.view(-1, 2, *view.shape[1:]).flip(1).flatten(0, 1)
                share = weight.view(-1, *[1] * (view.ndim - 1)).float()
                torch.testing.assert_close(
                    ours.views[name], view * share + swapped * (1 - share), rtol=0, atol=2e-4, msg=name
                )


def test_cut_rectangle_is_the_same_part_of_every_view(open_loader):
    with open_loader(mix=MixSettings(cutmix=1.0)) as mixed, open_loader() as unmixed:
        for ours, theirs in islice(zip(mixed, unmixed, strict=True), 2):
            parts = []
            for found, own in ((ours.images, theirs.images), (ours.views["teacher"], theirs.views["teacher"])):
                kept = (found == own).all(dim=1).float()
                parts.append(torch.nn.functional.interpolate(kept[:, None], (64, 64))[:, 0])
            assert ((parts[0] != parts[1]).float().mean(dim=(1, 2)) < 0.12).all()
            assert (parts[0].mean(dim=(1, 2)) < 1).sum() >= 4


def test_views_of_pixels(photos):
    pixels = np.stack([photos[n % 2][5 * n : 5 * n + 80, 3 * n : 3 * n + 100] for n in range(20)])
    source = Arrays(pixels, np.arange(20) % 3)
    with KDDataLoader(source, ALL, views=VIEWS, batch_size=4) as loader:
        with KDDataLoader(source, ALL, batch_size=4) as without:
            assert_same(plain(run(loader, 1)), run(without, 1))
        shapes = {name: tuple(view.shape[1:]) for name, view in next(iter(loader)).views.items()}
    assert shapes == {
        "teacher": (3, SIZE + 8, SIZE + 8),
        "clean": (3, SIZE, SIZE + 4),
        "local": (3, 3, SIZE // 2, SIZE // 2),
        "locals_teacher": (3, 3, SIZE, SIZE),
        "whole": (3, SIZE, SIZE),
    }


def test_batches_keep_their_views(open_loader, whole_run):
    """The buffers are not overwritten while they are referenced."""
    with open_loader() as loader:
        held = [batch for _ in range(NUM_EPOCHS) for batch in loader]
    for batch, wanted in zip(held, whole_run, strict=True):
        for name, view in batch.views.items():
            assert torch.equal(view, wanted[f"view {name}"])


def test_teacher_sees_its_view(open_loader):
    teacher = conv_teacher()
    views = {"teacher": FollowingView(follow="images", size=SIZE, color="none")}
    with open_loader(views=views, teacher=teacher, teacher_view="teacher") as loader:
        for batch in loader:
            assert torch.equal(batch.teacher["logits"], teacher(batch.views["teacher"])["logits"])
            assert not torch.equal(batch.teacher["logits"], teacher(batch.images)["logits"])


def test_unknown_teacher_view_is_refused(open_loader):
    with pytest.raises(ConfigError, match=r"teacher_view is 'teach', .*did you mean 'teacher'"):
        open_loader(teacher_view="teach")
