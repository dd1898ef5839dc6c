"""Random words are those of NumPy's own Philox, from any word on."""

from itertools import product

import numpy as np
import pytest

from kd_pipeline.data.philox import Stream, philox, stream_words

LARGEST = 2**64 - 1


def numpy_words(key, counter):
    return np.random.Philox(key=key, counter=counter).random_raw(4)


def words(*rows):
    return np.array(rows, dtype=np.uint64)


def test_philox_equals_numpy():
    rng = np.random.default_rng(1)
    for _ in range(20):
        key = rng.integers(0, LARGEST, size=2, dtype=np.uint64, endpoint=True)
        counters = rng.integers(0, LARGEST, size=(10, 4), dtype=np.uint64, endpoint=True)
        np.testing.assert_array_equal(philox(key, counters.T), [numpy_words(key, counter) for counter in counters])


@pytest.mark.parametrize("key", [(0, 0), (1, LARGEST), (LARGEST, 1), (LARGEST, LARGEST)])
def test_philox_equals_numpy_for_every_carry(key):
    counters = words(*product([0, 1, LARGEST - 1, LARGEST], repeat=4))
    expected = [numpy_words(words(key)[0], counter) for counter in counters]
    np.testing.assert_array_equal(philox(words(key)[0], counters.T), expected)


def test_philox_broadcasts_counter_words():
    low, high = words([0, 1, LARGEST]).T, words([5, LARGEST])
    shared = (low, words(LARGEST), high, words(3))
    counters = np.stack(np.broadcast_arrays(*shared), axis=-1)
    expected = [[numpy_words(words(7, 8), counter) for counter in row] for row in counters]
    np.testing.assert_array_equal(philox(words(7, 8), shared), expected)


def test_philox_known_answer():
    """First line for philox4x64-10 in `kat_vectors` of Random123; NumPy adds one to the counter first."""
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox(words([0, 0])[0], words([LARGEST] * 4).T).tolist() == [known]


@pytest.mark.parametrize(("seed", "epoch"), [(5, 0), (LARGEST, 3), (0, 2**63)])
def test_words_start_anywhere(seed, epoch):
    stream = np.random.Philox(key=words([seed, 3])[0], counter=words([0, epoch, 0, 0])[0])
    expected = stream.random_raw(40)
    for start, count in product(range(9), [0, 1, 5, 30]):
        part = stream_words(start, count, seed=seed, stream=Stream.MIXING_OF_SHARDS, epoch=epoch)
        np.testing.assert_array_equal(part, expected[start : start + count])
