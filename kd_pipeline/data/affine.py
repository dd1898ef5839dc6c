"""Random affine maps: rotation, translation, scale and shear at once, with numbers of their own."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kd_pipeline._core.ranges import Probability, Range
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.auto_augment import Array, Node, warp, warp_factors

__all__ = ["AffineSettings", "RandomAffine"]


class AffineSettings(Settings):
    """What torchvision's `RandomAffine` draws, around the center of the image."""

    rotate: float = Field(default=0.0, ge=0, le=180)
    """Degrees, in either direction: the angle is uniform in [-rotate, rotate]."""
    translate: float = Field(default=0.0, ge=0, le=1)
    """Fraction of height and width by which the image moves up or down and left or right, uniform."""
    scale: Range = (1.0, 1.0)
    """The factor is uniform in this range; 2 shows everything twice as large."""
    shear: float = Field(default=0.0, ge=0, lt=90)
    """Degrees, parallel to the rows and in either direction."""
    probability: Probability = 1.0
    """Share of the images that are moved."""

    @model_validator(mode="after")
    def _moves_something(self) -> "AffineSettings":
        if not (self.rotate or self.translate or self.shear or self.scale != (1.0, 1.0)):
            raise ValueError("affine moves nothing; set rotate, translate, scale or shear, or leave affine out")
        return self


@dataclass(frozen=True)
class RandomAffine:
    """An affine map of uint8 images of height and width `size`, around the center.

    It is torchvision's of the same name, interpolated bilinearly and with translations that are not rounded to pixels.
    What comes in from outside is mid-gray (128).
    """

    settings: AffineSettings
    size: tuple[int, int]
    columns: slice
    """Its numbers among those of the view, counted from the last."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Of images that are so many times as high and wide as `size`, in which the same pixels move."""

    key: ClassVar[str] = "affine"
    """The name of its random numbers."""
    num_columns: ClassVar[int] = 6
    """Random numbers for each image: whether it is moved, angle, translation in y and x, scale, shear."""
    ndims: ClassVar[tuple[int, ...]] = (1,)
    """Dimensions per sample of each array that `apply` takes."""

    def at_scale(self, scale: tuple[float, float]) -> "RandomAffine":
        """The same op of images that are `scale` times as high and wide."""
        return replace(self, scale=scale)

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """The matrix from coordinates (x, y) of the result's pixels to those of the input, row by row, `[N, 6]`."""
        chosen, settings = draws[:, self.columns], self.settings
        signed = 2 * chosen - 1
        angle, shear = np.deg2rad(settings.rotate * signed[:, 1]), np.tan(np.deg2rad(settings.shear * signed[:, 5]))
        low, high = settings.scale
        factor = low + (high - low) * chosen[:, 4]
        cos, sin = np.cos(angle) / factor, np.sin(angle) / factor
        # The inverse of scale * rotation * shear; torchvision shears against the direction of x.
        linear = np.stack([cos - shear * sin, sin + shear * cos, -sin, cos], axis=1).reshape(-1, 2, 2)
        size = np.array(self.size, np.float64)[::-1]
        moved = size * settings.translate * signed[:, [3, 2]]
        offset = size / 2 - (linear @ (size / 2 + moved)[:, :, None])[:, :, 0]
        matrix = np.concatenate([linear, offset[:, :, None]], axis=2).reshape(-1, 6)
        if self.scale != (1, 1):
            matrix = matrix * warp_factors(self.scale)
        is_moved = chosen[:, :1] < settings.probability
        return (np.where(is_moved, matrix, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),)

    def warps(self, matrix: NDArray[Any]) -> list[tuple[Array, NDArray[np.bool_]]]:
        """Where it takes the pixels from, given what `parameters` returns: see `AutoAugment.warps`."""
        is_moved = (matrix != np.array([1, 0, 0, 0, 1, 0], matrix.dtype)).any(axis=1)
        return [(matrix.reshape(-1, 2, 3), is_moved)]

    def apply(self, images: Node, matrix: Node) -> Node:
        """Move the pixels of uint8 images."""
        return warp(images, matrix)
