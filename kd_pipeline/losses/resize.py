"""Resize feature maps by two small matrix products, whose gradients are deterministic on GPUs too."""

from typing import Literal

import torch
from torch import Tensor

from kd_pipeline.losses._inputs import no_autocast

__all__ = ["Resizer", "resize_matrix"]


class Resizer:
    """Resizes maps `[N, C, H, W]` to another height and width, in float32 or float64.

    `bilinear` equals `torch.nn.functional.interpolate` with `align_corners=False` and without antialiasing, `area`
    equals `adaptive_avg_pool2d`; `auto` enlarges each side by the first and shrinks it by the second. The gradients of
    these functions are not deterministic on a GPU.
    """

    def __init__(self, how: Literal["auto", "bilinear", "area"]) -> None:
        """Resize in this way."""
        self._how = how
        self._matrices: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """`maps` with this height and width; unchanged, in its own dtype, if it has them."""
        if maps.shape[2:] == size:
            return maps
        with no_autocast(maps):
            maps = maps if maps.dtype == torch.float64 else maps.float()
            if maps.shape[3] != size[1]:
                maps = maps @ self._matrix(maps.shape[3], size[1], maps).T
            if maps.shape[2] != size[0]:
                maps = self._matrix(maps.shape[2], size[0], maps) @ maps
            return maps

    def _matrix(self, old: int, new: int, like: Tensor) -> Tensor:
        """Kept, to be copied to a GPU once."""
        key = old, new, like.dtype, like.device
        if key not in self._matrices:
            how = ("bilinear" if new > old else "area") if self._how == "auto" else self._how
            self._matrices[key] = resize_matrix(old, new, how).to(like)
        return self._matrices[key]


def resize_matrix(old: int, new: int, how: Literal["bilinear", "area"]) -> Tensor:
    """`[new, old]` float64: what each of `old` values in a row adds to each of `new` ones."""
    columns = torch.arange(old, dtype=torch.float64)
    rows = torch.arange(new, dtype=torch.float64)[:, None]
    if how == "area":
        start, end = (rows * old / new).floor(), ((rows + 1) * old / new).ceil()
        covers = ((columns >= start) & (columns < end)).double()
        return covers / covers.sum(dim=1, keepdim=True)
    # A triangle around each new center, in units of old pixels; beyond the outermost centers their values hold.
    centers = ((rows + 0.5) * old / new - 0.5).clamp(0, old - 1)
    return (1 - (centers - columns).abs()).clamp(min=0)
