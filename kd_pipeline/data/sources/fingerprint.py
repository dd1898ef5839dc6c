"""The parts of `Source.fingerprint` that files and arrays share."""

import hashlib
import json
import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["content_digest", "drop_pages", "label_digest", "pieces", "sampling_step"]

_SAMPLED_BYTES = 64 * 2**20
_BLOCK = 2**18
_PIECE = 2**21
"""Elements of an array, 16 MB of 64-bit integers."""


def content_digest(file: BinaryIO, max_bytes: int) -> "_Hash":
    """A SHA-256 over the file, or over its first `max_bytes`: a file that grows would be read forever."""
    digest, left = hashlib.sha256(), max_bytes
    while left and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    return digest


def label_digest(labels: NDArray[np.int64] | None, classes: tuple[str, ...] | None) -> "_Hash":
    """A SHA-256 over labels `[N]` and class names, for the source to update with its samples."""
    digest = hashlib.sha256(json.dumps(["kd_pipeline source 1", classes, labels is not None]).encode())
    if labels is not None:
        for piece in pieces(labels):
            digest.update(piece.astype("<i8").data)
    return digest


def pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The parts `[n]` of an array `[N]` one after the other, of which few are in memory if the array is mapped."""
    for start in range(0, len(array), _PIECE):
        yield array[start : start + _PIECE]
        drop_pages(array)


def drop_pages(array: NDArray[Any]) -> None:
    """Let the system take back the memory of an array that is mapped from a file, and read it again when it is used.

    Pages that were looked at count as memory of the process, though all of a machine share them.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def sampling_step(num_bytes: int) -> int:
    """The k of "every k-th sample": ceil(num_bytes / 64 MiB), at least 1."""
    return max(1, -(-num_bytes // _SAMPLED_BYTES))
