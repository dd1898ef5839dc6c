"""Image transforms: the two presets of a config and the ops that they consist of, run by DALI.

No op draws anything itself. `parameters` turns a view's uniform numbers, which the plan makes, into parameters in
NumPy, and `apply` passes these to DALI. Only the crop also needs the size of an image (`windows`). Each op reads fixed
slots of the numbers, so switching one op on never changes what another does.
"""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from kd_pipeline._core.channels import ChannelMeans, ChannelStds
from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.image_size import Size, as_size, height_width
from kd_pipeline._core.optional import require
from kd_pipeline._core.ranges import FractionRange, Probability, Range
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.affine import AffineSettings, RandomAffine
from kd_pipeline.data.auto_augment import Array, AutoAugment, AutoAugmentSettings, Node
from kd_pipeline.data.headers import Orientation
from kd_pipeline.data.own_ops import FactoryOp, OwnOp
from kd_pipeline.data.size_schedule import ProgressiveSize, RandomSize, SizeSchedule

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "EvalTransform",
    "GaussianBlur",
    "Normalize",
    "RandomErasing",
    "RandomResizedCrop",
    "TrainTransform",
    "TransformSettings",
    "plain_fields",
    "with_own_color",
    "with_own_erasing",
]


PerChannel = tuple[float, float, float]
"""Red, green and blue, on a scale from 0 to 1."""


class _Output(Settings):
    """The format of the finished image, the same for both presets."""

    size: Size | SizeSchedule
    """Height and width of the finished image, in pixels: `224` for a square, or `[384, 640]`."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """Filter of the resize, which is always antialiased; `random` takes one of the two for each image, as timm does."""
    mean: ChannelMeans = IMAGENET_MEAN
    """Subtracted from red, green and blue, for pixels from 0 to 1; means for 0 to 255 are refused."""
    std: ChannelStds = IMAGENET_STD
    """Divides red, green and blue after that, for pixels from 0 to 1."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the finished images; `float16` takes half the memory."""
    orientation: Orientation = "upright"
    """`upright` turns photographs as their EXIF says. `stored` takes the pixels as they are in the file, as
    torchvision's `ImageFolder` does, for a teacher that was trained on these."""

    @property
    def schedule(self) -> RandomSize | ProgressiveSize | None:
        """How the size changes; None if it does not."""
        return self.size if isinstance(self.size, RandomSize | ProgressiveSize) else None

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the finished image, in pixels, or of the largest one."""
        return self.size.sizes[0] if isinstance(self.size, RandomSize | ProgressiveSize) else height_width(self.size)

    def at_size(self, size: tuple[int, int] | None = None) -> Self:
        """The same with a size that does not change; defaults to the largest."""
        return self.model_copy(update={"size": as_size(self.height_width if size is None else size)})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(3, H, W)` of the finished image, or of the largest one."""
        return (3, *self.height_width)

    @property
    def input_shape(self) -> tuple[int, int | None, int | None]:
        """`(3, H, W)`, where None is a size that changes."""
        return self.image_shape if self.schedule is None else (3, None, None)


OpName = Literal["auto_augment", "affine", "color", "blur", "erase"]
"""An op of the preset `train`; `color` is brightness, contrast, saturation, hue and grayscale at once."""


