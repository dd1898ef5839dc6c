"""Sizes that change: which ones come when, and that nothing else about an image does."""

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from kd_pipeline import EvalTransform, FollowingView, KDDataLoader, MixSettings, Shard, TrainTransform, TrainView
from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.reader import GroupPlan
from kd_pipeline.data.size_schedule import ProgressiveSize, RandomSize, SizeSchedule
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.sources.masks.settings import FolderMasks
from kd_pipeline.data.views import Views
from tests.mask_files import save_pair, some_masks
from tests.views import PIXELS

CHOICES = (32, (24, 40), 48)
EVERYTHING: dict[str, Any] = {
    **{"brightness": 0.4, "hue": 0.1, "grayscale": 0.3, "blur": 0.5, "erase": 0.5},
    "auto_augment": {"kind": "randaugment"},
}


def sizes_of(schedule, epoch, num_batches=40, seed=3, view=IMAGES):
    return schedule.at(view, seed=seed, epoch=epoch, number=np.arange(num_batches))


def transform_of(size, **settings):
    return TrainTransform.model_validate({"size": size, **PIXELS, **settings})


def open_loader(source, size, *, settings=EVERYTHING, **options):
    options = {"batch_size": 4, "seed": 3, "device": "cpu"} | options
    return KDDataLoader(source, transform_of(size, **settings), **options)


def batches_of(loader, epoch=0):
    loader.set_epoch(epoch)
    return [batch.clone() for batch in loader]


# Which size comes when


def test_each_choice_comes_equally_often():
    schedule = RandomSize(choices=CHOICES)
    sizes = sizes_of(schedule, epoch=5, num_batches=3000)
    for size in ((32, 32), (24, 40), (48, 48)):
        assert 900 < sizes.count(size) < 1100
    assert set(sizes) == set(schedule.sizes) and schedule.sizes[0] == (48, 48)


def test_sizes_depend_on_seed_epoch_view_and_batch():
    schedule = RandomSize(choices=CHOICES)
    usual = sizes_of(schedule, epoch=1)
    assert sizes_of(schedule, epoch=1) == usual
    assert usual[7:9] == schedule.at(IMAGES, seed=3, epoch=1, number=np.array([7, 8]))
    others = [sizes_of(schedule, epoch=2), sizes_of(schedule, epoch=1, seed=4), sizes_of(schedule, 1, view="local")]
    assert all(other != usual for other in others)


def test_size_of_an_epoch_is_that_of_all_its_batches():
    schedule = RandomSize(choices=CHOICES, per="epoch")
    epochs = [set(sizes_of(schedule, epoch)) for epoch in range(20)]
    assert all(len(sizes) == 1 for sizes in epochs) and len(set.union(*epochs)) == 3


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"start": 128, "end": 224, "epochs": 4}, [128, 160, 192, 224, 224]),
        ({"start": 128, "end": 224, "epochs": 7}, [128, 160, 160, 192, 192, 224, 224]),  # 144, 176 and 208 are halves
        ({"start": 10, "end": 13, "epochs": 2, "step": 1}, [10, 13, 13]),
        ({"start": [32, 64], "end": [64, 128], "epochs": 3}, [(32, 64), (64, 96), (64, 128)]),
    ],
)  # fmt: skip
def test_progressive_size_grows_to_its_end(settings, sizes):
    schedule = ProgressiveSize(**settings)
    wanted = [size if isinstance(size, tuple) else (size, size) for size in sizes]
    assert [schedule.at(IMAGES, seed=0, epoch=epoch, number=np.arange(1))[0] for epoch in range(len(sizes))] == wanted
    assert schedule.at(IMAGES, seed=9, epoch=10**6, number=np.arange(2)) == [wanted[-1]] * 2
    assert schedule.sizes == sorted(set(wanted), reverse=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"choices": [224]}, "at least 2 items"),
        ({"choices": [224, 0]}, "greater than 0"),
        ({"choices": [192, 224], "per": "image"}, "'batch' or 'epoch'"),
        ({"start": 224, "end": 128, "epochs": 3}, "start must be smaller than end, got 224 and 128"),
        ({"start": 128, "end": 224, "epochs": 1}, "greater than or equal to 2"),
        ({"start": 100, "end": 224, "epochs": 3}, "multiples of step, got 100 for a step of 32; set step to 1"),
        ({"start": 128, "epochs": 3}, "end\n.*Field required"),
    ],
)  # fmt: skip
def test_wrong_schedules_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(SizeSchedule).validate_python(settings)


