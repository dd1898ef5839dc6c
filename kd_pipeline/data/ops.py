"""The ops that transforms consist of, run by DALI: windows and resize, colors, blur, erasing, normalize and flip.

No op draws anything itself. `parameters` turns a view's uniform numbers, which the plan makes, into parameters in
NumPy, and `apply` passes these to DALI. Only the crop also needs the size of an image (`windows`). Each op reads fixed
slots of the numbers, so switching one op on never changes what another does.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline._core.ranges import Range
from kd_pipeline.data.affine import RandomAffine
from kd_pipeline.data.auto_augment import Array, AutoAugment, Node
from kd_pipeline.data.own_ops import FactoryOp

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "GaussianBlur",
    "Normalize",
    "PixelOp",
    "RandomErasing",
    "RandomResizedCrop",
    "with_own_color",
    "with_own_erasing",
]

PerChannel = tuple[float, float, float]
"""Red, green and blue, on a scale from 0 to 1."""


def with_own_color(draws: Array, own: Array) -> Array:
    """`draws` `[N, num_draws]` with the numbers of `own` for jitter, grayscale and blur."""
    return _with_slots(draws, own, slice(_GRAYSCALE, _BLUR_SIGMA + 1))


def with_own_erasing(draws: Array, own: Array) -> Array:
    """`draws` `[N, num_draws]` with the numbers of `own` for erasing."""
    return _with_slots(draws, own, slice(_ERASE, _ERASE_CORNER.stop))


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random area and aspect ratio, resized to one size (Szegedy et al., arXiv 1409.4842, section 6).

    As in torchvision, the area is uniform, the ratio log-uniform, and both are drawn until the window fits, at most
    ten times. If none fits, in an image far longer than the ratio allows, the window is as large as the image and the
    ratio permit. Two differences: its position is random even then, where torchvision takes the center, and a window
    that rounds to nothing is one pixel, where torchvision draws again.
    """

    size: tuple[int, int]
    """Height and width of the result."""
    interpolation: str
    area: Range
    ratio: Range
    column: int | None = None
    """Where the number is that chooses a random interpolation, counted from the last; None if it is not random."""

    key: ClassVar[str] = "interpolation"
    """The name of its own random numbers."""
    takes_all: ClassVar[bool] = False
    """Whether its windows are always whole images."""

    @property
    def num_columns(self) -> int:
        """Random numbers of its own for each image."""
        return int(self.column is not None)

    @property
    def ndims(self) -> tuple[int, ...]:
        """Dimensions per sample of each array that `apply` takes."""
        return (0,) * self.num_columns

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Candidate windows, and where to put the one that is chosen.

        Returns:
            Height and width of each candidate divided by the root of the image's area, `[N, 10, 2]`, in the order in
            which they are tried; the position (y, x) as a fraction of the window's free range, `[N, 2]`; and with a
            random interpolation 1 where it is bicubic, `[N]`.
        """
        tries = _rectangles(_uniform(self.area, draws[:, _AREA]), self.ratio, draws[:, _RATIO])
        is_bicubic = () if self.column is None else (np.floor(2 * draws[:, self.column]),)
        return tries[:, ::-1], draws[:, [_CROP_Y, _CROP_X]], *is_bicubic

    def windows(self, size: Array, tries: Array, position: Array, *is_bicubic: Array) -> tuple[Array, ...]:
        """Corner (y, x) and extent of the windows in images of `size` `[N, 2]`, in whole pixels, `[N, 2]` each.

        They are followed by what `apply` takes.
        """
        extents = np.rint(tries * np.sqrt(size.prod(axis=1))[:, None, None])
        fits = (extents[..., 0] <= size[:, :1]) & (extents[..., 1] <= size[:, 1:])
        first = fits.argmax(axis=1)
        longest = np.rint(size[:, ::-1] * [1 / self.ratio[0], self.ratio[1]])
        rows = np.arange(len(size))
        extent = np.where(fits[rows, first, None], extents[rows, first], longest)
        extent = np.clip(extent, 1, size)
        return np.floor(position * (size - extent + 1)), extent, *is_bicubic

    def apply(self, images: Node, is_bicubic: Node = None, *, size: Node = None) -> Node:
        """Resize windows of any size; `size` are heights and widths in place of its own.

        A view with an interpolation of its own that follows one with a random interpolation ignores `is_bicubic`.
        """
        fn, types = _dali()
        options = _filter("bilinear" if self.interpolation == "random" else self.interpolation)
        if self.interpolation == "random":
            kinds = [int(_filter(kind)["interp_type"]) for kind in ("bilinear", "bicubic")]
            kind = kinds[0] + (kinds[1] - kinds[0]) * is_bicubic
            options["interp_type"] = fn.cast(fn.cast(kind, dtype=types.INT32), dtype=types.INTERP_TYPE)
        return fn.resize(images, size=[*self.size] if size is None else size, **options)


@dataclass(frozen=True)
class CenterCrop:
    """Resize of the shorter side to `shorter`, then a center crop, both rounded as in torchvision.

    DALI's own "not_smaller" resize and centered crop round differently, which shifts the image by up to a pixel: a
    mean absolute difference of up to 6/255 on a photograph, compared to 0.15/255 here.
    """

    size: tuple[int, int]
    """Height and width of the crop."""
    interpolation: str
    shorter: int
    """Shorter side of the rectangle, of the crop's aspect ratio, that the resized image covers."""

    ndims: ClassVar[tuple[int, ...]] = (1, 1)
    takes_all: ClassVar[bool] = True

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """No parameters, because nothing is random."""
        return ()

    def windows(self, size: Array) -> tuple[Array, ...]:
        """Corner and extent of whole images of `size` `[N, 2]`, then start and end of the center in them."""
        crop = np.array(self.size, dtype=np.float64)
        covered = np.rint(self.shorter * crop / crop.min())
        # One side of the image is resized to that of the covered rectangle, the other follows.
        side = np.arange(len(size)), (covered / size).argmax(axis=1)
        resized = np.maximum(covered, covered[side[1], None] * size // size[side][:, None])
        step = size / resized
        corner = np.rint((resized - crop) / 2)
        return np.zeros_like(size), size, corner * step, (corner + crop) * step

    def apply(self, images: Node, start: Node, end: Node) -> Node:
        """Resize only the centers of whole images; a 1x30000 image resized as a whole would take 6 GB."""
        fn, _ = _dali()
        return fn.resize(images, size=[*self.size], roi_start=start, roi_end=end, **_filter(self.interpolation))


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue as one linear map of the colors; grayscale is saturation 0.

    It amounts to hue, saturation, contrast and brightness in this order, rounded and clipped once at the end;
    torchvision applies them in a random order and clips after each. Brightness and saturation alone are torchvision's,
    up to two levels of 255. Contrast scales around mid-gray (128), torchvision's around the mean gray of each image: on
    photographs they are 20 levels apart on average for a factor of 0.6. Hue rotates around the gray axis (YIQ) where
    torchvision shifts the H of HSV: for 0.1 of a circle they are 12 to 17 levels apart on average, and up to 95.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float

    ndims: ClassVar[tuple[int, ...]] = (0, 0, 0, 0)

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Factors of brightness, contrast and saturation, and the rotation of the hue in degrees, `[N]` each."""
        signed = 2 * draws[:, _COLOR] - 1
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        brightness, contrast, saturation = np.maximum(1 + signed[:, :3] * strengths, 0).T
        saturation = saturation * (draws[:, _GRAYSCALE] >= self.grayscale)
        return brightness, contrast, saturation, signed[:, 3] * 360 * self.hue

    def apply(self, images: Node, brightness: Node, contrast: Node, saturation: Node, hue: Node) -> Node:
        """Map the colors of uint8 images."""
        fn, _ = _dali()
        return fn.color_twist(images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


@dataclass(frozen=True)
class GaussianBlur:
    """Blur some of the images, with a window that extends to three standard deviations, but to 84 pixels at most."""

    probability: float
    sigma: Range

    ndims: ClassVar[tuple[int, ...]] = (0, 0)

    def at_scale(self, scale: tuple[float, float]) -> "GaussianBlur":
        """The same blur of images that are `scale` times as high and wide."""
        factor = math.sqrt(math.prod(scale))
        return GaussianBlur(self.probability, (self.sigma[0] * factor, self.sigma[1] * factor))

    def parameters(self, draws: Array) -> tuple[NDArray[Any], ...]:
        """Standard deviation and window size in pixels, `[N]` each; a window of one pixel means no blur."""
        sigma = _uniform(self.sigma, draws[:, _BLUR_SIGMA])
        window = np.minimum(2 * np.ceil(3 * sigma) + 1, _MAX_WINDOW)
        window = np.where(draws[:, _BLUR] < self.probability, window, 1)
        return sigma, window.astype(np.int32)

    def apply(self, images: Node, sigma: Node, window: Node) -> Node:
        """Blur uint8 images."""
        fn, types = _dali()
        return fn.gaussian_blur(images, sigma=sigma, window_size=window, dtype=types.UINT8)


@dataclass(frozen=True)
class RandomErasing:
    """Fill a random rectangle of some images with the mean color (Zhong et al., arXiv 1708.04896)."""

    probability: float
    area: Range
    ratio: Range
    size: tuple[int, int]
    """Height and width of the images."""
    mean: PerChannel

    ndims: ClassVar[tuple[int, ...]] = (1, 1)

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Corner (y, x) and extent (height, width) in pixels, `[N, 2]` each; extent 0 means no erasing."""
        area = _uniform(self.area, draws[:, _ERASE_AREA]) * math.prod(self.size)
        extent = np.clip(np.round(_rectangles(area, self.ratio, draws[:, _ERASE_RATIO])), 1, self.size)
        corner = np.floor(draws[:, _ERASE_CORNER] * (np.array(self.size) - extent + 1))
        return corner, extent * (draws[:, [_ERASE]] < self.probability)

    def apply(self, images: Node, corner: Node, extent: Node) -> Node:
        """Erase rectangles from uint8 images."""
        fn, _ = _dali()
        fill = [round(255 * channel) for channel in self.mean]
        return fn.erase(images, anchor=corner, shape=extent, axis_names="HW", fill_value=fill)


@dataclass(frozen=True)
class Normalize:
    """uint8 HWC to normalized float CHW, with some images flipped left to right; always the last op."""

    mean: PerChannel
    std: PerChannel
    dtype: str
    flip: float | None
    """Probability of the flip; None for never."""

    @property
    def ndims(self) -> tuple[int, ...]:
        """Dimensions per sample of each array that `apply` takes."""
        return () if self.flip is None else (0,)

    def parameters(self, draws: Array) -> tuple[NDArray[np.int32], ...]:
        """`[N]`, 1 for images to flip."""
        return () if self.flip is None else ((draws[:, _FLIP] < self.flip).astype(np.int32),)

    def apply(self, images: Node, mirror: Node = 0) -> Node:
        """Normalize uint8 images."""
        fn, types = _dali()
        return fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=[255 * channel for channel in self.mean],
            std=[255 * channel for channel in self.std],
            dtype={"float32": types.FLOAT, "float16": types.FLOAT16}[self.dtype],
            output_layout="CHW",
        )


