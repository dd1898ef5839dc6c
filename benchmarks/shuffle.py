"""How random an order that keeps shards together is, beside a uniform permutation: no images are read.

    python -m benchmarks.shuffle
    python -m benchmarks.shuffle --shard-size 5000 --batch-size 1024

Two datasets are shuffled: in one the samples are sorted by class before they are split into shards, which is the worst
case, and in the other they are in random order, as when a dataset is written to shards with care.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.tables import markdown_table
from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.plan import Plan

_BUFFERS = (1, 1_000, 10_000, 100_000, 1_000_000)
_SEED = 0


class Randomness(NamedTuple):
    """What the batches of an epoch are like."""

    num_shards: float
    """Shards that a batch has samples of, on average."""
    deviation: float
    """Standard deviation of a class's share of a batch, of all classes and batches."""
    deviation_of_mixed: float
    """The same if the samples are in random order in the dataset already."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table with one row for each buffer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=1_281_167, help="of the dataset; defaults to ImageNet's")
    parser.add_argument("--num-classes", type=int, default=1_000, help="of equal size, but for a sample")
    parser.add_argument("--shard-size", type=int, default=1_000, help="samples of a shard")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    options = parser.parse_args(arguments)
    labels = np.arange(options.num_samples) * options.num_classes // options.num_samples
    ends = np.append(np.arange(0, options.num_samples, options.shard_size), options.num_samples)
    plan = Plan(num_samples=options.num_samples, batch_size=options.batch_size, seed=_SEED, last_batch="drop")
    whole = randomness(plan, ends, labels)
    rows = []
    for buffer in _BUFFERS:
        own = randomness(
            Plan(
                num_samples=options.num_samples,
                batch_size=options.batch_size,
                seed=_SEED,
                shuffle=ShardShuffle(buffer=buffer),
                shard_ends=ends,
                last_batch="drop",
            ),
            ends,
            labels,
        )
        rows.append([f"shards, buffer {buffer:,}", *_cells(own, whole)])
    rows.append(["global", *_cells(whole, whole)])
    header = ["shuffle", "shards in a batch", "spread of a class, sorted", "spread of a class, mixed"]
    print(
        f"{options.num_samples:,} samples of {options.num_classes:,} classes in {len(ends) - 1:,} shards, batches of "
        f"{options.batch_size:,}; the spread is the standard deviation of a class's share of a batch, as a multiple of "
        f"that of the global shuffle\n\n{markdown_table(header, rows)}"
    )


def randomness(plan: Plan, shard_ends: NDArray[np.int64], labels: NDArray[np.int64]) -> Randomness:
    """Measure the first epoch of `plan`, without its last, smaller batch.

    Args:
        plan: of one process.
        shard_ends: `[S + 1]`, of the dataset.
        labels: `[N]`, sorted, from 0.
    """
    size = len(plan) * plan.batch_size
    index = plan.epoch(0).indices(np.arange(size)).reshape(len(plan), plan.batch_size)
    shards = np.searchsorted(shard_ends, index, side="right") - 1
    is_in_batch = _counts(shards, len(shard_ends) - 1) > 0
    mixed = np.random.default_rng(_SEED).permutation(labels)
    return Randomness(float(is_in_batch.sum(axis=1).mean()), _deviation(labels[index]), _deviation(mixed[index]))


def _deviation(labels: NDArray[np.int64]) -> float:
    """Of the share of a class in a batch, for labels `[B, n]` of batches."""
    shares = _counts(labels, int(labels.max()) + 1) / labels.shape[1]
    return float(np.sqrt(((shares - shares.mean(axis=0)) ** 2).mean()))


def _counts(values: NDArray[np.int64], num_values: int) -> NDArray[np.int64]:
    """How often each value is in each row, `[rows, num_values]`."""
    flat = values + np.arange(len(values))[:, None] * num_values
    return np.bincount(flat.ravel(), minlength=len(values) * num_values).reshape(len(values), num_values)


def _cells(own: Randomness, whole: Randomness) -> list[str]:
    ratios = own.deviation / whole.deviation, own.deviation_of_mixed / whole.deviation_of_mixed
    return [f"{own.num_shards:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]


if __name__ == "__main__":
    main()
