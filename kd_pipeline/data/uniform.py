"""Which finished images are a single color: a decoder that fails silently often returns black or gray."""

import torch
from torch import Tensor

__all__ = ["is_uniform"]

_STRIDE = 8
"""Every 8th pixel in both directions is looked at first; hardly any image passes that and has more than one color."""


def is_uniform(images: Tensor) -> Tensor:
    """`[N]` bool, whether all pixels of an image `[N, C, H, W]` have the same color, without waiting for the device.

    NaN pixels never count as equal.
    """
    first = images[:, :, :1, :1]
    if images.device.type != "cpu":
        return (images == first).flatten(1).all(1)
    uniform = (images[:, :, ::_STRIDE, ::_STRIDE] == first).flatten(1).all(1)
    for row in uniform.nonzero().flatten().tolist():
        uniform[row] = torch.equal(images[row], first[row].expand_as(images[row]))
    return uniform
