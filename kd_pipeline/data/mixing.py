"""Mixup and CutMix: planned on the host from the plan's uniform numbers, applied on the device to whole batches.

Rows 2k and 2k + 1 of a batch are partners, and each is mixed with the other by its own numbers. Batches have an even
size, so partners are neighbors in the epoch's order for any batch size, rank and number of ranks. If an epoch repeats
each sample `repeats` times in a row, partners are `repeats` rows apart, which keeps a sample from being its own
partner, and batches are a multiple of `2 * repeats`. The only exception is the smaller last batch of
`last_batch: keep`, whose split between ranks may separate partners.
"""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.auto_augment import Array

__all__ = ["MixSettings", "at_size", "beta_quantiles", "mix_images", "mix_labels", "plan_mixing"]


class MixSettings(Settings):
    """Mixing of training images, each by its own numbers, as in timm's `Mixup(mode="elem")`.

    timm's default is to mix a whole batch by one number and to smooth labels by 0.1.

    Mixup (Zhang et al., arXiv 1710.09412) is a weighted sum of two images, CutMix (Yun et al., arXiv 1905.04899) pastes
    a rectangle of one image into the other. The label becomes the classes' fractions of the pixels.
    """

    mixup: float = Field(default=0.0, ge=0)
    """Alpha: an image keeps a fraction drawn from Beta(mixup, mixup); 0 for no mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha: the rectangle, before clipping to the image, covers a fraction drawn from Beta(cutmix, cutmix); 0 for no
    CutMix."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the images that are mixed."""
    switch: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the mixed images that get CutMix if both are on."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Part of each label that is spread evenly over the classes, mixed or not; the task loss has its own setting."""

    @model_validator(mode="after")
    def _something_is_on(self) -> "MixSettings":
        if self.mixup == self.cutmix == 0:
            raise ValueError("mix needs mixup or cutmix above 0; leave out mix for neither")
        return self

    @property
    def num_draws(self) -> int:
        """Uniform numbers that a view needs, those of the transform's ops included."""
        return _LEFT + 1


