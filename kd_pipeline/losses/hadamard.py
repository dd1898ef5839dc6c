"""Hadamard matrices: of 1 and -1, with orthogonal rows."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["hadamard"]


@lru_cache(maxsize=8)
def hadamard(size: int) -> NDArray[np.int8] | None:
    """`[size, size]` int8, read-only; None for a size without a construction that is known here.

    Sylvester's for powers of two, Paley's two for one more than a prime q = 3 mod 4 and twice as much for q = 1 mod 4,
    and Kronecker products of these. They cover the widths of common networks: 192, 384, 768, 1024, 1152, 1280, 1408,
    1536, 2048. Every other size of a Hadamard matrix is a multiple of 4.
    """
    matrix = _construct(size)
    if matrix is not None:
        matrix.flags.writeable = False
    return matrix


def _construct(size: int) -> NDArray[np.int8] | None:
    if size == 1:
        return np.ones((1, 1), np.int8)
    if size == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    if size % 4:
        return None
    if _is_prime(size - 1):  # = 3 mod 4
        return _paley_1(size - 1)
    if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        return _paley_2(size // 2 - 1)
    for factor in range(2, size // 2 + 1):
        if size % factor == 0 and (left := hadamard(factor)) is not None:
            right = hadamard(size // factor)
            if right is not None:
                return np.kron(left, right)
    return None


def _paley_1(prime: int) -> NDArray[np.int8]:
    """Of `prime` + 1: I + S, where S, skew-symmetric, has the Jacobsthal matrix bordered by 1 and -1."""
    matrix = np.ones((prime + 1, prime + 1), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _jacobsthal(prime) + np.eye(prime, dtype=np.int8)
    return matrix


def _paley_2(prime: int) -> NDArray[np.int8]:
    """Of 2 · (`prime` + 1): C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], where C, symmetric, has the Jacobsthal
    matrix bordered by 1."""
    conference = np.ones((prime + 1, prime + 1), np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(prime)
    signs, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    matrix: NDArray[np.int8] = np.kron(conference, signs) + np.kron(np.eye(prime + 1, dtype=np.int8), diagonal)
    return matrix


def _jacobsthal(prime: int) -> NDArray[np.int8]:
    """`[prime, prime]`: 1 where row - column is a square modulo `prime`, -1 where it is not, and 0 on the diagonal."""
    numbers = np.arange(prime)
    kind = np.full(prime, -1, np.int8)
    kind[numbers * numbers % prime] = 1
    kind[0] = 0
    jacobsthal: NDArray[np.int8] = kind[(numbers[:, None] - numbers) % prime]
    return jacobsthal


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
