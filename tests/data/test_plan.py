"""Order and random numbers are pure functions of (seed, epoch, index), on every rank and in every batch."""

from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest

from kd_pipeline.data.plan import Plan, Shard, uniforms
from kd_pipeline.errors import ConfigError

LARGEST = 2**64 - 1


def ranks_of(plan):
    """The plan of each rank."""
    return [replace(plan, shard=Shard(rank, plan.shard.world_size)) for rank in range(plan.shard.world_size)]


def read(plan, epoch=0):
    """For each batch, the `BatchPlan` of every rank."""
    epochs = [own.epoch(epoch) for own in ranks_of(plan)]
    return [[own[number] for own in epochs] for number in range(len(plan))]


def order_of(plan, epoch):
    """The samples of all ranks."""
    return plan.epoch(epoch).indices(np.arange(plan.num_samples))


# The random numbers of a sample


def test_uniforms_dtype_and_range():
    numbers = uniforms(np.arange(5000), seed=3, epoch=0, count=35)
    assert numbers.shape == (5000, 35) and numbers.dtype == np.float32
    assert 0 <= numbers.min() < 1e-4 and 1 - 1e-4 < numbers.max() < 1


def test_uniforms_do_not_depend_on_batch():
    alone = [uniforms(np.array([index]), seed=3, epoch=2, count=35)[0] for index in range(50)]
    shuffled = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(uniforms(shuffled, seed=3, epoch=2, count=35), np.stack(alone)[shuffled])
    twice = uniforms(np.array([7, 7]), seed=3, epoch=2, count=35)
    np.testing.assert_array_equal(twice[0], twice[1])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 23, 35])
def test_uniforms_do_not_depend_on_count(count):
    index = np.array([0, 5, 2**40])
    all_of_them = uniforms(index, seed=3, epoch=1, count=64)
    np.testing.assert_array_equal(uniforms(index, seed=3, epoch=1, count=count), all_of_them[:, :count])


def test_uniforms_of_no_samples():
    assert uniforms(np.zeros(0, dtype=np.int64), seed=0, epoch=0, count=5).shape == (0, 5)


def test_uniforms_differ_by_seed_epoch_and_index():
    arguments = [
        dict(index=np.array([index]), seed=seed, epoch=epoch)
        for index, seed, epoch in product([0, 1, 2**33], [0, 1, LARGEST], [0, 1, 2**33])
    ]
    rows = {uniforms(**each, count=8).tobytes() for each in arguments}
    assert len(rows) == len(arguments) == 27


def test_uniforms_are_uniform_and_independent():
    """Bounds are five standard errors of 20 000 truly uniform numbers; seeds are fixed."""
    size, bound = 20_000, 5 / np.sqrt(20_000)
    index = np.arange(size)
    now, later = (uniforms(index, seed=11, epoch=epoch, count=35).astype(np.float64) for epoch in (0, 1))
    other_seed = uniforms(index, seed=12, epoch=0, count=35)
    assert np.abs(now.mean(axis=0) - 1 / 2).max() < bound * np.sqrt(1 / 12)
    assert np.abs(now.var(axis=0) - 1 / 12).max() < bound * np.sqrt(1 / 180)
    slots = np.corrcoef(now.T)
    assert np.abs(slots - np.eye(35)).max() < bound
    for other in (later, other_seed, np.roll(now, 1, axis=0)):
        across = [np.corrcoef(now[:, slot], other[:, slot])[0, 1] for slot in range(35)]
        assert np.abs(across).max() < bound
    in_tenths = np.stack([np.bincount((10 * column).astype(int), minlength=10) for column in now.T])
    assert np.abs(in_tenths / size - 0.1).max() < bound * np.sqrt(0.09)


def test_uniforms_never_change():
    """A change here changes every saved run."""
    numbers = [
        [4382263, 10518564, 3604622, 10694932, 6475413, 4129233, 7240277, 1771165, 6572128, 8841713],
        [15420875, 1432546, 8946160, 6204746, 2968701, 9933810, 9916087, 2344807, 12193572, 3862554],
        [7181043, 13559656, 9003515, 164023, 6329312, 10335061, 5663047, 1297152, 12120837, 3511525],
    ]
    given = uniforms(np.array([0, 1, 41]), seed=17, epoch=3, count=10)
    np.testing.assert_array_equal(given * 2**24, numbers)


# The batches of a rank


def every_plan(*policies):
    for world_size, batch_size, last_batch in product([1, 2, 3, 4], [1, 7, 64], policies):
        for num_samples in sorted({1, max(world_size - 1, 1), world_size, world_size + 1, 19, 101}):
            yield Plan(
                num_samples=num_samples,
                batch_size=batch_size,
                seed=2,
                shard=Shard(0, world_size),
                last_batch=last_batch,
            )


