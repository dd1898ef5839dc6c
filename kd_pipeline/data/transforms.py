"""Image transforms: the two presets of a config, random and not, each with its crop and the ops that follow."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from kd_pipeline._core.channels import ChannelMeans, ChannelStds
from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.image_size import Size, as_size, height_width
from kd_pipeline._core.ranges import FractionRange, Probability, Range
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.affine import AffineSettings, RandomAffine
from kd_pipeline.data.auto_augment import AutoAugment, AutoAugmentSettings
from kd_pipeline.data.headers import Orientation
from kd_pipeline.data.ops import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    PixelOp,
    RandomErasing,
    RandomResizedCrop,
)
from kd_pipeline.data.own_ops import FactoryOp, OwnOp
from kd_pipeline.data.size_schedule import ProgressiveSize, RandomSize, SizeSchedule

__all__ = ["EvalTransform", "TrainTransform", "TransformSettings", "plain_fields"]


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
    """Standard deviation of the blur in pixels of the finished image. From 28 on, the blur ends 84 pixels from its
    center, which is as far as DALI's blur reaches on a GPU."""
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
    def crop(self) -> RandomResizedCrop:
        """The crop and resize."""
        column = None
        if self.interpolation == "random":
            end = sum(op.num_columns for op in self.ops if isinstance(op, RandomAffine | FactoryOp))
            column = -end - 1
        return RandomResizedCrop(self.height_width, self.interpolation, self.area, self.ratio, column)

    @property
    def ops(self) -> tuple[PixelOp, ...]:
        """All ops after the crop that have an effect; `Normalize`, which also flips, is the last."""
        order = self.order or get_args(OpName)
        all_own = [entry for entry in order if isinstance(entry, OwnOp)]
        own, preset = iter(FactoryOp.after(all_own)), self._preset_ops(sum(entry.num_columns for entry in all_own))
        ops = [next(own) if isinstance(entry, OwnOp) else preset.get(entry) for entry in order]
        return (*(op for op in ops if op is not None), Normalize(self.mean, self.std, self.dtype, self.flip))

    def _preset_ops(self, num_columns: int = 0) -> dict[OpName, PixelOp]:
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
    def crop(self) -> CenterCrop:
        """The resize and crop."""
        resize = self.resize or round(min(self.height_width) / 0.875)
        return CenterCrop(self.height_width, self.interpolation, resize)

    @property
    def ops(self) -> tuple[PixelOp, ...]:
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
