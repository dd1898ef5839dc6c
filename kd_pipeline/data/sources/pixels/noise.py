"""Random pixels as a dataset: to measure a pipeline without any data, or to distil from noise."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.philox import named_key
from kd_pipeline.data.sources.labels import shown_samples
from kd_pipeline.data.sources.masks.masks import Masks
from kd_pipeline.data.sources.pixels.arrays import MAX_PIXELS
from kd_pipeline.errors import DataError

__all__ = ["Noise"]


class Noise:
    """Images of independent uniform pixels, which are pure functions of (seed, index) and take no memory.

    Args:
        num_images: how many.
        size: height and width in pixels.
        num_classes: each image gets a random label below it; None for no labels.
        classes: names in label order.
        seed: of pixels and labels.

    Raises:
        DataError: there are no images, or they are empty or too large.
    """

    stores: Literal["files", "bytes", "pixels"] = "pixels"
    masks: Masks | None = None
    warnings: tuple[str, ...] = ()

    def __init__(
        self,
        num_images: int,
        size: tuple[int, int],
        *,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        height, width = size
        if num_images < 1 or height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise DataError(
                f"noise: {num_images} images of {height} x {width} pixels; there must be at least one image, and each "
                f"has 1 to {MAX_PIXELS:,} pixels"
            )
        self._num_images, self._size, self._seed = num_images, (height, width), seed
        self.num_classes, self.classes = num_classes, None if classes is None else tuple(classes)
        self.labels: NDArray[np.int64] | None = None
        if num_classes is not None:
            words = np.random.Philox(key=named_key(seed, "labels of noise")).random_raw(num_images)
            self.labels = (words % np.uint64(num_classes)).astype(np.int64)

    def __len__(self) -> int:
        return self._num_images

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images at `indices` `[n]`, `[n, H, W, 3]`."""
        key, shape = named_key(self._seed, "pixels of noise"), (*self._size, 3)
        num_bytes = int(np.prod(shape))
        images = np.empty((len(indices), num_bytes), np.uint8)
        for row, index in enumerate(indices):
            # Each image has a counter of its own, so it does not depend on those before it.
            words = np.random.Philox(key=key, counter=[0, int(index), 0, 0]).random_raw(-(-num_bytes // 8))
            images[row] = words.astype("<u8").view(np.uint8)[:num_bytes]
        return images.reshape(len(indices), *shape)

    def name(self, index: int) -> str:
        """The position, such as `noise[17]`."""
        return f"noise[{index}]"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that the images and labels depend on."""
        facts = json.dumps(["noise", self._num_images, self._size, self.num_classes, self.classes, self._seed])
        return hashlib.sha256(facts.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_samples('images', self)})"
