"""Random words as pure functions of a seed and a counter, the same as NumPy's own Philox gives."""

from collections.abc import Sequence
from enum import IntEnum
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stream", "named_key", "philox", "stream_key", "stream_words"]


class Stream(IntEnum):
    """The second word of the key, which separates what the words are for."""

    ORDER = 0
    VIEW = 1
    SHARDS = 2
    MIXING_OF_SHARDS = 3


_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_NUM_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def stream_key(seed: int, stream: Stream) -> NDArray[np.uint64]:
    """The key of the words of `stream`, `[2]` uint64."""
    return np.array([seed, stream], dtype=np.uint64)


def named_key(seed: int, name: str) -> NDArray[np.uint64]:
    """The key of words that belong to a name, `[2]` uint64; names that differ have keys that differ."""
    return np.array([seed, int.from_bytes(sha256(name.encode()).digest()[:8], "little")], dtype=np.uint64)


def stream_words(start: int, count: int, *, seed: int, stream: Stream, epoch: int) -> NDArray[np.uint64]:
    """Words `start` to `start + count - 1` of NumPy's own Philox stream for (seed, epoch), `[count]` uint64.

    NumPy guarantees that raw words of a bit generator never change between releases, but not those of its `Generator`.
    """
    # The first word of the counter advances with every four words, so the epoch is in the second.
    block, skipped = divmod(start, 4)
    counter = np.array([block, epoch, 0, 0], dtype=np.uint64)
    generator = np.random.Philox(key=stream_key(seed, stream), counter=counter)
    words: NDArray[np.uint64] = generator.random_raw(skipped + count)[skipped:]
    return words


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
