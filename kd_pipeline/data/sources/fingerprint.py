"""The parts of `Source.fingerprint` that files and arrays share."""

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["label_digest", "sampling_step"]

_SAMPLED_BYTES = 64 * 2**20


def label_digest(labels: NDArray[np.int64] | None, classes: tuple[str, ...] | None) -> "_Hash":
    """A SHA-256 over labels `[N]` and class names, for the source to update with its samples."""
    digest = hashlib.sha256(json.dumps(["kd_pipeline source 1", classes, labels is not None]).encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest


def sampling_step(num_bytes: int) -> int:
    """The k of "every k-th sample": ceil(num_bytes / 64 MiB), at least 1."""
    return max(1, -(-num_bytes // _SAMPLED_BYTES))