PixelOp = AutoAugment | RandomAffine | ColorJitter | GaussianBlur | RandomErasing | FactoryOp | Normalize

_NUM_TRIES = 10
"""How often a crop is drawn until it fits, as in torchvision."""
_MAX_WINDOW = 169
"""Of a blur, in pixels. DALI 2.4 refuses larger ones on a GPU: for three channels, three windows must be less than
510 long (`ConvolutionGpu::Setup`). On a CPU it is the same, for the same pixels."""

# Slots of the plan's uniform numbers. A new op takes new slots at the end, because moving one changes every run ever
# made. Crop and flip come first, because a transform without other ops needs only their numbers. Slots 35 to 39 are in
# `kd_pipeline.data.mixing`, those from 40 in `kd_pipeline.data.auto_augment`.
_CROP_Y, _CROP_X, _FLIP = 0, 1, 2
_AREA, _RATIO = slice(3, 3 + _NUM_TRIES), slice(13, 13 + _NUM_TRIES)
_GRAYSCALE, _COLOR = 23, slice(24, 28)
_BLUR, _BLUR_SIGMA = 28, 29
_ERASE, _ERASE_AREA, _ERASE_RATIO, _ERASE_CORNER = 30, 31, 32, slice(33, 35)


def _with_slots(draws: Array, own: Array, slots: slice) -> Array:
    merged = draws.copy()
    merged[:, slots] = own[:, slots]
    return merged


def _uniform(limits: Range, draws: Array) -> Array:
    return limits[0] + draws * (limits[1] - limits[0])


def _rectangles(area: Array, ratio: Range, draws: Array) -> Array:
    """Height and width `[..., 2]` of rectangles of `area` `[...]`, with a log-uniform aspect ratio."""
    low, high = np.log(ratio)
    aspect = np.exp(_uniform((low, high), draws))
    return np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1)


def _dali() -> tuple[Any, Any]:
    return require("nvidia.dali.fn", extra="cpu"), require("nvidia.dali.types", extra="cpu")


def _filter(interpolation: str) -> dict[str, Any]:
    _, types = _dali()
    kind = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    return {"interp_type": kind, "antialias": True}
