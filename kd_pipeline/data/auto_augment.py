"""RandAugment and TrivialAugment: one of fourteen ops, of a strength of its own, for every image and layer.

The plan's numbers choose op and strength in NumPy; DALI applies them to uint8 images, each op only to the images that
got it. Every op is torchvision's of the same name up to rounding, with these differences: warped images are
interpolated bilinearly and filled with mid-gray, as timm does it; `sharpness` also sharpens the outermost row of
pixels, which Pillow leaves; `equalize` is OpenCV's formula, about 4 of 255 levels from Pillow's on photographs, and
more where much of an image has its brightest value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings

__all__ = ["OPS", "AutoAugment", "AutoAugmentSettings", "RandAugment", "Ranges", "TrivialAugment", "numbers_of"]

OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""What may happen to an image, equally likely; the list of both papers."""

Array = NDArray[np.float64]
Node = Any
"""A node of a DALI graph."""
Side = Callable[[Node, Node], Node]
"""Images and their numbers to new images."""


class RandAugment(Settings):
    """Some random ops one after the other, all about as strong (Cubuk et al., arXiv 1909.13719).

    Every one is applied, as in the paper; timm leaves out each with probability 0.5.
    """

    kind: Literal["randaugment"] = "randaugment"
    num_ops: int = Field(default=2, ge=1)
    """How many ops an image goes through."""
    magnitude: float = Field(default=9.0, ge=0, le=10)
    """Mean strength on the scale of timm and of the authors' code, 0 to 10; torchvision's goes to 30."""
    magnitude_std: float = Field(default=0.5, ge=0)
    """Standard deviation of the strength, which is cut off at 0 and 10."""

    def ranges(self, size: int) -> "Ranges":
        """As in torchvision, and as timm's variants that grow with the magnitude."""
        return Ranges(shear=0.3, translate=0.45 * size, rotate=30.0, enhance=0.9, posterize=4)

    def strengths(self, draws: Array) -> Array:
        """`[N]` from 0 to 1, out of two uniform numbers each `[N, 2]`."""
        normal: Array = np.sqrt(-2 * np.log1p(-draws[:, 0])) * np.cos(2 * np.pi * draws[:, 1])  # Box and Muller
        return np.clip((self.magnitude + self.magnitude_std * normal) / 10, 0, 1)


class TrivialAugment(Settings):
    """One random op of any strength, in the wide ranges (Müller and Hutter, arXiv 2103.10158)."""

    kind: Literal["trivialaugment"] = "trivialaugment"

    @property
    def num_ops(self) -> int:
        """One."""
        return 1

    def ranges(self, size: int) -> "Ranges":
        """The paper's "wide" ones."""
        return Ranges(shear=0.99, translate=32.0, rotate=135.0, enhance=0.99, posterize=6)

    def strengths(self, draws: Array) -> Array:
        """`[N]` from 0 to 1 in steps of 1/30, out of two uniform numbers each `[N, 2]`."""
        return np.floor(draws[:, 0] * 31) / 30


AutoAugmentSettings = Annotated[RandAugment | TrivialAugment, Field(discriminator="kind")]
"""What a config file may say under `auto_augment`."""


@dataclass(frozen=True)
class Ranges:
    """What the ops do at full strength; solarize starts at 255 and ends at 0, the last three have no strength."""

    shear: float
    """Pixels sideways for each pixel along."""
    translate: float
    """Pixels, cut to whole ones."""
    rotate: float
    """Degrees."""
    enhance: float
    """Distance from 1 of the factor of brightness, color, contrast and sharpness."""
    posterize: int
    """Bits taken from every channel."""


@dataclass(frozen=True)
class AutoAugment:
    """The ops of a policy on uint8 images of `size`."""

    policy: RandAugment | TrivialAugment
    size: int

    @property
    def ndims(self) -> tuple[int, ...]:
        """Dimensions of a sample's part of each parameter."""
        return (0, 1) * self.policy.num_ops

    @property
    def num_draws(self) -> int:
        """How many of a view's uniform numbers are used, from the first on."""
        return _FIRST + _PER_OP * self.policy.num_ops

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """For each of the policy's ops its place in `OPS` `[N]`, and the numbers that it takes `[N, 9]`."""
        found = []
        for first in range(_FIRST, self.num_draws, _PER_OP):
            op = np.floor(draws[:, first] * len(OPS))
            strength = self.policy.strengths(draws[:, first + 1 : first + 3])
            sign = np.where(draws[:, first + 3] < 0.5, -1.0, 1.0)
            found += [op, numbers_of(op, strength, sign, self.policy.ranges(self.size), self.size)]
        return tuple(found)

    def apply(self, images: Node, *parameters: Node) -> Node:
        """Apply the ops one after the other to uint8 images."""
        for op, numbers in zip(parameters[::2], parameters[1::2], strict=True):
            images = _apply((images, op, numbers), _SIDES)
        return images


