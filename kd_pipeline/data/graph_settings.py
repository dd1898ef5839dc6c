"""How a graph is built, and its samples as it takes them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.headers import Orientation

__all__ = ["DecodeMode", "GraphInput", "GraphSettings"]

DecodeMode = Literal["window", "full"]
"""Decode only the window of a file that is needed, or the whole image, which is cropped afterward."""


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """How a graph is built."""

    max_batch: int
    device_id: int | None
    """Ordinal of the GPU, or None for the CPU."""
    num_threads: int
    prefetch: int
    """Batches in DALI's queue, including the one that is taken next."""
    max_pixels: int
    """Larger images are refused by their header."""
    decode: DecodeMode
    """Both give the same pixels on a CPU; windows are faster."""
    hw_decoder_load: float
    """Share of the JPEG images for the GPU's hardware decoder."""
    orientation: Orientation
    """That of the transform."""


@dataclass(frozen=True, slots=True)
class GraphInput:
    """Samples as a graph takes them: one batch of it, or several in a row."""

    index: NDArray[np.int64]
    """`[N]`, positions in the dataset."""
    data: NDArray[Any]
    """`[N, L]` file names, NUL-padded, or `[N, H, W, 3]` pixels; of a source that stores bytes again `index`."""
    crops: tuple[tuple[NDArray[np.float64], ...], ...]
    """`[N, ...]` each, parameters of the crop of each window; see `Views.crops`."""
    parameters: tuple[NDArray[Any], ...]
    """`[N, ...]` each, parameters of all that follows the crops; see `Views.parameters`."""

    def part(self, rows: slice) -> "GraphInput":
        """Some of the samples, as views."""
        crops = tuple(tuple(part[rows] for part in crop) for crop in self.crops)
        return GraphInput(self.index[rows], self.data[rows], crops, tuple(part[rows] for part in self.parameters))
