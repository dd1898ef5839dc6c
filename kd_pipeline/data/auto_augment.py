"""RandAugment and TrivialAugment: each image gets random ops of random strength out of fourteen.

Op and strength are computed in NumPy from the plan's uniform numbers. DALI applies them to uint8 images, each op only
to the images that drew it. Every op equals torchvision's of the same name up to rounding, with three differences:
warped images are interpolated bilinearly and filled with mid-gray (128), where torchvision takes the nearest pixel and
black, and timm's training transform bilinear or bicubic and the mean color; `sharpness` also sharpens the outermost
pixels, which Pillow leaves unchanged; `equalize` uses OpenCV's formula, about 4 of 255 levels from Pillow's on
photographs, and more if a large part of the image has its maximum value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings

__all__ = [
    "OPS",
    "AutoAugment",
    "AutoAugmentSettings",
    "RandAugment",
    "Ranges",
    "TrivialAugment",
    "op_arguments",
    "warp",
    "warp_factors",
]

OPS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""The ops of both papers and of torchvision, all with the same probability. timm's RandAugment has `Invert` and
`SolarizeAdd` instead of `identity`."""

Array = NDArray[np.float64]
"""Draws and parameters, in double precision because NumPy releases differ in when they promote float32."""
Node = Any
"""A node of a DALI graph."""
_Branch = Callable[[Node, Node], Node]
"""From images and arguments to new images."""


class RandAugment(Settings):
    """A sequence of random ops, all of about the same strength (Cubuk et al., arXiv 1909.13719).

    Every op is applied, as in the paper; timm skips each with probability 0.5.
    """

    kind: Literal["randaugment"] = "randaugment"
    num_ops: int = Field(default=2, ge=1)
    """Ops per image."""
    magnitude: float = Field(default=9.0, ge=0, le=10)
    """Mean strength from 0 to 10, as in timm and in the authors' code; torchvision's scale ends at 30."""
    magnitude_std: float = Field(default=0.5, ge=0)
    """Standard deviation of the strength, which is clipped to 0 and 10."""

    def ranges(self, size: tuple[int, int]) -> "Ranges":
        """Those of torchvision, but for translations: 0.45 of the size as in timm, torchvision has 150 / 331 = 0.453.

        Every op grows with the magnitude, as in timm's "increasing" variants. `posterize` is torchvision's: magnitude 9
        leaves 4 bits, where timm's `PosterizeIncreasing` leaves 1.
        """
        return Ranges(shear=0.3, translate=(0.45 * size[0], 0.45 * size[1]), rotate=30.0, enhance=0.9, posterize=4)

    def strengths(self, draws: Array) -> Array:
        """`[N]` from 0 to 1, from two uniform numbers each, `[N, 2]`."""
        normal: Array = np.sqrt(-2 * np.log1p(-draws[:, 0])) * np.cos(2 * np.pi * draws[:, 1])  # Box and Muller
        return np.clip((self.magnitude + self.magnitude_std * normal) / 10, 0, 1)


class TrivialAugment(Settings):
    """One random op of any strength, in the wide ranges (Müller and Hutter, arXiv 2103.10158)."""

    kind: Literal["trivialaugment"] = "trivialaugment"

    num_ops: ClassVar[int] = 1

    def ranges(self, size: tuple[int, int]) -> "Ranges":
        """The paper's "wide" search space."""
        return Ranges(shear=0.99, translate=(32.0, 32.0), rotate=135.0, enhance=0.99, posterize=6)

    def strengths(self, draws: Array) -> Array:
        """`[N]` from 0 to 1 in steps of 1/30, from the first of two uniform numbers each, `[N, 2]`."""
        return np.floor(draws[:, 0] * 31) / 30


AutoAugmentSettings = Annotated[RandAugment | TrivialAugment, Field(discriminator="kind")]
"""What a config may have under `auto_augment`."""


@dataclass(frozen=True)
class Ranges:
    """What the ops do at full strength; solarize goes from 255 to 0, autocontrast and equalize have no strength."""

    shear: float
    """Horizontal pixels per vertical pixel, or the reverse."""
    translate: tuple[float, float]
    """Pixels up or down, and left or right, truncated to integers."""
    rotate: float
    """Degrees."""
    enhance: float
    """Distance of the factor of brightness, color, contrast and sharpness from 1."""
    posterize: int
    """Bits removed from each channel."""


