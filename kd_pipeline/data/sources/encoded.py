"""Encoded images as bytes: what sources of bytes give for samples, and their fingerprint."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.fingerprint import label_digest, sampling_step

if TYPE_CHECKING:
    from kd_pipeline.data.sources.base import Source

__all__ = ["Encoded", "as_encoded", "fingerprint_of_bytes"]

_MEASURED, _BLOCK = 16, 64
"""Samples whose size says how large all are, and samples that are read at once, for a fingerprint."""

Encoded = list[NDArray[np.uint8] | UnreadableFileError]
"""Encoded images as bytes, `[L]` each; an error in place of one says why the sample has none."""


def as_encoded(content: bytes | bytearray | memoryview) -> NDArray[np.uint8]:
    """`content` as an array, without a copy."""
    return np.frombuffer(content, np.uint8)


def fingerprint_of_bytes(source: "Source") -> str:
    """The `Source.fingerprint` of a source of bytes that does not know their sizes before it has read them."""
    digest = label_digest(source.labels, source.classes)
    digest.update(len(source).to_bytes(8, "little"))
    measured = np.unique(np.linspace(0, len(source) - 1, _MEASURED).astype(np.int64))
    sizes = [len(image) for image in source.read(measured) if not isinstance(image, UnreadableFileError)]
    step = sampling_step(len(source) * sum(sizes) // max(1, len(sizes)))
    sampled = np.arange(0, len(source), step)
    for start in range(0, len(sampled), _BLOCK):
        for image in source.read(sampled[start : start + _BLOCK]):
            is_missing = isinstance(image, UnreadableFileError)
            digest.update((-1 if is_missing else len(image)).to_bytes(8, "little", signed=True))
            digest.update(b"" if is_missing else image.data)
    return digest.hexdigest()
