"""What is done to an image, as data: frozen settings, the random numbers they need, and their DALI calls.

An op turns uniform numbers from the plan into parameters with NumPy (`parameters`), one array for each input that
its DALI calls take (`apply`). The crop alone needs to know how large an image is (`cut`). No op draws anything itself.
Which of the plan's numbers an op reads is fixed, so switching one op on never changes what another does.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.auto_augment import AutoAugment, AutoAugmentSettings

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CenterCrop",
    "ColorJitter",
    "EvalTransform",
    "GaussianBlur",
    "Normalize",
    "RandomErasing",
    "RandomResizedCrop",
    "TrainTransform",
    "TransformSettings",
    "ops_of",
    "parameters_of",
]


NUM_TRIES = 10
"""How often a crop is drawn until it fits; torchvision's number."""

Node = Any
"""A node of a DALI graph."""
Array = NDArray[np.float64]
"""Draws and parameters; in double precision, as releases of NumPy differ in when they promote single."""
Range = tuple[float, float]
"""Low and high."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Triple = tuple[float, float, float]


class _Output(Settings):
    """What both presets say about the finished image."""

    size: int = Field(gt=0)
    """Height and width of the finished image, in pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize; always antialiased."""
    mean: Triple = IMAGENET_MEAN
    """Subtracted from each channel, on a scale from 0 to 1."""
    std: Triple = IMAGENET_STD
    """Divides each channel afterward."""
    dtype: Literal["float32", "float16"] = "float32"

    @model_validator(mode="after")
    def _std_is_positive(self) -> "_Output":
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        return self


class TrainTransform(_Output):
    """Random resized crop, flip, automatic augmentation, color jitter, grayscale, blur, erasing, normalize."""

    preset: Literal["train"] = "train"
    area: Range = (0.08, 1.0)
    """Share of the image's area that the crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width of the crop over its height."""
    flip: Probability = 0.5
    auto_augment: AutoAugmentSettings | None = None
    """RandAugment or TrivialAugment, before all other changes of pixels."""
    brightness: float = Field(default=0.0, ge=0.0)
    """The factor is drawn from [1 - brightness, 1 + brightness], not below 0; contrast and saturation alike."""
    contrast: float = Field(default=0.0, ge=0.0)
    saturation: float = Field(default=0.0, ge=0.0)
    hue: float = Field(default=0.0, ge=0.0, le=0.5)
    """The hue is turned by up to this part of a full circle either way."""
    grayscale: Probability = 0.0
    blur: Probability = 0.0
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the finished image."""
    erase: Probability = 0.0
    erase_area: Range = (0.02, 1 / 3)
    """Share of the finished image that is erased, filled with the mean color."""
    erase_ratio: Range = (0.3, 3.3)

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> "TrainTransform":
        for name in ("area", "ratio", "blur_sigma", "erase_area", "erase_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got [{low}, {high}]")
        for name in ("area", "erase_area"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name} is a share and ends at 1, got {getattr(self, name)[1]}")
        return self

    @property
    def num_draws(self) -> int:
        """How many of a view's uniform numbers are used."""
        if self.auto_augment is not None:
            return AutoAugment(self.auto_augment, self.size).num_draws
        return 35 if self.ops else 23

    @property
    def crop(self) -> "RandomResizedCrop":
        """Where the image is cut, and to what size it is brought."""
        return RandomResizedCrop(self.size, self.interpolation, self.area, self.ratio)

    @property
    def ops(self) -> tuple["PixelOp", ...]:
        """What happens to the pixels between the crop and the normalization; ops that would do nothing are left out."""
        ops: list[PixelOp] = []
        if self.auto_augment is not None:
            ops.append(AutoAugment(self.auto_augment, self.size))
        if self.brightness or self.contrast or self.saturation or self.hue or self.grayscale:
            ops.append(ColorJitter(self.brightness, self.contrast, self.saturation, self.hue, self.grayscale))
        if self.blur:
            ops.append(GaussianBlur(self.blur, self.blur_sigma))
        if self.erase:
            ops.append(RandomErasing(self.erase, self.erase_area, self.erase_ratio, self.size, self.mean))
        return tuple(ops)

    @property
    def normalize(self) -> "Normalize":
        """The last op, which also flips."""
        return Normalize(self.mean, self.std, self.dtype, self.flip)