@dataclass(frozen=True)
class AutoAugment:
    """The ops of a policy on uint8 images of height and width `size`."""

    policy: RandAugment | TrivialAugment
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    """Of images that are so many times as high and wide as `size`, to which warps move the same pixels."""

    def at_scale(self, scale: tuple[float, float]) -> "AutoAugment":
        """The same ops of images that are `scale` times as high and wide."""
        return replace(self, scale=scale)

    @property
    def ndims(self) -> tuple[int, ...]:
        """Dimensions per sample of each array that `apply` takes."""
        return (0, 1) * self.policy.num_ops

    @property
    def num_draws(self) -> int:
        """Uniform numbers that a view needs, those of all other ops included."""
        return _FIRST_SLOT + _SLOTS_PER_OP * self.policy.num_ops

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """For each of the policy's ops its position in `OPS` `[N]` and its arguments `[N, 9]`."""
        parameters = []
        for slot in range(_FIRST_SLOT, self.num_draws, _SLOTS_PER_OP):
            op = np.floor(draws[:, slot] * len(OPS))
            strength = self.policy.strengths(draws[:, slot + 1 : slot + 3])
            sign = np.where(draws[:, slot + 3] < 0.5, -1.0, 1.0)
            arguments = op_arguments(op, strength, sign, self.policy.ranges(self.size), self.size)
            if self.scale != (1, 1):
                _scale_warps(op, arguments, self.scale)
            parameters += [op, arguments]
        return tuple(parameters)

    def with_own_colors(self, draws: Array, own: Array | None) -> Array:
        """`draws` `[N, num_draws]` with the ops that change colors drawn again from `own`, or left out if it is None.

        Ops that move pixels stay. Each of the others has the same probability as before.
        """
        merged = draws.copy()
        for slot in range(_FIRST_SLOT, self.num_draws, _SLOTS_PER_OP):
            rows = ~_is_warp(np.floor(draws[:, slot] * len(OPS)))
            if own is None:
                merged[rows, slot] = 0  # identity
                continue
            merged[rows, slot : slot + _SLOTS_PER_OP] = own[rows, slot : slot + _SLOTS_PER_OP]
            still = _OPS_OF_COLOR[np.floor(own[rows, slot] * len(_OPS_OF_COLOR)).astype(np.int64)]
            merged[rows, slot] = (still + 0.5) / len(OPS)
        return merged

    def warps(self, *parameters: NDArray[Any]) -> list[tuple[Array, NDArray[np.bool_]]]:
        """Where each of the policy's ops takes the pixels from, given what `parameters` returns.

        Returns:
            The matrix from the coordinates (x, y) of pixels of its result to those of its input, `[N, 2, 3]`, and the
            rows `[N]` in which it moves pixels; in the others the matrix changes nothing.
        """
        found = []
        for op, arguments in zip(parameters[::2], parameters[1::2], strict=True):
            is_warp = _is_warp(op)
            matrix = np.where(is_warp[:, None], arguments[:, :6], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).reshape(-1, 2, 3)
            found.append((matrix, is_warp))
        return found

    def apply(self, images: Node, *parameters: Node) -> Node:
        """Apply the ops one after the other to uint8 images."""
        for op, arguments in zip(parameters[::2], parameters[1::2], strict=True):
            images = _dispatch((images, op, arguments), _BRANCHES)
        return images


def op_arguments(op: Array, strength: Array, sign: Array, ranges: Ranges, size: tuple[int, int]) -> Array:
    """Arguments of the op of each image, `[N, 9]`, padded with zeros.

    A warp has the 2x3 matrix from output to input coordinates, row by row; brightness and color the factors of both;
    contrast its factor; sharpness its 3x3 filter; posterize and solarize the mask of the bits to keep and the
    threshold.

    Args:
        op: `[N]`, positions in `OPS`.
        strength: `[N]` from 0 to 1.
        sign: `[N]`, -1 or 1, the direction of ops that have one.
        ranges: what full strength means.
        size: height and width of the images in pixels.
    """
    signed, zero, one = strength * sign, np.zeros_like(strength), np.ones_like(strength)
    shear, factor = ranges.shear * signed, 1 + ranges.enhance * signed
    shift_y, shift_x = (np.trunc(limit * signed) for limit in ranges.translate)
    angle = np.deg2rad(ranges.rotate * signed)
    cos, sin, center_y, center_x = np.cos(angle), np.sin(angle), size[0] / 2, size[1] / 2
    bits = 255 - (2.0 ** np.round(ranges.posterize * strength) - 1)
    rows = {
        "shear_x": [one, shear, zero, zero, one, zero],
        "shear_y": [one, zero, zero, shear, one, zero],
        "translate_x": [one, zero, -shift_x, zero, one, zero],
        "translate_y": [one, zero, zero, zero, one, -shift_y],
        # Around the center. For a square the last summands are 0, so its other numbers keep their last bits.
        "rotate": [
            *(cos, -sin, center_x * (1 - cos + sin) + (center_y - center_x) * sin),
            *(sin, cos, center_y * (1 - sin - cos) + (center_y - center_x) * sin),
        ],
        "brightness": [factor, one],
        "color": [one, factor],
        "contrast": [factor],
        "sharpness": [(1 - factor) * smooth + factor * same for smooth, same in zip(_SMOOTH, _UNCHANGED, strict=True)],
        "posterize": [bits, 256 * one],
        "solarize": [255 * one, 255 * (1 - strength)],
    }
    arguments = np.zeros((len(op), len(_SMOOTH)))
    for name, columns in rows.items():
        chosen = op == OPS.index(name)
        arguments[chosen, : len(columns)] = np.stack(columns, axis=1)[chosen]
    return arguments


