"""What masks say about the positions of maps: the class of each one, and which of them count."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.resize import Resizer

__all__ = ["PixelLabels", "at_grid", "predicted_classes"]


class PixelLabels(NamedTuple):
    """The masks of a batch, of which pixels with the ignore index count nowhere."""

    masks: Tensor
    """`[N, H, W]` int64, the class of each pixel or the ignore index."""
    ignore_index: int

    def at(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The classes `[N, h, w]` at another height and width, and which positions count, bool."""
        labels = at_grid(self.masks, size)
        return labels, labels != self.ignore_index

    def mask_of(self, features: Tensor) -> Tensor:
        """Which positions of maps `[N, C, h, w]`, or of the tokens `[N, L, D]` of a square, count; bool.

        Raises:
            ConfigError: the features have no positions on a grid.
        """
        if features.ndim == 4:
            return self.at((features.shape[2], features.shape[3]))[1]
        side = math.isqrt(features.shape[1]) if features.ndim == 3 else 0
        if side**2 != features.shape[1] or features.ndim != 3:
            raise ConfigError(
                f"skip_ignored leaves out positions of maps [N, C, h, w] and of the tokens of a square, got "
                f"{list(features.shape)}; set it to false, or name an output or layer with a map"
            )
        return self.at((side, side))[1].flatten(1)


def at_grid(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks `[N, H, W]` at another height and width: at each center the pixel there, as in nearest-exact of torch."""
    if masks.shape[1:] == size:
        return masks
    rows, columns = (
        ((torch.arange(new, device=masks.device) + 0.5) * (old / new)).long()
        for old, new in zip(masks.shape[1:], size, strict=True)
    )
    return masks[:, rows[:, None], columns]


def predicted_classes(logits_NKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The top class of each pixel at a height and width, `[N, H, W]` int64 on the CPU; logits are enlarged first."""
    resize = Resizer("bilinear")
    # One by one, as enlarged logits take much memory.
    return torch.cat([resize(row[None].float(), size).argmax(1) for row in logits_NKhw.cpu()])
