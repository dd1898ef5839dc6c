"""The order of the samples in an epoch: the dataset's own, a uniform permutation, or one that keeps shards together.

Each is a pure function of (seed, epoch) from which the samples at any positions can be computed directly.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.philox import Stream, stream_words
from kd_pipeline.errors import ConfigError

__all__ = [
    "DatasetOrder",
    "GlobalOrder",
    "Order",
    "ShardOrder",
    "ShardShuffle",
    "Shuffle",
    "check_shards",
    "read_shuffle",
    "shuffle_fields",
]

_MIN_PIECE = 2**14
"""Positions that are computed at once, at least. The order does not depend on it."""
_NUM_PIECES = 3


class ShardShuffle(Settings):
    """Shards in a random order, whose samples are mixed with those of the shards next to them.

    Each shard is read once in an epoch, within about its own length and `buffer` samples, and at any time about
    `buffer` samples of shards are in use, as with a shuffle buffer. Unlike that, the samples at any position are known
    without reading those before.
    """

    kind: Literal["shards"] = "shards"
    buffer: int = Field(ge=1)
    """Samples over which one is mixed: it moves by fewer than so many positions. 1 mixes nothing, and twice the
    dataset's size or more is a uniform permutation."""


Shuffle = bool | Literal["global"] | ShardShuffle
"""`True` and `"global"` are the same uniform permutation; False is the dataset's own order."""


class Order(Protocol):
    """The order of a dataset in one epoch."""

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at `positions` `[n]` of the epoch, `[n]` int64; there must be such positions."""


@dataclass(frozen=True, slots=True)
class DatasetOrder:
    """The dataset's own."""

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions themselves, in a new array."""
        return positions.copy()


@dataclass(frozen=True, slots=True)
class GlobalOrder:
    """A uniform permutation."""

    permutation: NDArray[np.int64]
    """`[num_samples]` indices."""

    @classmethod
    def of(cls, num_samples: int, *, seed: int, epoch: int) -> "GlobalOrder":
        """Indices sorted by one 64-bit random key each, that of index i being word i of the epoch's stream.

        Equal keys keep the dataset's order.
        """
        return cls(_places_by_word(stream_words(0, num_samples, seed=seed, stream=Stream.ORDER, epoch=epoch)))

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order.indices`."""
        return self.permutation[positions]


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    """Position of its first sample."""
    indices: NDArray[np.int64]

    @property
    def stop(self) -> int:
        return self.start + len(self.indices)