class TrainTransform(_Output):
    """Random resized crop, RandAugment or TrivialAugment, affine map, color jitter, grayscale, blur, erasing, normalize
    and flip.

    In this order, unless `order` says another. The flip comes last, so it mirrors what the other ops did.
    """

    preset: Literal["train"] = "train"
    size: Size | SizeSchedule
    """Height and width of the finished image, in pixels: `224` for a square, or `[384, 640]`; or how it changes:
    `{choices: [192, 224, 256], per: batch}` or `{start: 128, end: 224, epochs: 10}`, see `RandomSize` and
    `ProgressiveSize`."""
    area: FractionRange = (0.08, 1.0)
    """Fraction of the image's area that the crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, width over height."""
    flip: Probability = 0.5
    """Probability of mirroring an image left to right."""
    auto_augment: AutoAugmentSettings | None = None
    """RandAugment or TrivialAugment, applied right after the crop."""
    affine: AffineSettings | None = None
    """Rotation, translation, scale and shear, such as `{rotate: 15, translate: 0.1, scale: [0.9, 1.1], shear: 5}`."""
    brightness: float = Field(default=0.0, ge=0)
    """The factor is uniform in [1 - brightness, 1 + brightness], and at least 0; as for contrast and saturation."""
    contrast: float = Field(default=0.0, ge=0)
    """Scales around mid-gray (128), where torchvision scales around the mean gray of each image."""
    saturation: float = Field(default=0.0, ge=0)
    """Blends each image with its gray version by a factor from the range that `brightness` describes."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """The colors are rotated around the gray axis by up to this fraction of a full circle in either direction: a linear
    map, not the hue of HSV that torchvision shifts. The direction is the same; see `ColorJitter` for the difference."""
    grayscale: Probability = 0.0
    """Probability of turning an image gray."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the finished image."""
    erase: Probability = 0.0
    """Probability of erasing a rectangle."""
    erase_area: FractionRange = (0.02, 1 / 3)
    """Fraction of the finished image that is erased, which means filled with the mean color."""
    erase_ratio: Range = (0.3, 3.3)
    """Aspect ratio of the erased rectangle, width over height."""
    order: tuple[OpName | OwnOp, ...] | None = None
    """In which order the ops between crop and normalize are applied, and ops of your own among them, each as
    `{factory: package.module:function}`; see `OwnOp`. It defaults to `[auto_augment, affine, color, blur, erase]`. What
    an op draws does not depend on its place, nor on other ops."""

    @field_validator("order")
    @classmethod
    def _names_are_used_once(cls, order: tuple[OpName | OwnOp, ...] | None) -> tuple[OpName | OwnOp, ...] | None:
        names = [entry.key if isinstance(entry, OwnOp) else entry for entry in order or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"order has {', '.join(sorted(twice))} twice; apply an op of the preset once, and give two ops of one "
                "function different names, such as {factory: ..., name: second}"
            )
        return None if order == get_args(OpName) else order  # equal settings for equal images

    @model_validator(mode="after")
    def _order_has_all_ops(self) -> "TrainTransform":
        if self.order is not None and (missing := [name for name in self._preset_ops() if name not in self.order]):
            raise ValueError(f"order leaves out {', '.join(missing)}, which the transform has; add it to order")
        return self

    @property
    def num_draws(self) -> int:
        """Uniform numbers that a view needs, without those of ops that have their own."""
        if self.auto_augment is not None:
            return AutoAugment(self.auto_augment, self.height_width).num_draws
        return 35 if self._preset_ops() else 23

    @property
    def crop(self) -> "RandomResizedCrop":
        """The crop and resize."""
        column = None
        if self.interpolation == "random":
            end = sum(op.num_columns for op in self.ops if isinstance(op, RandomAffine | FactoryOp))
            column = -end - 1
        return RandomResizedCrop(self.height_width, self.interpolation, self.area, self.ratio, column)

    @property
    def ops(self) -> tuple["PixelOp", ...]:
        """All ops after the crop that have an effect; `Normalize`, which also flips, is the last."""
        order = self.order or get_args(OpName)
        all_own = [entry for entry in order if isinstance(entry, OwnOp)]
        own, preset = iter(FactoryOp.after(all_own)), self._preset_ops(sum(entry.num_columns for entry in all_own))
        ops = [next(own) if isinstance(entry, OwnOp) else preset.get(entry) for entry in order]
        return (*(op for op in ops if op is not None), Normalize(self.mean, self.std, self.dtype, self.flip))

    def _preset_ops(self, num_columns: int = 0) -> dict[OpName, "PixelOp"]:
        """The ops of the preset that have an effect, before `num_columns` numbers of ops of the user's own."""
        ops: dict[OpName, PixelOp] = {}
        if self.auto_augment is not None:
            ops["auto_augment"] = AutoAugment(self.auto_augment, self.height_width)
        if self.affine is not None:
            columns = slice(-num_columns - RandomAffine.num_columns, -num_columns or None)
            ops["affine"] = RandomAffine(self.affine, self.height_width, columns)
        if self.brightness or self.contrast or self.saturation or self.hue or self.grayscale:
            ops["color"] = ColorJitter(self.brightness, self.contrast, self.saturation, self.hue, self.grayscale)
        if self.blur:
            ops["blur"] = GaussianBlur(self.blur, self.blur_sigma)
        if self.erase:
            size = self.height_width
            ops["erase"] = RandomErasing(self.erase, self.erase_area, self.erase_ratio, size, self.mean)
        return ops


class EvalTransform(_Output):
    """Resize of the shorter side, center crop, normalize: torchvision's evaluation transform, computed exactly.

    For a rectangle, images are resized to cover one that is larger by the same factor, as timm does.

    Away from the border of the image, pixels are at most one level of 255 from torchvision's resize in floating point.
    Pillow, and torchvision's v2 transforms for uint8 tensors, round and clip to 8 bits within a resize: with `bilinear`
    they are at most one level away too, with `bicubic` up to 13 levels at sharp edges (mean at most 0.25).
    """

    preset: Literal["eval"] = "eval"
    size: Size
    """Height and width of the finished image, in pixels: `224` for a square, or `[384, 640]`."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize, which is always antialiased."""
    resize: int | None = Field(default=None, gt=0, le=2 * 8192)
    """Length of the shorter side before the crop; defaults to `size / 0.875`, which is 256 for 224. For a rectangle,
    the shorter side of the one that is covered: with `size: [384, 640]` and `resize: 384` images are resized to cover
    just that."""

    num_draws: ClassVar[int] = 0
    """Uniform numbers that a view needs: evaluation is not random."""

    @model_validator(mode="after")
    def _resize_covers_crop(self) -> "EvalTransform":
        if self.resize is not None and self.resize < (shorter := min(self.height_width)):
            raise ValueError(f"resize must be at least size, got resize {self.resize} for size {shorter}")
        return self

    @property
    def crop(self) -> "CenterCrop":
        """The resize and crop."""
        resize = self.resize or round(min(self.height_width) / 0.875)
        return CenterCrop(self.height_width, self.interpolation, resize)

    @property
    def ops(self) -> tuple["PixelOp", ...]:
        """The only op after the crop, `Normalize`."""
        return (Normalize(self.mean, self.std, self.dtype, None),)


TransformSettings = Annotated[TrainTransform | EvalTransform, Field(discriminator="preset")]
"""What a config may have under `transform`."""


def plain_fields(settings: Settings) -> dict[str, Any]:
    """A transform or view as plain values of one level, with a schedule of sizes and each op of your own as JSON."""
    fields = settings.model_dump(mode="json")
    if isinstance(fields["size"], dict):
        fields["size"] = json.dumps(fields["size"])
    if fields.get("order") is not None:
        fields["order"] = [entry if isinstance(entry, str) else json.dumps(entry) for entry in fields["order"]]
    return fields


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
    """Blur some of the images, with a window that extends to three standard deviations."""

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