class EvalTransform(_Output):
    """Resize the shorter side, crop the center, normalize; pixel by pixel what torchvision does."""

    preset: Literal["eval"] = "eval"
    resize: int | None = Field(default=None, gt=0)
    """Length of the shorter side before the crop; by default `size / 0.875`, which is 256 for 224."""

    @model_validator(mode="after")
    def _resize_covers_the_crop(self) -> "EvalTransform":
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size, got resize {self.resize} for size {self.size}")
        return self

    @property
    def num_draws(self) -> int:
        """None: evaluation is not random."""
        return 0

    @property
    def crop(self) -> "CenterCrop":
        """How the image is resized and cut."""
        return CenterCrop(self.size, self.interpolation, self.resize or round(self.size / 0.875))

    @property
    def ops(self) -> tuple["PixelOp", ...]:
        """None: evaluation changes no pixels."""
        return ()

    @property
    def normalize(self) -> "Normalize":
        """The last op."""
        return Normalize(self.mean, self.std, self.dtype, None)


TransformSettings = Annotated[TrainTransform | EvalTransform, Field(discriminator="preset")]
"""What a config file may say under `transform`."""


def ops_of(transform: TrainTransform | EvalTransform) -> tuple[Any, ...]:
    """What happens to the pixels after the crop, the normalization last."""
    return (*transform.ops, transform.normalize)


