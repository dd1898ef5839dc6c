"""Adapts the loader's images to a network that expects another normalization, image size or gray images."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn

from kd_pipeline._core.channels import GRAY, ChannelMeans, ChannelStds, Means, Stds
from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.image_size import Size, height_width
from kd_pipeline._core.settings import Settings

__all__ = [
    "AdaptedNetwork",
    "ExpectedInput",
    "InputAdapter",
    "InputAdapterLayer",
    "Normalization",
    "scale_and_shift",
    "unadapted",
]


class Normalization(NamedTuple):
    """Mean and standard deviation per channel that images were normalized with, for pixels in [0, 1]."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class ExpectedInput(Settings):
    """The images that a network expects."""

    mean: Means
    """Mean per channel of its normalization, for pixels from 0 to 1; one for 0 to 255 is refused. A network with one
    input channel has one, as `[0.1307]`: it gets gray images."""
    std: Stds
    """Standard deviation per channel of its normalization, for pixels from 0 to 1; as many as there are means."""
    size: Size | None = None
    """Height and width in pixels that it expects; defaults to the size of the images."""

    @model_validator(mode="after")
    def _same_number(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one per channel to both")
        return self

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Height and width in pixels that it expects; None for those of the images."""
        return None if self.size is None else height_width(self.size)

    def adapter(self, images: Normalization) -> "InputAdapter":
        """An adapter from images with another normalization."""
        return InputAdapter(**self.model_dump(), from_mean=images.mean, from_std=images.std)


class InputAdapter(ExpectedInput):
    """Renormalizes and resizes images for a network, as its first layer: teacher and student share one buffer."""

    from_mean: ChannelMeans = IMAGENET_MEAN
    """Mean per channel of the incoming images' normalization; defaults to ImageNet's."""
    from_std: ChannelStds = IMAGENET_STD
    """Standard deviation per channel of the incoming images' normalization; defaults to ImageNet's."""


def scale_and_shift(adapter: InputAdapter) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What incoming images are multiplied by, `[1, 3, 1, 1]`, and what is then added, `[1, C, 1, 1]`, with C means.

    With one mean, the products are summed over the channels in between.
    """
    mean, std, from_mean, from_std = map(_per_channel, (adapter.mean, adapter.std, adapter.from_mean, adapter.from_std))
    if len(adapter.mean) == 1:
        shares = _per_channel(GRAY)
        return shares * from_std / std, ((shares * from_mean).sum(axis=1, keepdims=True) - mean) / std
    return from_std / std, (from_mean - mean) / std


class InputAdapterLayer(nn.Module):
    """An `InputAdapter` as a layer: `(x · from_std + from_mean - mean) / std` per channel, then a bilinear resize.

    Maps `[N, 3, H, W]` to `[N, 3, *size]`, or to the same height and width without a size. With one mean, red, green
    and blue become one channel first, weighted as `GRAY`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, adapter: InputAdapter) -> None:
        super().__init__()
        scale, shift = scale_and_shift(adapter)
        # The settings say what they are, and the state dict is that of the network alone.
        self.register_buffer("scale", torch.from_numpy(scale), persistent=False)
        self.register_buffer("shift", torch.from_numpy(shift), persistent=False)
        self.size = adapter.height_width
        self.is_gray = len(adapter.mean) == 1

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` as the network expects them."""
        images = images * self.scale
        images = (images.sum(dim=1, keepdim=True) if self.is_gray else images) + self.shift
        if self.size is None:
            return images
        return F.interpolate(images, size=self.size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """The size, which is in no tensor, for fingerprints."""
        return f"size={self.size}"


class AdaptedNetwork(nn.Module):
    """A network behind its input adapter; `network` is the one whose layers and weights have names."""

    def __init__(self, network: nn.Module, expected: ExpectedInput, images: Normalization) -> None:
        """Wrap `network`, which expects other images than those with the normalization of `images`."""
        super().__init__()
        self.expected = expected
        self.adapter, self.network = InputAdapterLayer(expected.adapter(images)), network

    def forward(self, images: Tensor) -> Any:
        """What the network returns for images `[N, 3, H, W]`."""
        return self.network(self.adapter(images))


def unadapted(module: nn.Module) -> nn.Module:
    """The network behind an input adapter, or `module` itself."""
    return module.network if isinstance(module, AdaptedNetwork) else module


def _per_channel(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(1, -1, 1, 1)
