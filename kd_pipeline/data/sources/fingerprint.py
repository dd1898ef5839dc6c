"""The parts of `Source.fingerprint` that files and arrays share."""

import hashlib
import json
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["content_digest", "label_digest", "sampling_step"]

_SAMPLED_BYTES = 64 * 2**20
_BLOCK = 2**18


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
        for start in range(0, len(labels), _BLOCK):  # as a copy of all could be a gigabyte
            digest.update(labels[start : start + _BLOCK].astype("<i8").tobytes())
    return digest


def sampling_step(num_bytes: int) -> int:
    """The k of "every k-th sample": ceil(num_bytes / 64 MiB), at least 1."""
    return max(1, -(-num_bytes // _SAMPLED_BYTES))
