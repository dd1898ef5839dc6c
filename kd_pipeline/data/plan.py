"""The order of samples and their random numbers, as pure functions of (seed, epoch, index, repeat).

No generator has a state here, so any rank can compute any batch of any epoch directly, whatever was read before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kd_pipeline.errors import ConfigError

__all__ = ["BatchPlan", "EpochPlan", "LastBatch", "Plan", "Shard", "epoch_order", "philox", "uniforms"]

LastBatch = Literal["drop", "keep", "pad"]
"""What happens to the samples that do not fill a batch on every rank.

`drop` leaves them out of this epoch; `keep` makes a smaller last batch of them; `pad` fills the last batch with samples
from the start of the epoch, marked `valid=False`.
"""

_ORDER, _VIEW = 0, 1
"""The second word of the key, which separates the streams for order and views."""

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_NUM_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of every global batch that this process reads: that of `rank` out of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
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
    shuffle: bool = True
    shard: Shard = Shard()
    last_batch: LastBatch = "keep"
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be in 0..2**64-1, got {self.seed}")
        if self.last_batch not in get_args(LastBatch):
            raise ConfigError(f"last_batch must be one of {get_args(LastBatch)}, got {self.last_batch!r}")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}")
        if self.repeats > 1 and not self.shuffle:
            raise ConfigError(
                f"repeats must be 1 without shuffling, got {self.repeats}: every epoch would show the same part of the "
                "dataset; set shuffle to true"
            )

    @property
    def global_batch_size(self) -> int:
        """Images in a batch, summed over all ranks."""
        return self.batch_size * self.shard.world_size

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank; 0 if `drop` leaves none."""
        num_full, rest = divmod(self.num_samples, self.global_batch_size)
        return num_full + (1 if rest and self.last_batch != "drop" else 0)

    def epoch(self, epoch: int) -> "EpochPlan":
        """The batches of one epoch. Keep it for the whole epoch, because the order is computed here."""
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        if self.repeats > 1:
            order = np.repeat(order[: -(-self.num_samples // self.repeats)], self.repeats)[: self.num_samples]
        return EpochPlan(self, order)


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """The batches of one epoch on one rank, as a sequence."""

    plan: Plan
    order: NDArray[np.int64]
    """`[num_samples]` indices of all ranks: each sample once, or some of them `repeats` times in a row."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> BatchPlan:
        """Batch `number` of this rank; never empty."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of an epoch of {len(self)} batches")
        return self.batches(number, number + 1)[0]

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
        return BatchPlan(self.order[positions], valid, positions % plan.repeats, positions), sizes

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


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """The order of the dataset's indices in one epoch, `[num_samples]` int64.

    If shuffled, indices are sorted by one 64-bit random key each: the key of index i is word i of NumPy's own Philox
    stream for (seed, epoch). NumPy guarantees that raw words of a bit generator never change between releases, but not
    `Generator.permutation`. Equal keys keep the dataset's order.
    """
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    # The first word of the counter advances with every four words, so the epoch is in the second.
    stream = np.random.Philox(key=_key(seed, _ORDER), counter=np.array([0, epoch, 0, 0], dtype=np.uint64))
    # Flipping the highest bit gives signed numbers in the same order, which torch sorts several times as fast.
    keys = (stream.random_raw(num_samples) ^ np.uint64(2**63)).view(np.int64)
    order: NDArray[np.int64] = torch.argsort(torch.from_numpy(keys), stable=True).numpy()
    return order


def uniforms(
    index: NDArray[np.int64], *, seed: int, epoch: int, count: int, repeat: NDArray[np.int64] | Literal[0] = 0
) -> NDArray[np.float32]:
    """`count` random numbers in [0, 1) per sample of `index` `[N]`, `[N, count]` float32, whatever the batch and rank.

    Number j of a sample does not depend on `count`: it is 24 bits of half-word j of the Philox blocks with the counter
    (block, epoch, index, repeat). For `repeat` `[N]` see `BatchPlan`.
    """
    num_blocks = -(-count // 8)
    block = np.arange(num_blocks, dtype=np.uint64)[:, None]
    counter = (block, np.array(epoch, dtype=np.uint64), index.astype(np.uint64), np.array(repeat, dtype=np.uint64))
    words = philox(_key(seed, _VIEW), counter).transpose(1, 0, 2)
    halves = words.astype("<u8", order="C").view("<u4").reshape(len(index), num_blocks * 8)
    return (halves[:, :count] >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def philox(key: NDArray[np.uint64], counter: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Philox4x64-10 for many counters at once (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Each row equals `np.random.Philox(key=key, counter=counter).random_raw(4)`, so one is added to the counter before
    the first block, as in NumPy.

    Args:
        key: `[2]` uint64.
        counter: its four words, least significant first, uint64 with shapes that broadcast to `[...]`. A word that many
            counters share should not be expanded, to let the first rounds process it once.

    Returns:
        `[..., 4]` uint64.
    """
    words = _increment(counter)
    key0, key1 = int(key[0]), int(key[1])
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], words[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ np.uint64(key0), low1, high0 ^ words[3] ^ np.uint64(key1), low0]
        key0 = (key0 + _KEY_STEPS[0]) & 0xFFFFFFFFFFFFFFFF
        key1 = (key1 + _KEY_STEPS[1]) & 0xFFFFFFFFFFFFFFFF
    return np.stack(words, axis=-1)


def _key(seed: int, stream: int) -> NDArray[np.uint64]:
    return np.array([seed, stream], dtype=np.uint64)


def _increment(counter: Sequence[NDArray[np.uint64]]) -> list[NDArray[np.uint64]]:
    """The four words of counter + 1, with carry, as NumPy's 256-bit counter."""
    words = []
    carry = np.ones(1, dtype=np.uint64)
    for word in counter:
        if carry.any():  # otherwise the word keeps its shape
            word = word + carry
        carry = (word < carry).astype(np.uint64)
        words.append(word)
    return words


def _multiply(constant: int, word: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """High and low 64 bits of `constant * word` from four 32-bit products, because NumPy has no 128-bit integers."""
    constant_high, constant_low = np.uint64(constant >> 32), np.uint64(constant & 0xFFFFFFFF)
    word_high, word_low = word >> _HALF, word & _LOW
    low = constant_low * word_low
    middle = constant_high * word_low + (low >> _HALF)
    other = constant_low * word_high + (middle & _LOW)
    high = constant_high * word_high + (middle >> _HALF) + (other >> _HALF)
    return high, np.uint64(constant) * word