def parameters_of(transform: TrainTransform | EvalTransform, draws: Array) -> tuple[NDArray[Any], ...]:
    """What the ops make of uniform numbers `[N, transform.num_draws]`: all their parameters, one behind the other."""
    found = (part for op in ops_of(transform) for part in op.parameters(draws))
    # DALI has no use for double precision.
    return tuple(
        np.ascontiguousarray(part, dtype=np.float32 if part.dtype == np.float64 else part.dtype) for part in found
    )


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random area and shape, resized to a square (Szegedy et al., arXiv 1409.4842, section 6).

    As in torchvision: area uniform, ratio log-uniform, drawn until the window fits, ten times at most. Where none
    fits (an image far longer than the ratio allows), the window is as large as image and ratio permit; its place is
    random too, where torchvision takes the middle. A window that rounds to nothing is one pixel.
    """

    size: int
    interpolation: str
    area: Range
    ratio: Range

    ndims: ClassVar[tuple[int, ...]] = ()
    """Of what `cut` returns beyond corner and extent, for `apply`: dimensions of a sample's part of each array."""

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Windows to try, and where to put the one that is taken.

        Returns:
            Height and width of every try over the root of the image's area `[N, 10, 2]`, the first try first, and the
            place in the room that the window has, y and x from 0 to below 1, `[N, 2]`.
        """
        low, high = self.area
        area = low + draws[:, _AREA] * (high - low)
        log_low, log_high = np.log(self.ratio)
        ratio = np.exp(log_low + draws[:, _RATIO] * (log_high - log_low))
        tries = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=2)
        return tries[:, ::-1], draws[:, [_PLACE_Y, _PLACE_X]]

    def cut(self, size: Array, tries: Array, place: Array) -> tuple[Array, ...]:
        """Corner (y, x) and extent of the windows in images of `size` `[N, 2]`, in whole pixels, `[N, 2]` each."""
        extents = np.rint(tries * np.sqrt(size.prod(axis=1))[:, None, None])
        fits = (extents[..., 0] <= size[:, :1]) & (extents[..., 1] <= size[:, 1:])
        first = fits.argmax(axis=1)
        longest = np.rint(size[:, ::-1] * [1 / self.ratio[0], self.ratio[1]])
        rows = np.arange(len(size))
        extent = np.where(fits[rows, first, None], extents[rows, first], longest)
        extent = np.clip(extent, 1, size)
        return np.floor(place * (size - extent + 1)), extent

    def apply(self, images: Node) -> Node:
        """Bring the windows, of whatever size, to the final one."""
        fn, _ = _dali()
        return fn.resize(images, size=[self.size, self.size], **_filter(self.interpolation))


@dataclass(frozen=True)
class CenterCrop:
    """Shorter side to `shorter`, then the square in the middle, with torchvision's rounding of both.

    DALI's own "not_smaller" resize and centered crop round differently, which moves the picture by up to a pixel and
    costs up to 6/255 of mean absolute difference on a photograph; computed like this it is 0.15/255.
    """

    size: int
    interpolation: str
    shorter: int

    ndims: ClassVar[tuple[int, ...]] = (1, 1)

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """None: nothing here is random."""
        return ()

    def cut(self, size: Array) -> tuple[Array, ...]:
        """Corner and extent of whole images of `size` `[N, 2]`, then where in them the center begins and ends."""
        resized = self.shorter * size // size.min(axis=1, keepdims=True)
        step = size / resized
        corner = np.rint((resized - self.size) / 2)
        return np.zeros_like(size), size, corner * step, (corner + self.size) * step

    def apply(self, images: Node, start: Node, end: Node) -> Node:
        """Resize the centers of whole images; all of a resized 1x30000 image would be 6 GB."""
        fn, _ = _dali()
        return fn.resize(
            images, size=[self.size, self.size], roi_start=start, roi_end=end, **_filter(self.interpolation)
        )


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue in one linear map of the colors, and grayscale as saturation zero.

    Contrast turns about mid-gray (128), where torchvision turns about the mean of each image.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float

    ndims: ClassVar[tuple[int, ...]] = (0, 0, 0, 0)

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Factors of brightness, contrast and saturation, and the turn of the hue in degrees, `[N]` each."""
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
    """Blur some of the images, with a window that reaches three standard deviations."""

    probability: float
    sigma: Range

    ndims: ClassVar[tuple[int, ...]] = (0, 0)

    def parameters(self, draws: Array) -> tuple[NDArray[Any], ...]:
        """Standard deviation and window in pixels, `[N]` each; a window of one pixel leaves the image as it is."""
        low, high = self.sigma
        sigma = low + draws[:, _BLUR_SIGMA] * (high - low)
        window = np.where(draws[:, _BLUR] < self.probability, 2 * np.ceil(3 * sigma) + 1, 1)
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
    size: int
    mean: Triple

    ndims: ClassVar[tuple[int, ...]] = (1, 1)

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Corner (y, x) and extent (height, width) in pixels, `[N, 2]` each; the extent is 0 for no erasing."""
        (area_low, area_high), (log_low, log_high) = self.area, np.log(self.ratio)
        area = (area_low + draws[:, _ERASE_AREA] * (area_high - area_low)) * self.size**2
        ratio = np.exp(log_low + draws[:, _ERASE_RATIO] * (log_high - log_low))
        extent = np.clip(np.round(np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1)), 1, self.size)
        corner = np.floor(draws[:, _ERASE_PLACE] * (self.size - extent + 1))
        return corner, extent * (draws[:, [_ERASE]] < self.probability)

    def apply(self, images: Node, corner: Node, extent: Node) -> Node:
        """Erase from uint8 images."""
        fn, _ = _dali()
        fill = [round(255 * channel) for channel in self.mean]
        return fn.erase(images, anchor=corner, shape=extent, axis_names="HW", fill_value=fill)


@dataclass(frozen=True)
class Normalize:
    """uint8 HWC to normalized float CHW, some flipped left to right: the last op, which writes the batch."""

    mean: Triple
    std: Triple
    dtype: str
    flip: float | None
    """Probability of the flip; None for never."""

    @property
    def ndims(self) -> tuple[int, ...]:
        """Dimensions of a sample's part of each parameter."""
        return () if self.flip is None else (0,)

    def parameters(self, draws: Array) -> tuple[NDArray[np.int32], ...]:
        """`[N]`, 1 where the image is flipped."""
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


PixelOp = AutoAugment | ColorJitter | GaussianBlur | RandomErasing

# Slots of the plan's uniform numbers. New ops take new slots at the end; moving one changes every run ever made.
# The crop and the flip come first: where they are all there is, the plan makes no other numbers. Slots 35 to 39 are
# those of `kd_pipeline.data.mixing`, and the ones from 40 on those of `kd_pipeline.data.auto_augment`.
_PLACE_Y, _PLACE_X, _FLIP = 0, 1, 2
_AREA, _RATIO = slice(3, 3 + NUM_TRIES), slice(13, 13 + NUM_TRIES)
_GRAYSCALE, _COLOR = 23, slice(24, 28)
_BLUR, _BLUR_SIGMA = 28, 29
_ERASE, _ERASE_AREA, _ERASE_RATIO, _ERASE_PLACE = 30, 31, 32, slice(33, 35)


def _dali() -> tuple[Any, Any]:
    return require("nvidia.dali.fn", extra="cpu"), require("nvidia.dali.types", extra="cpu")


def _filter(interpolation: str) -> dict[str, Any]:
    _, types = _dali()
    kind = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    return {"interp_type": kind, "antialias": True}