def test_evaluation_has_one_size():
    with pytest.raises(ValidationError, match="valid integer"):
        EvalTransform.model_validate({"size": {"choices": [32, 48]}})
    with pytest.raises(ValidationError, match="valid integer"):
        FollowingView.model_validate({"follow": "images", "size": {"choices": [32, 48]}})


# What a loader gives


@pytest.mark.parametrize("size", [32, (24, 40), 48])
def test_pixels_are_those_of_a_fixed_size(photo_folder, size):
    """Every image of a batch equals that of a loader with only that size, bit for bit, with all ops."""
    views = {"teacher": FollowingView(follow="images", size=40, color="own", erase="own")}
    with (
        open_loader(photo_folder, {"choices": CHOICES}, views=views, batch_size=2) as loader,
        open_loader(photo_folder, size, views=views, batch_size=2) as fixed,
    ):
        changing, fixed_batches = batches_of(loader, 1), batches_of(fixed, 1)
    height_width = size if isinstance(size, tuple) else (size, size)
    num_equal = 0
    for batch, other in zip(changing, fixed_batches, strict=True):
        assert batch.index.equal(other.index) and batch.views["teacher"].shape[2:] == (40, 40)
        if batch.images.shape[2:] == height_width:
            num_equal += 1
            assert batch.images.equal(other.images) and batch.views["teacher"].equal(other.views["teacher"])
    assert num_equal >= 2


def test_batches_have_the_sizes_of_the_schedule(photo_folder):
    schedule = RandomSize(choices=CHOICES)
    with open_loader(photo_folder, schedule, batch_size=2) as loader:
        for epoch in (0, 3):
            found = [tuple(batch.images.shape[2:]) for batch in batches_of(loader, epoch)]
            assert found == sizes_of(schedule, epoch, num_batches=len(loader))


def test_views_change_their_sizes_on_their_own(photo_folder):
    local = TrainView.model_validate({"size": {"choices": [16, 20]}, "count": 2})
    with open_loader(photo_folder, {"choices": CHOICES}, views={"local": local}, batch_size=2) as loader:
        shapes = [(tuple(batch.images.shape), tuple(batch.views["local"].shape)) for batch in batches_of(loader)]
    own = sizes_of(RandomSize(choices=(16, 20)), 0, len(shapes), view="local")
    assert [local[:3] for _, local in shapes] == [(images[0], 2, 3) for images, _ in shapes]
    assert [local[3:] for _, local in shapes] == own
    assert len({(images[2:], local[3:]) for images, local in shapes}) > 3


@pytest.mark.parametrize("world_size", [2, 4])
def test_sizes_are_the_same_on_all_ranks(photo_folder, world_size):
    with open_loader(photo_folder, {"choices": CHOICES}, batch_size=8) as loader:
        alone = batches_of(loader, 2)
    ranks = []
    for rank in range(world_size):
        shard = Shard(rank, world_size)
        with open_loader(
            photo_folder, {"choices": CHOICES}, batch_size=8 // world_size, shard=shard, last_batch="keep"
        ) as loader:
            ranks.append(batches_of(loader, 2))
    for whole, *parts in zip(alone, *ranks, strict=True):
        valid = [part.images[part.valid] for part in parts]
        np.testing.assert_array_equal(whole.images, np.concatenate([images.numpy() for images in valid]))


def test_resume_within_an_epoch(photo_folder):
    with open_loader(photo_folder, {"choices": CHOICES}, batch_size=3) as loader:
        loader.set_epoch(1)
        batches, states = [], []
        for batch in loader:
            batches.append(batch.clone())
            states.append(loader.state_dict())
    for number in (0, 4, 7):
        with open_loader(photo_folder, {"choices": CHOICES}, batch_size=3) as loader:
            loader.load_state_dict(states[number])
            rest = [batch.clone() for batch in loader]
        assert len(rest) == len(batches) - number - 1
        assert all(ours.images.equal(theirs.images) for ours, theirs in zip(rest, batches[number + 1 :], strict=True))


