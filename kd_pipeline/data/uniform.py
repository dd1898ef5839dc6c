"""Which finished images are a single color: a decoder that fails silently often returns black or gray."""

import logging

import torch
from torch import Tensor

__all__ = ["UniformCounter", "is_uniform"]

_logger = logging.getLogger("kd_pipeline")

_MANY = 0.01
"""Share of an epoch's images above which those of a single color are reported."""
_STRIDES = 64, 8, 1
"""On a CPU every 64th pixel in both directions is looked at first, and more of the images where these are equal."""


def is_uniform(images: Tensor) -> Tensor:
    """`[N]` bool, whether all pixels of an image `[N, C, H, W]` have the same color, without waiting for the device.

    NaN pixels never count as equal.
    """
    first = images[:, :, :1, :1]
    if images.device.type != "cpu":
        return (images == first).flatten(1).all(1)
    uniform = (images[:, :, :: _STRIDES[0], :: _STRIDES[0]] == first).flatten(1).all(1)
    for row in uniform.nonzero().flatten().tolist():
        image, color = images[row], first[row]
        uniform[row] = all(bool((image[:, ::step, ::step] == color).all()) for step in _STRIDES[1:])
    return uniform


class UniformCounter:
    """Counts images of a single color, batch by batch, without waiting for the device until it is asked."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._has_reported = False

    def restart(self) -> None:
        """Count from zero."""
        self._counts = None

    def add(self, uniform: Tensor, valid: Tensor) -> None:
        """Count those of a batch that are `uniform` `[N]`, and those that are `valid` `[N]`."""
        counts = torch.stack([uniform & valid, valid]).sum(1)
        self._counts = counts if self._counts is None else self._counts + counts

    def read(self) -> tuple[int, int]:
        """How many images were of a single color, and how many were counted; waits for the device."""
        if self._counts is None:
            return 0, 0
        num_uniform, num_images = self._counts.tolist()
        return num_uniform, num_images

    def report(self, epoch: int) -> None:
        """Warn about many images of a single color in `epoch`, the first time."""
        if self._has_reported:
            return
        num_uniform, num_images = self.read()
        if num_uniform > _MANY * num_images:
            self._has_reported = True
            _logger.warning(
                "%d of %d images of epoch %d had a single color after the transform: crops of a plain background, or "
                "files that are decoded wrongly; kd-pipeline check names the files that have a single color as a whole",
                *(num_uniform, num_images, epoch),
            )
