"""The measure of an order's randomness is 1 for the global shuffle, and known for shards that are not mixed."""

import numpy as np
import pytest

from benchmarks import shuffle
from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.plan import Plan

ENDS = np.arange(0, 4001, 40)


def measured(buffer: int) -> shuffle.Randomness:
    """For 100 shards of 40 samples, a class each, and batches of 20."""
    plan = Plan(num_samples=4000, batch_size=20, shuffle=ShardShuffle(buffer=buffer), shard_ends=ENDS)
    return shuffle.randomness(plan, ENDS, np.arange(4000) // 40)


def test_batches_of_one_shard() -> None:
    found = measured(1)
    assert found.num_shards == 1
    assert found.deviation == pytest.approx(np.sqrt(0.01 * 0.99))  # all of a class, or nothing


def test_uniform_permutation() -> None:
    found = measured(8000)
    assert found.num_shards == pytest.approx(100 * (1 - 0.99**20), rel=0.02)
    assert found.deviation == pytest.approx(np.sqrt(0.01 * 0.99 / 20), rel=0.02)
    assert found.deviation_of_mixed == pytest.approx(found.deviation, rel=0.02)


def test_larger_buffers_are_more_random(capsys: pytest.CaptureFixture[str]) -> None:
    shuffle.main(["--num-samples", "20000", "--num-classes", "50", "--shard-size", "200", "--batch-size", "64"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == [*(f"shards, buffer {buffer:,}" for buffer in shuffle._BUFFERS), "global"]
    num_shards, sorted_, mixed = (np.array([float(row[column]) for row in rows]) for column in (1, 2, 3))
    assert (np.diff(num_shards) >= 0).all() and (np.diff(sorted_[:3]) < 0).all() and rows[-1][2:] == ["1.00", "1.00"]
    assert np.abs(mixed - 1).max() < 0.05