def test_groups_end_where_the_size_changes(photo_folder, monkeypatch):
    groups = []
    part = GroupPlan.part
    monkeypatch.setattr(GroupPlan, "part", lambda self, *ends: groups.append(part(self, *ends)) or groups[-1])
    with open_loader(photo_folder, {"choices": [32, 48]}, batch_size=1) as loader:
        batches_of(loader)
    assert any(len(group) > 1 for group in groups)
    assert all(len(set(group.sizes)) == 1 for group in groups)
    groups.clear()
    with open_loader(photo_folder, {"choices": [32, 48], "per": "epoch"}, batch_size=1) as loader:
        batches_of(loader)
    assert max(map(len, groups)) > 8


def test_arrays_change_their_size(photos, tmp_path):
    path = tmp_path / "pixels.npy"
    np.save(path, np.stack([photos[n % 2][n : n + 64, n : n + 80] for n in range(24)]))
    for size in ((32, 32), (48, 48)):
        with open_loader(path, {"choices": [32, 48]}) as loader, open_loader(path, size) as fixed:
            pairs = list(zip(batches_of(loader), batches_of(fixed), strict=True))
        equal = [ours.images.equal(theirs.images) for ours, theirs in pairs if ours.images.shape[2:] == size]
        assert equal and all(equal)


def test_mixing_at_the_size_of_each_batch(photo_folder):
    mix = MixSettings(cutmix=1.0)
    for size in ((32, 32), (24, 40)):
        with (
            open_loader(photo_folder, {"choices": [32, (24, 40)]}, mix=mix, last_batch="drop") as loader,
            open_loader(photo_folder, size, mix=mix, last_batch="drop") as fixed,
        ):
            pairs = list(zip(batches_of(loader), batches_of(fixed), strict=True))
        same = [(ours, theirs) for ours, theirs in pairs if ours.images.shape[2:] == size]
        assert same and all(ours.images.equal(theirs.images) for ours, theirs in same)
        assert all(ours.labels.equal(theirs.labels) for ours, theirs in same)


def test_masks_have_the_size_of_their_images(tmp_path):
    for number, mask in enumerate(some_masks(12)):
        save_pair(tmp_path / "images", tmp_path / "masks", f"{number}", mask)
    source = ImageFolder(tmp_path / "images", classes=list("abcd"), masks=FolderMasks(root=tmp_path / "masks"))
    settings = {"auto_augment": {"kind": "trivialaugment"}}
    for size in ((16, 16), (24, 40)):
        with (
            open_loader(source, {"choices": [16, (24, 40)]}, settings=settings, batch_size=2) as loader,
            open_loader(source, size, settings=settings, batch_size=2) as fixed,
        ):
            pairs = list(zip(batches_of(loader), batches_of(fixed), strict=True))
        same = [(ours, theirs) for ours, theirs in pairs if ours.images.shape[2:] == size]
        assert same and all(ours.masks.equal(theirs.masks) for ours, theirs in same)


def test_static_size_has_no_further_parameters():
    views = Views.of(transform_of(32, **EVERYTHING))
    assert views.images.ndims == [ndim for op in views.images.ops for ndim in op.ndims]
    assert views.sizes(np.arange(3), seed=0, epoch=0) == [()] * 3 and views.at(()) is views


def test_largest_size_stands_for_all(photo_folder):
    transform = transform_of({"choices": CHOICES})
    assert transform.image_shape == (3, 48, 48) and transform.at_size().size == 48
    with open_loader(photo_folder, {"choices": CHOICES}) as loader:
        assert loader.example()["images"].shape == (2, 3, 48, 48)
        assert "32 x 32, 24 x 40 or 48 x 48" in repr(loader)
    with open_loader(photo_folder, {"start": 32, "end": 64, "epochs": 3}) as loader:
        assert loader.example()["images"].shape == (2, 3, 64, 64) and "32 x 32 to 64 x 64" in repr(loader)
