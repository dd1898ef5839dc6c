"""Networks for segmentation: a network of timm with a small head for the class of each pixel."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_pipeline.errors import ConfigError

__all__ = ["SEGMENTATION_HEAD", "Segmenter"]

SEGMENTATION_HEAD = "head"
"""Name of the head in a `Segmenter`."""
_FINEST = 4
"""Pixels of the image beside one of the finest map that the head reads."""
_DROPOUT = 0.1


class Segmenter(nn.Module):
    """Maps images `[N, 3, H, W]` to `{"logits": [N, K, h, w]}`, at a quarter of their size if the trunk has such a map.

    The weights of `trunk` have the names that timm gives them, after `trunk.`.
    """

    def __init__(self, trunk: nn.Module, num_classes: int, *, width: int) -> None:
        """Add a head with random weights.

        Args:
            trunk: a network of timm without its classifier.
            num_classes: K.
            width: channels of the head.

        Raises:
            ConfigError: the trunk does not return maps from within.
        """
        super().__init__()
        info = _info(trunk)
        if not info or not hasattr(trunk, "forward_intermediates"):
            raise ConfigError(f"{type(trunk).__qualname__} of timm gives no maps for a head; choose another network")
        last = {each["reduction"]: number for number, each in enumerate(info) if each["reduction"] >= _FINEST}
        self._indices = sorted(last.values())
        self.trunk = trunk
        self.head = _Head([info[number]["num_chs"] for number in self._indices], num_classes, width)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's description of the stages, with the names that they have here."""
        return [{**each, "module": f"trunk.{each['module']}"} for each in _info(self.trunk)]

    @property
    def pretrained_cfg(self) -> Any:
        """timm's description of the images that the trunk was trained on."""
        return getattr(self.trunk, "pretrained_cfg", None)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits of the pixels by name."""
        trunk: Any = self.trunk
        maps = trunk.forward_intermediates(images, indices=self._indices, norm=True, intermediates_only=True)
        return {"logits": self.head(maps)}


class _Head(nn.Module):
    """The decoder of SegFormer (Xie et al., arXiv 2105.15203) with 1x1 convolutions.

    Each map gets the same number of channels and the size of the finest one; two layers read all of them together.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(widths) * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [level(each) for level, each in zip(self.levels, maps, strict=True)]
        size = levels[0].shape[2:]
        same = [each if each.shape[2:] == size else interpolate(each, size, mode="bilinear") for each in levels]
        logits: Tensor = self.classifier(self.dropout(self.fuse(torch.cat(same, dim=1))))
        return logits


def _info(trunk: nn.Module) -> Sequence[Mapping[str, Any]]:
    found = getattr(trunk, "feature_info", ())
    return tuple(getattr(found, "info", found) or ())
