"""Orders are permutations of the dataset, and pure functions of (seed, epoch, position)."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from kd_pipeline import ShardShuffle
from kd_pipeline.data import order as orders
from kd_pipeline.data.order import DatasetOrder, GlobalOrder, ShardOrder, read_shuffle, shuffle_fields
from kd_pipeline.data.plan import Plan, Shard
from kd_pipeline.errors import ConfigError

LARGEST = 2**64 - 1


def global_order(num_samples, **key):
    return GlobalOrder.of(num_samples, **key).indices(np.arange(num_samples))


def ends_of(*sizes):
    return np.cumsum([0, *sizes])


def shard_order(shard_ends, buffer, *, seed=5, epoch=3):
    order = ShardOrder.of(shard_ends, buffer, seed=seed, epoch=epoch)
    return order.indices(np.arange(shard_ends[-1]))


def stream_places(shard_ends, *, seed=5, epoch=3):
    """Where each sample of the dataset is in the sequence of shards before it is mixed."""
    return np.argsort(shard_order(shard_ends, 1, seed=seed, epoch=epoch))


DATASETS = [ends_of(*sizes) for sizes in ([1], [40], [0, 7, 0, 0, 1, 30, 2, 1, 0], [10] * 9, [1] * 50, [3, 60, 5, 20])]
BUFFERS = [1, 2, 3, 7, 25, 88, 200, 2**40]


@pytest.fixture(params=[8, 2**14], ids=["small pieces", "large pieces"])
def piece(request, monkeypatch):
    """The size of pieces, so that small datasets have many of them too."""
    monkeypatch.setattr(orders, "_MIN_PIECE", request.param)


# All samples at random


def test_global_order_is_a_permutation():
    for num_samples in (0, 1, 2, 19, 1000):
        order = global_order(num_samples, seed=5, epoch=3)
        assert order.dtype == np.int64 and sorted(order) == list(range(num_samples))


@pytest.mark.parametrize("num_words", [0, 1, 2, 5, 64, 65, 3000])
@pytest.mark.parametrize("num_values", [1, 2, 50, 2**40])
@pytest.mark.parametrize("step", [1, 2**7, 2**24])
def test_equal_words_and_those_with_equal_high_bits_are_sorted(num_words, num_values, step):
    rng = np.random.default_rng(num_words)
    words = rng.integers(0, num_values, num_words, np.uint64) * np.uint64(step) + np.uint64(2**63)
    np.testing.assert_array_equal(orders._places_by_word(words), np.argsort(words, kind="stable"))


def test_global_order_depends_on_seed_and_epoch_only():
    keys = list(product([0, 1, LARGEST], [0, 1, 2, 2**40]))
    found = [global_order(500, seed=seed, epoch=epoch) for seed, epoch in keys]
    assert len({order.tobytes() for order in found}) == len(keys) == 12
    for (seed, epoch), order in zip(keys, found, strict=True):
        np.testing.assert_array_equal(order, global_order(500, seed=seed, epoch=epoch))


def test_global_order_sorts_by_words_of_numpys_stream():
    key, counter = np.array([5, 0], dtype=np.uint64), np.array([0, 3, 0, 0], dtype=np.uint64)
    expected = sorted(range(100), key=np.random.Philox(key=key, counter=counter).random_raw(100).tolist().__getitem__)
    assert global_order(100, seed=5, epoch=3).tolist() == expected


def uniform_orders(kind):
    """Orders of 30 samples, in 2000 epochs."""
    if kind == "global":
        return [global_order(30, seed=9, epoch=epoch) for epoch in range(2000)]
    return [shard_order(ends_of(10, 1, 19), 60, seed=9, epoch=epoch) for epoch in range(2000)]


@pytest.mark.parametrize("kind", ["global", "shards in a buffer of twice the dataset"])
def test_positions_of_a_sample_are_uniform(kind):
    """Mean and variance of the position of each sample, and pairs of neighbors, within five standard errors."""
    found = np.array(uniform_orders(kind))
    positions = np.argsort(found, axis=1)
    assert np.abs(positions.mean(axis=0) - 14.5).max() < 5 * np.sqrt((30**2 - 1) / 12 / 2000)
    assert np.abs(positions.var(axis=0) / ((30**2 - 1) / 12) - 1).max() < 5 * np.sqrt(4 / 5 / 2000)
    assert abs(np.corrcoef(positions[1:].ravel(), positions[:-1].ravel())[0, 1]) < 5 / np.sqrt(positions[1:].size)
    ascending = np.mean(found[:, 1:] == found[:, :-1] + 1) * 30  # a neighbor follows in one of 30 places
    assert abs(ascending - 1) < 5 * np.sqrt(30 / found[:, 1:].size)


def test_unshuffled_order_is_the_datasets_own():
    for epoch in (0, 1, 7):
        plan = Plan(num_samples=19, batch_size=4, seed=5, shuffle=False).epoch(epoch)
        assert plan.indices(np.arange(19)).tolist() == list(range(19))
    positions = np.array([3, 1])
    assert DatasetOrder().indices(positions) is not positions


def test_orders_never_change():
    """A change here changes every saved run."""
    order = [16, 6, 17, 8, 7, 9, 5, 15, 11, 2, 1, 12, 0, 14, 13, 18, 3, 4, 10]
    assert global_order(19, seed=17, epoch=3).tolist() == order
    kept = [0, 2, 1, 3, 6, 4, 8, 5, 9, 7, 11, 12, 13, 14, 15, 18, 17, 16, 10]
    assert shard_order(ends_of(4, 0, 6, 1, 8), 5, seed=17, epoch=3).tolist() == kept


# Shards that stay together


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("ends", DATASETS, ids=str)
def test_shard_order_is_a_permutation(ends):
    for buffer, epoch in product(BUFFERS, [0, 2]):
        order = shard_order(ends, buffer, epoch=epoch)
        assert order.dtype == np.int64 and sorted(order) == list(range(ends[-1])), buffer


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("ends", DATASETS, ids=str)
def test_samples_move_by_less_than_the_buffer(ends):
    places = stream_places(ends)
    for buffer in BUFFERS:
        moved = np.argsort(shard_order(ends, buffer)) - places
        assert np.abs(moved).max() < buffer


def test_buffer_of_one_permutes_shards_only():
    ends = ends_of(0, 7, 1, 12)
    shards = [list(range(*each)) for each in pairwise(ends)]
    seen = set()
    for epoch in range(60):
        order = shard_order(ends, 1, epoch=epoch).tolist()
        first = [order.index(shard[0]) for shard in shards if shard]
        for start, shard in zip(first, filter(None, shards), strict=True):
            assert order[start : start + len(shard)] == shard
        seen.add(tuple(np.argsort(first)))
    assert len(seen) == 6


@pytest.mark.parametrize(("size", "buffer"), [(10, 100), (500, 1000), (1000, 300), (2000, 5000)])
def test_shards_are_in_use_for_their_length_and_the_buffer(size, buffer):
    """Never for more than their length and two buffers, and by chance, six standard deviations, for more than one."""
    ends = ends_of(*[size] * (20_000 // size))
    for epoch in range(3):
        positions = np.argsort(shard_order(ends, buffer, epoch=epoch)).reshape(-1, size)
        spans = positions.max(axis=1) - positions.min(axis=1) + 1
        assert spans.max() < min(size + 2 * buffer, size + buffer + 6 * np.sqrt(buffer / 3))


def test_mixing_is_as_wide_at_the_ends_as_in_the_middle():
    """The first batches are of more than the first shard: of half a buffer, and in the middle of a whole one."""
    ends = ends_of(*[100] * 100)
    labels = np.arange(10_000) // 100
    in_batches = np.zeros((40, 100))
    for epoch in range(40):
        shards = labels[shard_order(ends, 1000, epoch=epoch)].reshape(100, 100)
        in_batches[epoch] = [len(np.unique(batch)) for batch in shards]
    found = in_batches.mean(axis=0)
    assert found[[0, -1]].min() > 5.5
    assert found[20:80].min() > 10 and found[20:80].max() < 12


def test_shard_order_depends_on_seed_and_epoch_only():
    ends, keys = ends_of(100, 30, 70, 200), list(product([0, 1, LARGEST], [0, 1, 2, 2**40]))
    found = [shard_order(ends, 50, seed=seed, epoch=epoch) for seed, epoch in keys]
    assert len({order.tobytes() for order in found}) == len(keys) == 12
    for (seed, epoch), order in zip(keys, found, strict=True):
        np.testing.assert_array_equal(order, shard_order(ends, 50, seed=seed, epoch=epoch))
    assert len({shard_order(ends, buffer).tobytes() for buffer in (1, 49, 50, 51, 800)}) == 5


def plan_of(ends, buffer, **options):
    options = {"batch_size": 6, "seed": 4, **options}
    return Plan(num_samples=int(ends[-1]), shuffle=ShardShuffle(buffer=buffer), shard_ends=ends, **options)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("ends", DATASETS, ids=str)
def test_every_batch_alone_is_as_in_sequence(ends):
    for buffer, last_batch, repeats in product(BUFFERS, ["keep", "pad"], [1, 3]):
        plan = plan_of(ends, buffer, last_batch=last_batch, repeats=repeats)
        epoch = plan.epoch(2)
        for number in range(len(plan)):
            expected, alone = epoch[number], plan.epoch(2)[number]
            np.testing.assert_array_equal(alone.index, expected.index)
            np.testing.assert_array_equal(alone.position, expected.position)


@pytest.mark.usefixtures("piece")
def test_positions_can_be_in_any_order():
    ends = ends_of(30, 1, 0, 69)
    for buffer in BUFFERS:
        order, positions = shard_order(ends, buffer), np.random.default_rng(1).integers(100, size=300)
        mixed = ShardOrder.of(ends, buffer, seed=5, epoch=3).indices(positions)
        np.testing.assert_array_equal(mixed, order[positions])


def test_position_outside_the_epoch_is_an_index_error():
    for position in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=f"position {position} of an epoch of 10 samples"):
            ShardOrder.of(ends_of(4, 6), 3, seed=0, epoch=0).indices(np.array([position]))


def rows_of_ranks(plan, world_size, epoch):
    """Sample and repeat of each row of each batch, of all ranks together."""
    found = []
    ranks = [replace(plan, shard=Shard(rank, world_size), batch_size=12 // world_size) for rank in range(world_size)]
    for number in range(len(ranks[0])):
        batches = [own.epoch(epoch)[number] for own in ranks]
        rows = [np.stack([batch.index, batch.repeat], 1)[batch.valid] for batch in batches]
        found.append(np.concatenate(rows).tolist())
    return found


@pytest.mark.parametrize(("last_batch", "repeats"), [*product(["keep", "pad", "drop"], [1, 3])])
@pytest.mark.parametrize("ends", DATASETS[2:], ids=str)
def test_shard_order_does_not_depend_on_world_size(ends, last_batch, repeats):
    plan = plan_of(ends, 25, last_batch=last_batch, repeats=repeats)
    one, two, four = (rows_of_ranks(plan, world_size, epoch=1) for world_size in (1, 2, 4))
    assert one == two == four and len(one) == len(replace(plan, batch_size=12))
    if last_batch != "drop" and repeats == 1:
        assert sorted(index for batch in one for index, _ in batch) == list(range(ends[-1]))


def test_a_hundred_million_samples_are_not_listed():
    """The array of them would be of 800 MB; a batch in the middle takes the shards and a few buffers."""
    ends = np.arange(0, 100_000_001, 10_000)
    plan = plan_of(ends, 20_000, batch_size=512)
    epoch = plan.epoch(0)
    index = epoch[len(plan) // 2].index
    assert len(np.unique(index)) == 512 and len(np.unique(index // 10_000)) <= 4
    assert epoch[len(plan) - 1].index.max() < 100_000_000
    held = sum(piece.indices.nbytes for piece in epoch.order._pieces.values())
    assert held + epoch.order.stream_ends.nbytes + epoch.order.shifts.nbytes < 2**20


def test_equal_keys_keep_their_order():
    keys = np.random.default_rng(0).integers(50, size=1000).astype(np.float64)
    for each in (keys, np.unique(keys)[::-1], keys[:0]):
        np.testing.assert_array_equal(orders._sorted_by_keys(each), np.argsort(each, kind="stable"))


def test_key_may_be_rounded_to_the_end_of_the_epoch(monkeypatch):
    monkeypatch.setattr(orders, "_MIN_PIECE", 8)
    monkeypatch.setattr(
        ShardOrder, "_keys", lambda self, first, last: np.where(np.arange(first, last) == 15, 16.0, 8.0)
    )
    assert sorted(shard_order(ends_of(16), 16)) == list(range(16))


def test_few_pieces_are_kept(monkeypatch):
    monkeypatch.setattr(orders, "_MIN_PIECE", 8)
    order = ShardOrder.of(ends_of(500, 500), 4, seed=0, epoch=0)
    order.indices(np.arange(1000))
    assert 1 <= len(order._pieces) <= 3


# What a user gives


def test_shuffle_is_read():
    shards = ShardShuffle(buffer=4)
    assert [read_shuffle(each) for each in (True, "global", False, shards)] == [True, True, False, shards]
    for wrong in ("shards", None, 1, {"kind": "shards", "buffer": 4}):
        with pytest.raises(ConfigError, match=r"shuffle must be True .*, False, or ShardShuffle\(buffer=...\)"):
            read_shuffle(wrong)


@pytest.mark.parametrize("buffer", [0, -1])
def test_buffer_is_at_least_one(buffer):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ShardShuffle(buffer=buffer)


def test_source_without_shards_is_refused():
    with pytest.raises(ConfigError, match=r"this source has none.*set shuffle to true"):
        Plan(num_samples=10, batch_size=2, shuffle=ShardShuffle(buffer=4))


@pytest.mark.parametrize("ends", [[0, 4], [1, 10], [0, 6, 5, 10], [], [10], [[0, 10]]])
def test_ends_that_are_not_those_of_the_samples_are_refused(ends):
    with pytest.raises(ConfigError, match=r"shard_ends must be 0 and .* up to its 10 samples, got \["):
        Plan(num_samples=10, batch_size=2, shuffle=ShardShuffle(buffer=4), shard_ends=np.array(ends, dtype=np.int64))


def test_plan_says_whether_it_keeps_shards():
    assert plan_of(ends_of(4, 6), 3).keeps_shards
    assert Plan(num_samples=10, batch_size=2, shuffle=False).keeps_shards
    assert not Plan(num_samples=10, batch_size=2).keeps_shards


def test_fields_tell_orders_apart():
    ends = ends_of(4, 6)
    of_shards = shuffle_fields(ShardShuffle(buffer=4), ends, 10)
    assert of_shards["shuffle"] == "shards mixed over 4 samples" and of_shards["shards"].startswith("2 shards, ")
    assert shuffle_fields(True, ends, 10) == {"shuffle": True, "shards": None}
    different = [
        shuffle_fields(ShardShuffle(buffer=5), ends, 10),
        shuffle_fields(ShardShuffle(buffer=4), ends_of(6, 4), 10),
        shuffle_fields(ShardShuffle(buffer=4), ends_of(4, 0, 6), 10),
    ]
    assert of_shards not in different
    with pytest.raises(ConfigError, match="this source has none"):
        shuffle_fields(ShardShuffle(buffer=4), None, 10)