def warp_factors(scale: tuple[float, float]) -> list[float]:
    """What the six numbers of a warp are multiplied by to do the same to images `scale` times as high and wide."""
    ratio = scale[1] / scale[0]
    # From output to input coordinates (x, y): into those of the original, through its matrix, and back.
    return [1, ratio, scale[1], 1 / ratio, 1, scale[0]]


def warp(images: Node, matrix: Node) -> Node:
    """Move the pixels of images by six numbers for each, from output to input coordinates; mid-gray from outside."""
    fn = _fn()
    return fn.warp_affine(images, matrix=fn.reshape(matrix, shape=[2, 3]), fill_value=128, inverse_map=True)


def _is_warp(op: Array) -> NDArray[np.bool_]:
    return np.isin(op, _WARPS)


def _scale_warps(op: Array, arguments: Array, scale: tuple[float, float]) -> None:
    """Let the warps among `arguments` `[N, 9]` do the same to images that are `scale` times as high and wide."""
    arguments[_is_warp(op), :6] *= warp_factors(scale)


def _dispatch(nodes: Sequence[Node], branches: Sequence[tuple[str, _Branch]]) -> Node:
    """Split images, ops and arguments by op until one branch is left; DALI runs each on the images that reach it."""
    images, op, arguments = nodes
    if len(branches) == 1:
        return branches[0][1](images, arguments)
    half = len(branches) // 2
    is_low = op < OPS.index(branches[half - 1][0]) + 0.5
    # What DALI makes of an `if`. Written out, because DALI's own translation would have to parse the whole library.
    conditional = _fn()._conditional
    forks = [conditional.split(node, predicate=is_low, _if_stmt=True) for node in nodes]
    low, high = ([fork[number] for fork in forks] for number in (0, 1))
    return conditional.merge(_dispatch(low, branches[:half]), _dispatch(high, branches[half:]), predicate=is_low)


def _identity(images: Node, arguments: Node) -> Node:
    return images


def _warp(images: Node, arguments: Node) -> Node:
    return warp(images, arguments[:6])


def _color(images: Node, arguments: Node) -> Node:
    return _fn().color_twist(images, brightness=arguments[0], saturation=arguments[1])


def _contrast(images: Node, arguments: Node) -> Node:
    """Scale around the mean lightness of the image."""
    fn, types = _fn(), _types()
    mean = fn.reductions.mean(images, axis_names="HW", keep_dims=True)
    center = 0.299 * mean[:, :, 0:1] + 0.587 * mean[:, :, 1:2] + 0.114 * mean[:, :, 2:3]
    return fn.cast(center + (images - center) * arguments[0], dtype=types.UINT8)


def _sharpness(images: Node, arguments: Node) -> Node:
    """Toward Pillow's smoothing filter for a factor below 1, away from it above 1."""
    fn, types = _fn(), _types()
    kernel = fn.reshape(arguments, shape=[3, 3])
    return fn.filter(images, kernel.gpu() if images.device == "gpu" else kernel, dtype=types.UINT8)


def _posterize_and_solarize(images: Node, arguments: Node) -> Node:
    fn, types = _fn(), _types()
    inverted = fn.cast(images >= arguments[1], dtype=types.UINT8) * types.Constant(255, dtype=types.UINT8)
    return (images & fn.cast(arguments[0], dtype=types.UINT8)) ^ inverted


def _autocontrast(images: Node, arguments: Node) -> Node:
    """Stretch each channel to 0 to 255; a channel with a single value stays unchanged."""
    fn, types = _fn(), _types()
    low = fn.cast(fn.reductions.min(images, axis_names="HW", keep_dims=True), dtype=types.FLOAT)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    is_flat = high <= low
    scale = 255.0 / (high - low + is_flat * 255.0)
    return fn.cast((images - low * (high > low)) * scale, dtype=types.UINT8)


def _equalize(images: Node, arguments: Node) -> Node:
    return _fn().equalize(images)


def _fn() -> Any:
    return require("nvidia.dali.fn", extra="cpu")


def _types() -> Any:
    return require("nvidia.dali.types", extra="cpu")


_BRANCHES = (
    ("identity", _identity),
    ("rotate", _warp),
    ("color", _color),
    ("contrast", _contrast),
    ("sharpness", _sharpness),
    ("solarize", _posterize_and_solarize),
    ("autocontrast", _autocontrast),
    ("equalize", _equalize),
)
"""In the order of `OPS`, the last op that a function applies, and the function."""

_SMOOTH = [weight / 13 for weight in (1, 1, 1, 1, 5, 1, 1, 1, 1)]
"""Pillow's 3x3 smoothing filter, row by row."""
_UNCHANGED = [0, 0, 0, 0, 1, 0, 0, 0, 0]
"""The filter that changes nothing."""

_WARPS = np.array([OPS.index(name) for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")])
_OPS_OF_COLOR = np.setdiff1d(np.arange(len(OPS)), _WARPS)
"""Positions in `OPS` of those that move pixels, and of all others, `identity` included."""

# Slots of the plan's uniform numbers, after those of `kd_pipeline.data.mixing`. Each op has four: one for the op, two
# for its strength, and one for its sign.
_FIRST_SLOT, _SLOTS_PER_OP = 40, 4