def test_ranks_have_equally_many_nonempty_batches():
    for plan in every_plan("keep", "pad", "drop"):
        for own in ranks_of(plan):
            epoch = own.epoch(0)
            assert len(epoch) == len(own) == len(plan)
            for number in range(len(epoch)):
                batch = epoch[number]
                assert len(batch.index) == len(batch.valid) and 1 <= len(batch.index) <= plan.batch_size
                assert batch.index.dtype == np.int64 and batch.valid.dtype == np.bool_


@pytest.mark.parametrize("policy", ["keep", "pad"])
def test_ranks_read_every_sample_once(policy):
    for plan in every_plan(policy):
        seen = [batch.index[batch.valid] for ranks in read(plan, epoch=1) for batch in ranks]
        assert sorted(np.concatenate(seen)) == list(range(plan.num_samples)), plan


def test_drop_keeps_all_full_batches():
    for plan in every_plan("drop"):
        batches = read(plan)
        assert len(batches) == plan.num_samples // plan.global_batch_size
        assert all(len(batch.index) == plan.batch_size and batch.valid.all() for ranks in batches for batch in ranks)
        seen = [index for ranks in batches for batch in ranks for index in batch.index]
        assert len(set(seen)) == len(seen) == len(batches) * plan.global_batch_size


def test_pad_fills_batches_with_invalid_rows():
    for plan in every_plan("pad"):
        order = order_of(plan, 0)
        batches = read(plan)
        assert all(len(batch.index) == plan.batch_size for ranks in batches for batch in ranks)
        index = np.concatenate([batch.index for ranks in batches for batch in ranks])
        valid = np.concatenate([batch.valid for ranks in batches for batch in ranks])
        assert valid[: plan.num_samples].all() and not valid[plan.num_samples :].any()
        np.testing.assert_array_equal(index, np.resize(order, len(index)))


def test_keep_splits_last_samples_evenly():
    for plan in every_plan("keep"):
        *full, last = read(plan)
        assert all(len(batch.index) == plan.batch_size and batch.valid.all() for ranks in full for batch in ranks)
        counts = [int(batch.valid.sum()) for batch in last]
        assert max(counts) - min(counts) <= 1
        for batch, count in zip(last, counts, strict=True):
            assert batch.valid.all() if count else (len(batch.index) == 1 and not batch.valid.any())


