"""Adapts the loader's images to a network that was trained with a different normalization or image size."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_pipeline._core.channels import ChannelMeans, ChannelStds
from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline._core.image_size import Size, height_width
from kd_pipeline._core.settings import Settings

__all__ = ["AdaptedNetwork", "ExpectedInput", "InputAdapter", "InputAdapterLayer", "Normalization", "unadapted"]


class Normalization(NamedTuple):
    """Mean and standard deviation per channel that images were normalized with, for pixels in [0, 1]."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class ExpectedInput(Settings):
    """The images that a network expects."""

    mean: ChannelMeans
    """Mean per channel of its normalization, for pixels from 0 to 1; one for 0 to 255 is refused."""
    std: ChannelStds
    """Standard deviation per channel of its normalization, for pixels from 0 to 1."""
    size: Size | None = None
    """Height and width in pixels that it expects; defaults to the size of the images."""

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


class InputAdapterLayer(nn.Module):
    """An `InputAdapter` as a layer: `(x · from_std + from_mean - mean) / std` per channel, then a bilinear resize.

    Maps `[N, 3, H, W]` to `[N, 3, *size]`, or to the same shape without a size.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, adapter: InputAdapter) -> None:
        super().__init__()
        mean, std = _per_channel(adapter.mean), _per_channel(adapter.std)
        # The settings say what they are, and the state dict is that of the network alone.
        self.register_buffer("scale", _per_channel(adapter.from_std) / std, persistent=False)
        self.register_buffer("shift", (_per_channel(adapter.from_mean) - mean) / std, persistent=False)
        self.size = adapter.height_width

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` as the network expects them."""
        images = images * self.scale + self.shift
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


def _per_channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