@dataclass(frozen=True, slots=True)
class ShardOrder:
    """Shards in random order, one after the other, whose samples are sorted by the place in that sequence plus noise.

    The key of the sample at place p is p + 1/2 + u, with u uniform in [-buffer / 2, buffer / 2) from word p of the
    epoch's stream, and a key beyond an end of the epoch is reflected there. So the keys are as dense at the ends as in
    the middle: of the samples with keys in any interval there are as many as it is long, but for chance. And to sort
    all those with keys in an interval takes only the places less than half a buffer away from it.
    """

    num_samples: int
    buffer: int
    """At most twice `num_samples`, with which keys are uniform."""
    seed: int
    epoch: int
    stream_ends: NDArray[np.int64]
    """`[S]`, the place after the last sample of each shard, in the random order of the shards."""
    shifts: NDArray[np.int64]
    """`[S]`, what to add to a place in a shard for the index in the dataset."""
    _pieces: dict[int, _Piece] = field(default_factory=dict, repr=False, compare=False)
    """Those used last, by number."""

    @classmethod
    def of(cls, shard_ends: NDArray[np.int64], buffer: int, *, seed: int, epoch: int) -> "ShardOrder":
        """Permute the shards that end at `shard_ends` `[S + 1]`, of which the first is 0."""
        num_samples, sizes = int(shard_ends[-1]), np.diff(shard_ends)
        words = stream_words(0, len(sizes), seed=seed, stream=Stream.SHARDS, epoch=epoch)
        shards = np.argsort(words, kind="stable")
        stream_ends = np.cumsum(sizes[shards])
        shifts = shard_ends[1:][shards] - stream_ends
        return cls(num_samples, max(1, min(buffer, 2 * num_samples)), seed, epoch, stream_ends, shifts)

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order.indices`. It takes O(buffer log buffer) for each stretch of so many positions."""
        outside = positions[(positions < 0) | (positions >= self.num_samples)]
        if len(outside):
            raise IndexError(f"position {outside[0]} of an epoch of {self.num_samples} samples")
        found = np.empty_like(positions)
        is_missing = np.ones(len(positions), np.bool_)
        while is_missing.any():
            piece = self._piece_at(int(positions[is_missing.argmax()]))
            rows = is_missing & (positions >= piece.start) & (positions < piece.stop)
            found[rows] = piece.indices[positions[rows] - piece.start]
            is_missing &= ~rows
        return found

    @property
    def _reach(self) -> int:
        """How far a key may be from its place, rounded up."""
        return math.ceil(self.buffer / 2)

    @property
    def _piece_size(self) -> int:
        """The length of a piece's interval of keys.

        The number of keys below a place differs from it by the reach at most. So if pieces are not shorter than that, a
        position is in the piece of its own interval, or in one next to it.
        """
        return max(self._reach, _MIN_PIECE)

    def _piece_at(self, position: int) -> _Piece:
        number = position // self._piece_size
        piece = self._piece(number)
        if position < piece.start:
            piece = self._piece(number - 1)
        elif position >= piece.stop:
            piece = self._piece(number + 1)
        assert piece.start <= position < piece.stop
        return piece

    def _piece(self, number: int) -> _Piece:
        piece = self._pieces.get(number)
        if piece is None:
            piece = self._sorted_piece(number)
            while len(self._pieces) >= _NUM_PIECES:
                self._pieces.pop(next(iter(self._pieces)), None)
            self._pieces[number] = piece
        return piece

    def _sorted_piece(self, number: int) -> _Piece:
        """The samples with keys from `number` to `number + 1` times the size of a piece."""
        low, high = number * self._piece_size, (number + 1) * self._piece_size
        first, last = max(low - self._reach, 0), min(high + self._reach, self.num_samples)
        keys = self._keys(first, last)
        is_before = keys < low
        is_in = ~is_before & (keys < high)
        indices = self._unmixed(first, last)[is_in][_sorted_by_keys(keys[is_in])]
        return _Piece(first + int(is_before.sum()), indices)

    def _unmixed(self, first: int, last: int) -> NDArray[np.int64]:
        """The samples at places `first` to `last - 1`."""
        first_shard, last_shard = np.searchsorted(self.stream_ends, [first, last - 1], side="right").tolist()
        shards = slice(first_shard, last_shard + 1)
        counts = np.diff(np.minimum(self.stream_ends[shards], last), prepend=first)
        return np.arange(first, last) + np.repeat(self.shifts[shards], counts)

    def _keys(self, first: int, last: int) -> NDArray[np.float64]:
        """Those of places `first` to `last - 1`. Single operations in float64 are the same on any processor."""
        words = stream_words(first, last - first, seed=self.seed, stream=Stream.MIXING_OF_SHARDS, epoch=self.epoch)
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        keys = np.abs(np.arange(first, last) + 0.5 + (uniform - 0.5) * self.buffer)
        reflected: NDArray[np.float64] = self.num_samples - np.abs(self.num_samples - keys)
        return reflected


def read_shuffle(value: object) -> bool | ShardShuffle:
    """The shuffle that a user gives, with True for `"global"`.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool | ShardShuffle):
        return value
    if value == "global":
        return True
    raise ConfigError(
        f'shuffle must be True (or "global"), False, or ShardShuffle(buffer=...) to keep shards together, got {value!r}'
    )


def check_shards(shard_ends: NDArray[np.int64] | None, num_samples: int) -> NDArray[np.int64]:
    """The ends of the shards, which a shuffle of shards needs.

    Raises:
        ConfigError: there are none, or they are not those of `num_samples` samples.
    """
    if shard_ends is None:
        raise ConfigError(
            "shuffle is to keep shards together, and this source has none, as its samples are not in tar or Parquet "
            "files; set shuffle to true for a uniform order"
        )
    ends = np.asarray(shard_ends, dtype=np.int64)
    if ends.ndim != 1 or not len(ends) or ends[0] != 0 or ends[-1] != num_samples or (np.diff(ends) < 0).any():
        raise ConfigError(
            f"the source's shard_ends must be 0 and the end of each shard, up to its {num_samples} samples, got "
            f"{np.array2string(ends, threshold=6, edgeitems=2)}; correct them, or set shuffle to true"
        )
    return ends


def shuffle_fields(
    shuffle: bool | ShardShuffle, shard_ends: NDArray[np.int64] | None, num_samples: int
) -> dict[str, bool | str | None]:
    """What the order depends on besides the seed, in words for people: `shuffle` and `shards`, None if of no effect.

    Raises:
        ConfigError: as `check_shards`.
    """
    if isinstance(shuffle, bool):
        return {"shuffle": shuffle, "shards": None}
    ends = check_shards(shard_ends, num_samples)
    digest = hashlib.sha256(ends.astype("<i8").tobytes()).hexdigest()
    return {
        "shuffle": f"shards mixed over {shuffle.buffer} samples",
        "shards": f"{len(ends) - 1} shards, {digest[:12]} as the digest of their sizes",
    }


def _places_by_word(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The places of `words` `[n]` in ascending order of the words, equal ones in their own.

    A place takes the low bits of its word, and these numbers are sorted: that is two to three times as fast as
    to sort places by words, and takes half of the memory. What then is in doubt are the few words with equal high bits.
    """
    low = np.uint64((1 << (len(words) - 1).bit_length()) - 1)
    packed = words & ~low
    packed |= np.arange(len(words), dtype=np.uint64)
    packed.sort()
    (doubtful,) = np.nonzero((packed[1:] ^ packed[:-1]) <= low)
    packed &= low
    places = packed.view(np.int64)
    if len(doubtful):
        rows = np.union1d(doubtful, doubtful + 1)
        own = places[rows]
        places[rows] = own[np.argsort(words[own], kind="stable")]
    return places


def _sorted_by_keys(keys: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places of `keys` in ascending order; equal ones, which are rare, keep theirs."""
    order = np.argsort(keys)  # four times as fast as a stable sort
    found = keys[order]
    return np.argsort(keys, kind="stable") if (found[1:] == found[:-1]).any() else order
