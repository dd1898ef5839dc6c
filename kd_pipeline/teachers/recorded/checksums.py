"""Checksums of images, by which a recording knows the images that it was made of."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["checksums"]

_CHUNK = 16
"""Images in a step of a GPU's checksums, to limit its memory."""


def checksums(images: Tensor) -> NDArray[np.uint32]:
    """`[N]`, a checksum of each image `[N, ...]`, float32 or float16: the bits of its pixels times odd numbers, summed.

    Integers that wrap around give the same sum on every device, and a single changed pixel always changes it. It is
    computed on the device of the images, faster than a cryptographic digest.
    """
    bits = images.flatten(1).view(torch.int32 if images.dtype == torch.float32 else torch.int16)
    factors = _factors(bits.shape[1])
    sums = _sums_on_cpu(bits, factors) if images.device.type == "cpu" else _sums_on_gpu(bits, factors)
    return np.asarray(sums, dtype=np.uint32)


def _sums_on_cpu(bits: Tensor, factors: NDArray[np.uint32]) -> list[int]:
    """In NumPy, which takes a third of torch's time."""
    sums = []
    for row in bits.numpy():
        pixels = row.astype(np.int32, copy=False).view(np.uint32)
        # With the upper half of each number added to its lower half, sign and exponent affect all of the product.
        products = pixels >> np.uint32(16)
        products ^= pixels
        products *= factors
        sums.append(int(products.sum(dtype=np.uint32)))
    return sums


def _sums_on_gpu(bits: Tensor, factors: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The same in torch, which has signed integers only, for a few images at a time."""
    factors_P = torch.from_numpy(factors.view(np.int32)).to(bits.device)
    sums = []
    for start in range(0, len(bits), _CHUNK):
        pixels = bits[start : start + _CHUNK].to(torch.int32)
        products = (pixels ^ ((pixels >> 16) & 0xFFFF)) * factors_P
        sums.append(products.sum(1))  # in int64
    return np.asarray(torch.cat(sums).cpu().numpy().astype(np.uint32))


@cache
def _factors(count: int) -> NDArray[np.uint32]:
    """Odd numbers, from a generator whose raw output NumPy promises never to change."""
    return np.random.Philox(key=0).random_raw(count).astype(np.uint32) | np.uint32(1)