def plan_mixing(
    settings: MixSettings, draws: Array, valid: NDArray[np.bool_], *, size: tuple[int, int], repeats: int = 1
) -> NDArray[np.int64]:
    """How each image of a batch is mixed, `[N, 6]`, for `mix_images` and `mix_labels`.

    The columns are the partner's row; the weight of the image's own pixels in units of 2**-24; and top, left, bottom
    and right of the partner's rectangle. A row without a partner, or with an invalid image in the pair, is not mixed:
    it is its own partner, with full weight and no rectangle.

    Args:
        settings: the kind and strength of the mixing.
        draws: `[N, settings.num_draws]`, uniform numbers of the samples.
        valid: `[N]`, False for padding and substitutes.
        size: height and width of the images in pixels.
        repeats: how often in a row each sample occurs.
    """
    rows = np.arange(len(draws))
    partner = np.where(rows // repeats % 2 == 0, rows + repeats, rows - repeats)
    partner = np.where(partner < len(rows), partner, rows)
    is_mixed = (draws[:, _GATE] < settings.probability) & valid & valid[partner] & (partner != rows)
    is_cut = draws[:, _SWITCH] < (settings.switch if settings.mixup and settings.cutmix else bool(settings.cutmix))
    is_cut, is_summed = is_cut & is_mixed, ~is_cut & is_mixed
    own = np.where(is_summed, beta_quantiles(settings.mixup or 1.0, draws[:, _SHARE]), 1.0)
    covered = np.where(is_cut, 1 - beta_quantiles(settings.cutmix or 1.0, draws[:, _SHARE]), 0.0)
    sides = np.array(size)
    extent = np.floor(sides * np.sqrt(covered)[:, None])
    start = np.floor(sides * draws[:, [_TOP, _LEFT]]) - extent // 2
    corners = np.clip(np.concatenate([start, start + extent], axis=1), 0, [*size, *size])
    columns = [np.where(is_mixed, partner, rows), np.round(own * _FULL_WEIGHT), *corners.T]
    return np.stack(columns, axis=1).astype(np.int64)


def at_size(mixing_N6: Tensor, size: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """The plan for images of height and width `size` as one for those of `other`, with rectangles rounded to pixels."""
    if size == other:
        return mixing_N6
    # Numbers of Python's, as a tensor of them would be a copy to the device that the host waits for.
    corners = zip(mixing_N6[:, 2:].unbind(dim=1), size * 2, other * 2, strict=True)
    scaled = [(2 * corner_N * there + here) // (2 * here) for corner_N, here, there in corners]
    return torch.cat([mixing_N6[:, :2], torch.stack(scaled, dim=1)], dim=1)


def mix_images(images_NCHW: Tensor, mixing_N6: Tensor) -> Tensor:
    """Mix images `[N, C, H, W]` as planned by `plan_mixing`, into a new contiguous tensor of their dtype.

    Product and sum are separate calls, each rounded to nearest. Fused into one instruction on only some elements, they
    would make a pixel depend on its address.
    """
    weight_N1HW = _pixel_weights(mixing_N6, *images_NCHW.shape[2:])
    mixed_NCHW = images_NCHW * weight_N1HW.to(images_NCHW.dtype)
    partners_NCHW = images_NCHW.index_select(0, mixing_N6[:, 0])
    return mixed_NCHW.add_(partners_NCHW.mul_((1 - weight_N1HW).to(images_NCHW.dtype)))


def mix_labels(
    labels_N: Tensor, mixing_N6: Tensor, *, num_classes: int, label_smoothing: float, size: tuple[int, int]
) -> Tensor:
    """Class indices `[N]` int64 to mixed labels `[N, num_classes]` float32, each a distribution over the classes.

    Their shares are the classes' fractions of the pixels, before smoothing. `size` is the images' height and width.
    """
    top_N, left_N, bottom_N, right_N = mixing_N6[:, 2:].unbind(dim=1)
    uncovered_N = 1 - ((bottom_N - top_N) * (right_N - left_N)).float() / math.prod(size)
    own_N1 = (mixing_N6[:, 1].float() / _FULL_WEIGHT * uncovered_N)[:, None]
    classes_K = torch.arange(num_classes, device=labels_N.device)
    own_NK, partner_NK = (chosen_N[:, None] == classes_K for chosen_N in (labels_N, labels_N[mixing_N6[:, 0]]))
    return (own_NK * own_N1 + partner_NK * (1 - own_N1)) * (1 - label_smoothing) + label_smoothing / num_classes


def beta_quantiles(alpha: float, uniforms: Array) -> Array:
    """Quantiles of Beta(alpha, alpha) at the probabilities `uniforms` `[N]`, with an error of about 1e-4.

    The usual samplers of a Beta distribution use a random number of uniform numbers. This uses one, by interpolating a
    table of the integrated density.
    """
    probability, t = _beta_table(alpha)
    lower = np.interp(np.minimum(uniforms, 1 - uniforms), probability, t) ** _power(alpha) / 2
    return np.where(uniforms < 0.5, lower, 1 - lower)


@cache
def _beta_table(alpha: float) -> tuple[Array, Array]:
    """Values of the distribution function, and of t, for the lower half x = t**power / 2.

    The power removes the pole that the density has at 0 for alpha below 1.
    """
    t = np.linspace(0, 1, 2**12 + 1)
    x = t ** _power(alpha) / 2
    density = (1 - x) ** (alpha - 1) if alpha < 1 else (4 * x * (1 - x)) ** (alpha - 1)
    integral = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return integral / integral[-1] / 2, t


def _power(alpha: float) -> float:
    return max(1.0, 1 / alpha)


def _pixel_weights(mixing_N6: Tensor, height: int, width: int) -> Tensor:
    """Weights of each image's own pixels, `[N, 1, H, W]` float32; 0 in the rectangle."""
    _, weight, top, left, bottom, right = mixing_N6[:, :, None].unbind(dim=1)
    y, x = (torch.arange(length, device=mixing_N6.device) for length in (height, width))
    is_row, is_column = (top <= y) & (y < bottom), (left <= x) & (x < right)
    is_outside = ~(is_row[:, :, None] & is_column[:, None, :])
    return (is_outside * (weight.float() / _FULL_WEIGHT)[:, :, None])[:, None]


_FULL_WEIGHT = 2**24
"""The weight 1, at the resolution of float32."""

# Slots of the plan's uniform numbers, between those of `kd_pipeline.data.ops` and of
# `kd_pipeline.data.auto_augment`: whether to mix, mixup or CutMix, how much, and where.
_GATE, _SWITCH, _SHARE, _TOP, _LEFT = range(35, 40)