def numbers_of(op: Array, strength: Array, sign: Array, ranges: Ranges, size: int) -> Array:
    """What the op of each image takes, `[N, 9]`.

    A warp: the matrix from places in the new image to places in the old one, row by row. Brightness and color: the
    factors of both. Contrast: the factor. Sharpness: the filter, row by row. Posterize and solarize: the bits that
    stay, and the threshold. The rest is zero.

    Args:
        op: `[N]`, place in `OPS`.
        strength: `[N]` from 0 to 1.
        sign: `[N]`, -1 or 1, for the ops that go either way.
        ranges: what full strength means.
        size: height and width of the images.
    """
    signed, zero, one = strength * sign, np.zeros_like(strength), np.ones_like(strength)
    shear, shift, factor = ranges.shear * signed, np.trunc(ranges.translate * signed), 1 + ranges.enhance * signed
    angle = np.deg2rad(ranges.rotate * signed)
    cos, sin, center = np.cos(angle), np.sin(angle), size / 2
    bits = 255 - (2.0 ** np.round(ranges.posterize * strength) - 1)
    rows = {
        "shear_x": [one, shear, zero, zero, one, zero],
        "shear_y": [one, zero, zero, shear, one, zero],
        "translate_x": [one, zero, -shift, zero, one, zero],
        "translate_y": [one, zero, zero, zero, one, -shift],
        "rotate": [cos, -sin, center * (1 - cos + sin), sin, cos, center * (1 - sin - cos)],
        "brightness": [factor, one],
        "color": [one, factor],
        "contrast": [factor],
        "sharpness": [(1 - factor) * smooth + factor * same for smooth, same in zip(_SMOOTH, _SAME, strict=True)],
        "posterize": [bits, 256 * one],
        "solarize": [255 * one, 255 * (1 - strength)],
    }
    numbers = np.zeros((len(op), _NUM_NUMBERS))
    for name, columns in rows.items():
        chosen = op == OPS.index(name)
        numbers[chosen, : len(columns)] = np.stack(columns, axis=1)[chosen]
    return numbers


def _apply(nodes: Sequence[Node], sides: Sequence[tuple[str, Side]]) -> Node:
    """Halve images, ops and numbers by op until one side is left; DALI runs each on the images that came there."""
    images, op, numbers = nodes
    if len(sides) == 1:
        return sides[0][1](images, numbers)
    half = len(sides) // 2
    is_low = op < OPS.index(sides[half - 1][0]) + 0.5
    # What DALI makes of an `if`. Written out, as DALI's own translation would have to read all of the library's code.
    conditional = _fn()._conditional
    forks = [conditional.split(node, predicate=is_low, _if_stmt=True) for node in nodes]
    low, high = ([fork[number] for fork in forks] for number in (0, 1))
    return conditional.merge(_apply(low, sides[:half]), _apply(high, sides[half:]), predicate=is_low)


def _identity(images: Node, numbers: Node) -> Node:
    return images


def _warp(images: Node, numbers: Node) -> Node:
    fn = _fn()
    return fn.warp_affine(images, matrix=fn.reshape(numbers[:6], shape=[2, 3]), fill_value=128, inverse_map=True)


def _color(images: Node, numbers: Node) -> Node:
    return _fn().color_twist(images, brightness=numbers[0], saturation=numbers[1])


def _contrast(images: Node, numbers: Node) -> Node:
    """About the mean lightness of the image."""
    fn, types = _fn(), _types()
    mean = fn.reductions.mean(images, axis_names="HW", keep_dims=True)
    center = 0.299 * mean[:, :, 0:1] + 0.587 * mean[:, :, 1:2] + 0.114 * mean[:, :, 2:3]
    return fn.cast(center + (images - center) * numbers[0], dtype=types.UINT8)


def _sharpness(images: Node, numbers: Node) -> Node:
    """Toward Pillow's smoothing filter below a factor of 1, away from it above."""
    fn, types = _fn(), _types()
    kernel = fn.reshape(numbers, shape=[3, 3])
    return fn.filter(images, kernel.gpu() if images.device == "gpu" else kernel, dtype=types.UINT8)


def _posterize_and_solarize(images: Node, numbers: Node) -> Node:
    fn, types = _fn(), _types()
    inverted = fn.cast(images >= numbers[1], dtype=types.UINT8) * types.Constant(255, dtype=types.UINT8)
    return (images & fn.cast(numbers[0], dtype=types.UINT8)) ^ inverted


def _autocontrast(images: Node, numbers: Node) -> Node:
    """Every channel from 0 to 255; one of a single value stays."""
    fn, types = _fn(), _types()
    low = fn.cast(fn.reductions.min(images, axis_names="HW", keep_dims=True), dtype=types.FLOAT)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    is_flat = high <= low
    scale = 255.0 / (high - low + is_flat * 255.0)
    return fn.cast((images - low * (high > low)) * scale, dtype=types.UINT8)


def _equalize(images: Node, numbers: Node) -> Node:
    return _fn().equalize(images)


def _fn() -> Any:
    return require("nvidia.dali.fn", extra="cpu")


def _types() -> Any:
    return require("nvidia.dali.types", extra="cpu")


_SIDES = (
    ("identity", _identity),
    ("rotate", _warp),
    ("color", _color),
    ("contrast", _contrast),
    ("sharpness", _sharpness),
    ("solarize", _posterize_and_solarize),
    ("autocontrast", _autocontrast),
    ("equalize", _equalize),
)
"""In the order of `OPS`: the last of the ops that a function applies, and the function."""

_NUM_NUMBERS = 9
_SMOOTH = [weight / 13 for weight in (1, 1, 1, 1, 5, 1, 1, 1, 1)]
"""Pillow's smoothing filter."""
_SAME = [0, 0, 0, 0, 1, 0, 0, 0, 0]

# Slots of the plan's uniform numbers, after those of `kd_pipeline.data.mixing`; each op has so many: which op, two for
# its strength, and its sign.
_FIRST, _PER_OP = 40, 4
