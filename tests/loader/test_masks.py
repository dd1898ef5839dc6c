"""Masks in the stream: independent of batches and ranks, resumed, substituted, and neither mixed nor recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline.data.auto_augment import RandAugment
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import (
    ArrayMasks,
    Arrays,
    BaseSource,
    FolderMasks,
    ImageFolder,
    Masks,
    MaskSettings,
    Tar,
    TarMasks,
)
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import BadSampleError, ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from tests.mask_files import png_of, save_pair, some_masks
from tests.streams import SIZE, Fields, assert_same, conv_teacher, global_rows, rows, run, state_after
from tests.tar_files import write_tar

NUM = 21
TRAIN = TrainTransform(size=SIZE, auto_augment=RandAugment(), erase=0.5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and masks; do not change them."""
    return save(tmp_path_factory.mktemp("pairs"))


def save(root: Path) -> Path:
    for number, mask in enumerate(some_masks(NUM)):
        save_pair(root / "images", root / "masks", f"{number:02}", mask)
    return root


def source_in(root: Path) -> ImageFolder:
    return ImageFolder(root / "images", masks=FolderMasks(root=str(root / "masks"), num_classes=4))


def open_loader(source: Any, **options: Any) -> KDDataLoader:
    return KDDataLoader(source, TRAIN, **{"batch_size": 4, "seed": 7, "device": "cpu", **options})


@pytest.fixture(scope="module")
def whole(shared) -> list[Fields]:
    """Two epochs, sample by sample."""
    with open_loader(source_in(shared)) as loader:
        found = rows(run(loader, 2))
    assert all("masks" in row for row in found)
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_masks_do_not_depend_on_the_batch_size(shared, whole, batch_size):
    with open_loader(source_in(shared), batch_size=batch_size) as loader:
        assert_same(rows(run(loader, 2)), whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_masks_do_not_depend_on_ranks(shared, whole, world_size):
    ranks = []
    for rank in range(world_size):
        with open_loader(source_in(shared), shard=Shard(rank, world_size)) as loader:
            ranks.append(run(loader, 2))
    assert_same([row for row in global_rows(ranks) if row["valid"]], whole)


@pytest.mark.parametrize("options", [{"num_threads": 1}, {"prefetch": 1}, {"prefetch": 4, "ahead": 3}])
def test_masks_do_not_depend_on_what_is_ahead(shared, whole, options):
    with open_loader(source_in(shared), **options) as loader:
        assert_same(rows(run(loader, 2)), whole)


@pytest.mark.parametrize("num_batches", [1, 5, 6])
def test_masks_resume(shared, whole, num_batches):
    with open_loader(source_in(shared)) as loader:
        state = state_after(loader, num_batches)
    with open_loader(source_in(shared)) as loader:
        loader.load_state_dict(state)
        found = rows(run(loader, 2))
    assert_same(found, whole[len(whole) - len(found) :])


def test_images_are_those_without_masks(shared, whole):
    with open_loader(ImageFolder(shared / "images", labeled=False)) as loader:
        found = rows(run(loader, 2))
    assert_same(found, [{name: tensor for name, tensor in row.items() if name != "masks"} for row in whole])


def spoil(root: Path) -> dict[int, str]:
    """Damage three masks; returns why each cannot be used."""
    (root / "masks/03.png").write_bytes(png_of(np.zeros((5, 7))))
    (root / "masks/09.png").write_bytes(png_of(np.full((47, 48), 77)))
    (root / "masks/10.png").write_bytes(b"\x89PNG")
    return {3: "has 7x5 pixels, and the image 36x29", 9: "has the value 77", 10: "it is of a kind that starts with"}


def test_an_unreadable_mask_is_named(tmp_path):
    spoil(save(tmp_path))
    shown: list[int] = []
    loader = open_loader(source_in(tmp_path), shuffle=False, batch_size=1)
    with loader, pytest.raises(BadSampleError) as info:
        shown.extend(int(batch.index[0]) for batch in loader)
    assert shown == [0, 1, 2] and info.value.index == 3 and "images/03.jpg" in info.value.path
    assert f"its mask {tmp_path}/masks/03.png has 7x5 pixels, and the image 36x29" in info.value.reason


def test_samples_with_unreadable_masks_are_substituted(tmp_path):
    reasons = spoil(save(tmp_path))
    bad = {"on_bad_sample": "substitute", "max_bad_fraction": 0.5}
    with open_loader(source_in(tmp_path), **bad) as loader:
        found = rows(run(loader, 2))
        samples = {sample.index: sample.reason for sample in loader.bad_samples}
    assert samples.keys() == reasons.keys()
    assert all(reasons[index] in samples[index] for index in samples)
    assert all(row["index"] not in (3, 9, 10) for row in found)
    assert sum(not row["valid"] for row in found) == 6
    with open_loader(source_in(tmp_path), batch_size=7, **bad) as loader:
        assert_same(rows(run(loader, 2)), found)
    with open_loader(source_in(tmp_path), **bad) as loader:
        state = state_after(loader, 6)
    with open_loader(source_in(tmp_path), **bad) as loader:
        loader.load_state_dict(state)
        rest = rows(run(loader, 2))
    assert_same(rest, found[len(found) - len(rest) :])


def test_arrays_substitute_samples_with_wrong_classes(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (9, 20, 20, 3), dtype=np.uint8))
    masks = rng.integers(0, 4, (9, 20, 20), dtype=np.uint8)
    masks[5, 0, 0] = 200
    np.save(tmp_path / "masks.npy", masks)
    source = Arrays(tmp_path / "images.npy", masks=ArrayMasks(path=tmp_path / "masks.npy", num_classes=4))
    with open_loader(source) as loader, pytest.raises(BadSampleError, match=r"masks.npy\[5\]: it has the value 200"):
        run(loader, 1)
    with open_loader(source, on_bad_sample="substitute") as loader:
        found = rows(run(loader, 1))
    assert sorted(int(row["index"]) for row in found) == [0, 1, 2, 3, 4, 6, 6, 7, 8]


