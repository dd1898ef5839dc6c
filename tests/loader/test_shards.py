"""Samples and views do not depend on batch size and ranks."""

from functools import cache

import numpy as np
import pytest
import torch

from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.loader.loader import KDDataLoader
from tests.streams import (
    EVAL,
    TRAIN,
    Fields,
    assert_same,
    global_rows,
    rows,
    run,
)

WORLD_SIZES = [1, 2, 4]
SIZES = {1: [1, 2, 19, 101], 2: [1, 2, 3, 19, 101], 4: [3, 4, 5, 19, 101]}
"""By world size: about as many samples as ranks, and many more."""


@pytest.fixture(scope="module")
def pieces(photos) -> np.ndarray:
    """101 different pieces of the photographs, `[101, 24, 24, 3]`."""
    places = np.random.default_rng(7).integers(0, 400, size=(101, 2))
    return np.stack([photos[n % 2][y : y + 24, x : x + 24] for n, (y, x) in enumerate(places)])


def open_loader(source, transform=TRAIN, **options) -> KDDataLoader:
    return KDDataLoader(source, transform, **{"batch_size": 4, "seed": 11, **options})


def streams(source, world_size: int, *, num_epochs: int = 2, **options) -> list[list[Fields]]:
    """The batches of each rank."""
    found = []
    for rank in range(world_size):
        with open_loader(source, shard=Shard(rank, world_size), **options) as loader:
            found.append(run(loader, num_epochs))
    return found


@pytest.fixture(scope="module")
def whole(photo_folder):
    """`whole(transform)` returns two epochs of the photographs, sample by sample."""

    @cache
    def read(transform) -> list[Fields]:
        with open_loader(ImageFolder(photo_folder), transform) as loader:
            return rows(run(loader, 2))

    return read


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
def test_order_and_pixels_independent_of_batch_size(photo_folder, whole, transform, batch_size):
    with open_loader(ImageFolder(photo_folder), transform, batch_size=batch_size) as loader:
        assert_same(rows(run(loader, 2)), whole(transform))


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_order_and_pixels_independent_of_ranks(photo_folder, whole, world_size, batch_size):
    ranks = streams(ImageFolder(photo_folder), world_size, batch_size=batch_size)
    assert_same([row for row in global_rows(ranks) if row["valid"]], whole(TRAIN))


def test_views_depend_on_epoch_and_seed(photo_folder, whole):
    views = {(place // 37, int(row["index"])): row["images"] for place, row in enumerate(whole(TRAIN))}
    assert not any(torch.equal(views[0, index], views[1, index]) for index in range(37))
    with open_loader(ImageFolder(photo_folder), seed=12) as loader:
        for row in rows(run(loader, 1)):
            assert not torch.equal(row["images"], views[0, int(row["index"])])


def test_order_changes_with_epoch_if_shuffled(photo_folder, whole):
    order = [int(row["index"]) for row in whole(TRAIN)]
    assert order[:37] != order[37:] and order[:37] != list(range(37))
    with open_loader(ImageFolder(photo_folder), shuffle=False) as loader:
        assert [int(row["index"]) for row in rows(run(loader, 2))] == [*range(37), *range(37)]


CASES = [(world_size, size) for world_size in WORLD_SIZES for size in SIZES[world_size]]


@pytest.mark.parametrize(("world_size", "size"), CASES)
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
def test_every_sample_is_valid_once_over_all_ranks(pieces, world_size, size, last_batch):
    labels = np.arange(size) % 7
    ranks = streams(Arrays(pieces[:size], labels), world_size, num_epochs=1, last_batch=last_batch)
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch["index"]) > 0 for rank in ranks for batch in rank)
    seen = rows(batch for rank in ranks for batch in rank)
    assert sorted(int(row["index"]) for row in seen if row["valid"]) == list(range(size))
    assert all(int(row["labels"]) == labels[int(row["index"])] for row in seen)


@pytest.mark.parametrize(("world_size", "size"), CASES)
def test_pad_fills_batches_with_invalid_rows(pieces, world_size, size):
    ranks = streams(Arrays(pieces[:size]), world_size, num_epochs=1, last_batch="pad")
    assert {len(batch["index"]) for rank in ranks for batch in rank} == {4}
    num_rows = sum(len(batch["index"]) for rank in ranks for batch in rank)
    assert num_rows - size < 4 * world_size
    assert sum(int((~batch["valid"]).sum()) for rank in ranks for batch in rank) == num_rows - size


@pytest.mark.parametrize(("world_size", "size"), CASES)
def test_keep_repeats_only_for_empty_ranks(pieces, world_size, size):
    ranks = streams(Arrays(pieces[:size]), world_size, num_epochs=1, last_batch="keep")
    for batch in (batch for rank in ranks for batch in rank):
        assert batch["valid"].all() or (len(batch["valid"]) == 1 and size % (4 * world_size) < world_size)


@pytest.mark.parametrize(("world_size", "size"), [(1, 4), (1, 19), (2, 8), (2, 19), (4, 16), (4, 101)])
def test_drop_skips_only_the_partial_batch(pieces, world_size, size):
    ranks = streams(Arrays(pieces[:size]), world_size, last_batch="drop", num_epochs=2)
    kept = size // (4 * world_size) * 4 * world_size
    seen = global_rows(ranks)
    assert {len(batch["index"]) for rank in ranks for batch in rank} == {4}
    assert len(seen) == 2 * kept and all(row["valid"] for row in seen)
    for epoch in range(2):
        assert len({int(row["index"]) for row in seen[epoch * kept : (epoch + 1) * kept]}) == kept


def test_drop_skips_different_samples_each_epoch(pieces):
    (seen,) = streams(Arrays(pieces[:19]), 1, last_batch="drop", num_epochs=6)
    assert {int(row["index"]) for row in rows(seen)} == set(range(19))


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (1, 3), (2, 7), (4, 15)])
def test_drop_of_all_samples_is_refused(pieces, world_size, size):
    with pytest.raises(DataError) as info:
        open_loader(Arrays(pieces[:size]), shard=Shard(0, world_size), last_batch="drop")
    assert f"{size} samples do not fill a batch of 4 on {world_size} rank(s)" in str(info.value)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (1, 1)])
def test_rank_outside_world_is_refused(rank, world_size):
    with pytest.raises(ConfigError, match=f"rank {rank} of {world_size}"):
        Shard(rank, world_size)


def test_rank_from_torch_distributed(pieces):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with open_loader(Arrays(pieces)) as loader:
            assert loader.shard == Shard(0, 1)
        with open_loader(Arrays(pieces), shard=Shard(1, 4)) as loader:
            assert loader.shard == Shard(1, 4)
    finally:
        torch.distributed.destroy_process_group()
    with open_loader(Arrays(pieces)) as loader:
        assert loader.shard == Shard(0, 1)


def test_rank_from_torchrun_before_init(pieces, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with open_loader(Arrays(pieces)) as loader:
        assert loader.shard == Shard(2, 4)
