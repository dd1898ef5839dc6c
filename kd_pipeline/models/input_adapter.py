"""What stands between the student's images and a teacher that was trained on others: normalization and size."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.settings import Settings

__all__ = ["AdaptInput", "InputAdapter", "Normalization", "WantedInput"]

_Mean = Annotated[float, Field(le=1)]  # more is meant for the scale 0 to 255
_Means = tuple[_Mean, _Mean, _Mean]
_Stds = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class Normalization(NamedTuple):
    """How images were normalized, on the scale 0 to 1."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel; ImageNet's unless given."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each channel afterward, likewise."""


class WantedInput(Settings):
    """The images that a teacher was trained on."""

    mean: _Means
    """Mean per channel, on the scale 0 to 1, that the teacher was trained with."""
    std: _Stds
    """Standard deviation per channel, likewise."""
    size: int | None = Field(default=None, ge=1)
    """Height and width that the teacher wants; the images' own unless given."""

    def adapter(self, images: Normalization) -> "InputAdapter":
        """What makes them of images that are normalized otherwise."""
        return InputAdapter(**self.model_dump(), from_mean=images.mean, from_std=images.std)


class InputAdapter(WantedInput):
    """What stands between the student's images and a teacher trained on others: normalization and size.

    It becomes the first layer of the teacher, so that both read one buffer.
    """

    from_mean: _Means = IMAGENET_MEAN
    """Mean per channel that the incoming images were normalized with; ImageNet's unless given."""
    from_std: _Stds = IMAGENET_STD
    """Standard deviation per channel, likewise."""


class AdaptInput(nn.Module):
    """An `InputAdapter` as a layer: `(x · from_std + from_mean - mean) / std` per channel, then a bilinear resize."""

    scale: Tensor
    shift: Tensor

    def __init__(self, adapter: InputAdapter) -> None:
        super().__init__()
        mean, std = _per_channel(adapter.mean), _per_channel(adapter.std)
        self.register_buffer("scale", _per_channel(adapter.from_std) / std)
        self.register_buffer("shift", (_per_channel(adapter.from_mean) - mean) / std)
        self.size = adapter.size

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` as the teacher wants them."""
        images = images * self.scale + self.shift
        if self.size is None:
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """For a fingerprint: the size is in no tensor."""
        return f"size={self.size}"


def _per_channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