@pytest.mark.parametrize("policy", ["keep", "pad", "drop"])
@pytest.mark.parametrize("num_samples", [11, 12, 19, 101])
def test_order_does_not_depend_on_world_size(policy, num_samples):
    """12 images in a global batch: as 1 x 12, 2 x 6, 3 x 4, 4 x 3 and 12 x 1."""
    streams = []
    for world_size in (1, 2, 3, 4, 12):
        shard = Shard(0, world_size)
        plan = Plan(num_samples=num_samples, batch_size=12 // world_size, seed=4, shard=shard, last_batch=policy)
        batches = read(plan, epoch=5)
        streams.append([np.concatenate([b.index[b.valid] for b in ranks]).tolist() for ranks in batches])
    assert all(stream == streams[0] for stream in streams)
    if policy != "drop":
        assert list(chain(*streams[0])) == order_of(plan, 5).tolist()


def test_batches_can_be_read_in_any_order():
    epoch = Plan(num_samples=19, batch_size=4).epoch(2)
    forwards = [epoch[number].index.tolist() for number in range(5)]
    again = Plan(num_samples=19, batch_size=4).epoch(2)
    assert [again[number].index.tolist() for number in reversed(range(5))] == forwards[::-1]


@pytest.mark.parametrize("number", [-1, 5])
def test_batch_outside_the_epoch_is_an_index_error(number):
    with pytest.raises(IndexError, match=f"batch {number} of an epoch of 5 batches"):
        Plan(num_samples=19, batch_size=4).epoch(0)[number]


def test_unshuffled_batches():
    plan = Plan(num_samples=10, batch_size=4, shuffle=False)
    assert [batch.index.tolist() for (batch,) in read(plan)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# Repeats


def samples_and_repeats(plan, epoch):
    """(sample, repeat) of every valid row of all ranks, in the epoch's order."""
    rows = [
        np.stack([batch.index, batch.repeat], 1)[batch.valid] for ranks in read(plan, epoch=epoch) for batch in ranks
    ]
    return [tuple(row) for row in np.concatenate(rows).tolist()]


def repeating(repeats, **options):
    return Plan(**{"num_samples": 101, "batch_size": 8, "seed": 6, "repeats": repeats, **options})


@pytest.mark.parametrize("repeats", [2, 3, 4, 101])
def test_repeats_follow_each_other(repeats):
    plan = repeating(repeats)
    plain = order_of(Plan(num_samples=101, batch_size=8, seed=6), 4).tolist()
    expected = [(index, repeat) for index in plain for repeat in range(repeats)][:101]
    assert samples_and_repeats(plan, 4) == expected
    assert order_of(plan, 4).tolist() == [index for index, _ in expected]


def test_more_repeats_than_samples():
    assert len(set(order_of(repeating(7, num_samples=5), 0).tolist())) == 1


@pytest.mark.parametrize("policy", ["keep", "pad", "drop"])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeats_do_not_change_batch_sizes(policy, repeats):
    for plan in every_plan(policy):
        for plain, own in zip(ranks_of(plan), ranks_of(replace(plan, repeats=repeats)), strict=True):
            before, after = plain.epoch(1), own.epoch(1)
            assert len(before) == len(after)
            for number in range(len(after)):
                assert before[number].valid.tolist() == after[number].valid.tolist()
                assert len(after[number].index) == len(after[number].repeat) == len(after[number].valid)


@pytest.mark.parametrize("policy", ["keep", "pad", "drop"])
@pytest.mark.parametrize("num_samples", [12, 19, 101])
def test_repeats_do_not_depend_on_world_size(policy, num_samples):
    """12 images in a global batch: as 1 x 12, 2 x 6, 3 x 4, 4 x 3 and 12 x 1."""
    streams = []
    for world_size in (1, 2, 3, 4, 12):
        shard = Shard(0, world_size)
        plan = repeating(3, num_samples=num_samples, batch_size=12 // world_size, shard=shard, last_batch=policy)
        streams.append(samples_and_repeats(plan, 5))
    assert all(stream == streams[0] for stream in streams) and len(streams[0]) >= num_samples - 11


def test_padding_includes_repeats():
    plan = repeating(3, num_samples=10, batch_size=8, last_batch="pad")
    first, last = plan.epoch(2)[0], plan.epoch(2)[1]
    assert last.valid.tolist() == [True] * 2 + [False] * 6
    assert last.index[2:].tolist() == first.index[:6].tolist()
    assert last.repeat.tolist() == [2, 0, 0, 1, 2, 0, 1, 2] and first.repeat.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_repeat_is_zero_without_repeats():
    for plan in every_plan("keep", "pad", "drop"):
        assert not any(batch.repeat.any() for ranks in read(plan) for batch in ranks)


def test_repeats_choose_samples_uniformly():
    """A third of 30 samples in each of 2000 epochs, within five standard errors of the sampling."""
    plan = repeating(3, num_samples=30)
    chosen = np.concatenate([np.unique(order_of(plan, epoch)) for epoch in range(2000)])
    counts = np.bincount(chosen, minlength=30)
    assert counts.sum() == 20_000 and np.abs(counts / 2000 - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 2000)


def test_each_repeat_has_its_own_uniforms():
    index, repeat = np.array([4, 4, 4, 9, 9]), np.array([0, 1, 2, 0, 1])
    views = uniforms(index, seed=3, epoch=2, count=35, repeat=repeat)
    plain = uniforms(index, seed=3, epoch=2, count=35)
    np.testing.assert_array_equal(views[repeat == 0], plain[repeat == 0])
    assert len({view.tobytes() for view in views}) == 5
    alone = [uniforms(index[[row]], seed=3, epoch=2, count=35, repeat=repeat[[row]])[0] for row in range(5)]
    np.testing.assert_array_equal(views, alone)


def test_uniforms_of_repeats_are_independent():
    """Within five standard errors of 20 000 truly uniform numbers."""
    index = np.arange(20_000)
    views = [uniforms(index, seed=11, epoch=0, count=9, repeat=np.full(20_000, repeat)) for repeat in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        across = np.corrcoef(views[one].T, views[other].T)[:9, 9:]
        assert np.abs(across).max() < 5 / np.sqrt(20_000)


# Errors


def test_repeats_without_shuffling_are_refused():
    with pytest.raises(ConfigError, match=r"repeats must be 1 without shuffling, got 3.*set shuffle"):
        repeating(3, shuffle=False)
    assert len(repeating(1, shuffle=False)) == 13


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_rank_outside_the_world_is_refused(rank, world_size):
    with pytest.raises(ConfigError, match=f"rank {rank} of {world_size}"):
        Shard(rank, world_size)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", -3), ("seed", -1), ("seed", 2**64), ("last_batch", "wrap"), ("repeats", 0)],
)
def test_wrong_values_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be .*got '?{value}"):
        Plan(**{"num_samples": 10, "batch_size": 4, name: value})


def test_largest_seed_is_accepted():
    assert len(Plan(num_samples=10, batch_size=4, seed=LARGEST).epoch(0)[0].index) == 4