def test_masks_are_not_mixed(shared):
    with pytest.raises(ConfigError, match="mix blends images"):
        open_loader(source_in(shared), mix=MixSettings(mixup=0.2))


def test_prepare_sees_the_masks(shared, whole):
    def prepare(batch: Any) -> Any:
        return batch.replace(masks=torch.where(batch.masks == 3, 255, batch.masks))

    with open_loader(source_in(shared), prepare=prepare) as loader:
        found = rows(run(loader, 1))
    for row, wanted in zip(found, whole, strict=False):
        assert torch.equal(row["masks"], torch.where(wanted["masks"] == 3, 255, wanted["masks"]))


def test_the_teacher_sees_the_same_images(shared):
    plain = ImageFolder(shared / "images", labeled=False)
    found = []
    for source in (source_in(shared), plain):
        with open_loader(source, teacher=conv_teacher()) as loader:
            found.append([row["logits"] for row in rows(run(loader, 1))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_source_of_your_own_has_masks(shared, whole):
    names = [f"{number:02}" for number in range(NUM)]
    masks = Masks(BaseSource([shared / f"masks/{name}.png" for name in names]), MaskSettings(num_classes=4))
    source = BaseSource([shared / f"images/{name}.jpg" for name in names], masks=masks)
    with open_loader(source) as loader:
        assert loader.num_classes == 4
        assert_same(rows(run(loader, 2)), whole)


def test_masks_of_shards_in_a_random_order(tmp_path):
    """As in a loader of the files, sample by sample."""
    save(tmp_path)
    files = {}
    for number in range(NUM):
        files[f"{number:02}.jpg"] = (tmp_path / f"images/{number:02}.jpg").read_bytes()
        files[f"{number:02}.seg.png"] = (tmp_path / f"masks/{number:02}.png").read_bytes()
    names = list(files)
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", {name: files[name] for name in names[14 * shard : 14 * (shard + 1)]})
    tar = Tar(tmp_path / "{0..2}.tar", masks=TarMasks(extension="seg.png", num_classes=4))
    expected: list[int] = []
    tar.masks.expect = lambda index: expected.extend(index.tolist())  # type: ignore[method-assign]
    with open_loader(tar, shuffle=ShardShuffle(buffer=6)) as loader:
        found = {int(row["index"]): row for row in rows(run(loader, 1))}
    with open_loader(source_in(tmp_path)) as loader:
        wanted = {int(row["index"]): row for row in rows(run(loader, 1))}
    assert set(expected) == set(range(NUM)) == found.keys() and list(found) != sorted(found)
    assert_same([found[index] for index in range(NUM)], [wanted[index] for index in range(NUM)])


def test_masks_made_during_validation_can_be_trained_on(shared):
    with open_loader(source_in(shared), ahead=1) as loader:
        batches = iter(loader)
        with torch.inference_mode():
            next(batches)
        following = next(batches)
    assert not following.masks.is_inference()


def test_repeats_have_masks_of_their_own(shared):
    with open_loader(source_in(shared), repeats=2) as loader:
        batch = next(iter(loader))
    assert batch.index[0] == batch.index[1] and not torch.equal(batch.masks[0], batch.masks[1])
