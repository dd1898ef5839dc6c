"""The order of samples and their random numbers, as pure functions of (seed, epoch, index, repeat).

No generator has a state here, so any rank can compute any batch of any epoch directly, whatever was read before.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.order import DatasetOrder, GlobalOrder, Order, ShardOrder, ShardShuffle, check_shards
from kd_pipeline.data.philox import Stream, named_key, philox, stream_key
from kd_pipeline.errors import ConfigError

__all__ = ["BatchPlan", "EpochPlan", "LastBatch", "Plan", "Shard", "check_whole", "uniforms"]

LastBatch = Literal["drop", "keep", "pad"]
"""What happens to the samples that do not fill a batch on every rank.

`drop` leaves them out of this epoch; `keep` makes a smaller last batch of them; `pad` fills the last batch with samples
from the start of the epoch, marked `valid=False`.
"""


def check_whole(name: str, value: object, low: int | None = None) -> None:
    """Refuse what is no whole number, of at least `low`; 1.5 or True would select other samples without an error.

    Raises:
        ConfigError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} must be a whole number, got {value!r:.60}")
    if low is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of every global batch that this process reads: that of `rank` out of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_whole("shard: world_size", self.world_size)
        check_whole("shard: rank", self.rank)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"shard: rank must be in 0..world_size-1, got rank {self.rank} of {self.world_size}")


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The samples of one batch on one rank."""

    index: NDArray[np.int64]
    """`[N]`, positions in the dataset."""
    valid: NDArray[np.bool_]
    """`[N]`, False for padding."""
    repeat: NDArray[np.int64]
    """`[N]`, earlier occurrences of the sample in the epoch, 0 to `repeats - 1`; each one is a different view."""
    position: NDArray[np.int64]
    """`[N]`, positions in the epoch's order, which all ranks share; with the epoch they identify a view."""

    def part(self, rows: slice) -> "BatchPlan":
        """Some of the samples, as views."""
        return BatchPlan(self.index[rows], self.valid[rows], self.repeat[rows], self.position[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The batches of one rank in every epoch.

    A global batch is `batch_size * world_size` consecutive positions of the epoch's order, and rank r takes the r-th
    `batch_size` of them. The order over all ranks is therefore the same for any world size, and every rank has the same
    number of batches.

    With `repeats`, each sample occurs that many times in a row, each time as a different view (Hoffer et al., "Augment
    your batch", arXiv 1901.09335). The length of an epoch does not change: it uses only the first `1 / repeats` of its
    shuffled samples, and may cut off the repeats of the last one. timm's `RepeatAugSampler` does the same, but rounds
    the length down to a multiple of 256.

    Raises:
        ConfigError: a value is out of range.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool | ShardShuffle = True
    """True for a uniform permutation."""
    shard_ends: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    """`[S + 1]`, 0 and the end of each shard of the dataset, in its order; only `ShardShuffle` needs them."""
    shard: Shard = Shard()
    last_batch: LastBatch = "keep"
    repeats: int = 1

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("seed", self.seed, 0)
        if int(self.seed) >= 2**64:
            raise ConfigError(f"seed must be in 0..2**64-1, got {self.seed}")
        if self.last_batch not in get_args(LastBatch):
            raise ConfigError(f"last_batch must be one of {get_args(LastBatch)}, got {self.last_batch!r}")
        check_whole("repeats", self.repeats, 1)
        if self.repeats > 1 and not self.shuffle:
            raise ConfigError(
                f"repeats must be 1 without shuffling, got {self.repeats}: every epoch would show the same part of the "
                "dataset; set shuffle to true"
            )
        if isinstance(self.shuffle, ShardShuffle):
            check_shards(self.shard_ends, self.num_samples)

    @property
    def global_batch_size(self) -> int:
        """Images in a batch, summed over all ranks."""
        return self.batch_size * self.shard.world_size

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank; 0 if `drop` leaves none."""
        num_full, rest = divmod(self.num_samples, self.global_batch_size)
        return num_full + (1 if rest and self.last_batch != "drop" else 0)

    @property
    def keeps_shards(self) -> bool:
        """Whether the samples of a shard are near each other in every epoch."""
        return self.shuffle is not True

    def num_batches(self, epoch: int) -> int:
        """Batches in `epoch`; a plan of some of the positions may have more in one epoch than in another."""
        return len(self)

    def epoch(self, epoch: int) -> "EpochPlan":
        """The batches of one epoch. Keep it for the whole epoch, because the order is computed here."""
        return EpochPlan(self, self._order(epoch))

    def _order(self, epoch: int) -> Order:
        if isinstance(self.shuffle, ShardShuffle):
            assert self.shard_ends is not None  # as was checked
            return ShardOrder.of(self.shard_ends, self.shuffle.buffer, seed=self.seed, epoch=epoch)
        return GlobalOrder.of(self.num_samples, seed=self.seed, epoch=epoch) if self.shuffle else DatasetOrder()


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """The batches of one epoch on one rank, as a sequence."""

    plan: Plan
    order: Order
    """That of the samples, each once."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> BatchPlan:
        """Batch `number` of this rank; never empty."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of an epoch of {len(self)} batches")
        return self.batches(number, number + 1)[0]

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at `positions` `[n]` of all ranks' epoch, in which each occurs `repeats` times in a row."""
        return self.order.indices(positions // self.plan.repeats)

    def batches(self, start: int, stop: int) -> tuple[BatchPlan, list[int]]:
        """Batches `start` to `stop - 1` of this rank, one after the other, and the number of samples in each."""
        plan, size = self.plan, self.plan.global_batch_size
        num_full = min(max(plan.num_samples // size, start), stop)
        own = plan.shard.rank * plan.batch_size + np.arange(plan.batch_size)
        positions = (np.arange(start, num_full)[:, None] * size + own).ravel()
        valid, sizes = np.ones(len(positions), np.bool_), [plan.batch_size] * (num_full - start)
        if num_full < stop:
            last, last_valid = self._last()
            positions, valid = np.concatenate([positions, last]), np.concatenate([valid, last_valid])
            sizes.append(len(last))
        return BatchPlan(self.indices(positions), valid, positions % plan.repeats, positions), sizes

    def _last(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions of the samples that do not fill a batch on every rank, and False for padding."""
        plan, shard, size = self.plan, self.plan.shard, self.plan.global_batch_size
        positions = np.arange(plan.num_samples // size * size, plan.num_samples)
        if plan.last_batch == "keep":
            # The r-th of nearly equal parts; a rank that would get nothing gets one row of padding.
            ends = [len(positions) * rank // shard.world_size for rank in (shard.rank, shard.rank + 1)]
            part = positions[slice(*ends)]
            return (part, np.ones(len(part), np.bool_)) if len(part) else (positions[:1], np.zeros(1, np.bool_))
        own = slice(shard.rank * plan.batch_size, (shard.rank + 1) * plan.batch_size)
        padded = np.concatenate([positions, np.arange(size - len(positions)) % plan.num_samples])
        return padded[own], (np.arange(size) < len(positions))[own]


def uniforms(
    index: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    count: int,
    repeat: NDArray[np.int64] | Literal[0] = 0,
    view: str | None = None,
    copy: int = 0,
) -> NDArray[np.float32]:
    """`count` random numbers in [0, 1) per sample of `index` `[N]`, `[N, count]` float32, whatever the batch and rank.

    Number j of a sample does not depend on `count`: it is 24 bits of half-word j of the Philox blocks with the counter
    (block, epoch, index, repeat). For `repeat` `[N]` see `BatchPlan`. A `view` with a name has a key of its own, and
    its copies are `2**32` repeats apart.
    """
    num_blocks = -(-count // 8)
    block = np.arange(num_blocks, dtype=np.uint64)[:, None]
    last = np.array(repeat, dtype=np.uint64) + np.uint64(copy << 32)
    counter = (block, np.array(epoch, dtype=np.uint64), index.astype(np.uint64), last)
    key = stream_key(seed, Stream.VIEW) if view is None else named_key(seed, view)
    words = philox(key, counter).transpose(1, 0, 2)
    halves = words.astype("<u8", order="C").view("<u4").reshape(len(index), num_blocks * 8)
    return (halves[:, :count] >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
