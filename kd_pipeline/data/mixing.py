"""Mixup and CutMix: planned on the host from the plan's numbers, done on the device to whole batches.

Rows 2k and 2k + 1 of a batch are partners: each gets something of the other, by numbers of its own. As batches have
an even size, partners are neighbors in the epoch's order, whatever the batch size, the rank and the number of ranks.
Where an epoch shows every sample `repeats` times in a row, partners are that far apart, so that none is partner of
itself, and batches hold a multiple of `2 * repeats`. There is one exception: the smaller last batch of
`last_batch: keep` is cut into nearly equal parts for several ranks, and a cut may come between partners.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.transforms import Array

__all__ = ["MixSettings", "beta_quantiles", "mix_images", "mix_labels", "mixing"]


class MixSettings(Settings):
    """How training images are mixed; the words are timm's.

    An image is mixed by mixup (Zhang et al., arXiv 1710.09412), a weighted sum of two images, or by CutMix (Yun et
    al., arXiv 1905.04899), a rectangle of one image in the other. Its label becomes the classes' shares in the pixels.
    """

    mixup: float = Field(default=0.0, ge=0)
    """An image keeps a share drawn from Beta(mixup, mixup); 0 for no mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """The rectangle covers a share drawn from Beta(cutmix, cutmix) before it is cut off at the border; 0 for none."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Share of the images that are mixed."""
    switch: float = Field(default=0.5, ge=0, le=1)
    """Share of CutMix where both are on."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the classes, mixed or not; the task loss has one of its own."""

    @model_validator(mode="after")
    def _something_is_on(self) -> "MixSettings":
        if self.mixup == self.cutmix == 0:
            raise ValueError("mix needs mixup or cutmix above 0; leave out mix for neither")
        return self

    @property
    def num_draws(self) -> int:
        """How many of a view's uniform numbers are used, from the first on."""
        return _LEFT + 1


def mixing(
    settings: MixSettings, draws: Array, valid: NDArray[np.bool_], *, size: int, repeats: int = 1
) -> NDArray[np.int64]:
    """What becomes of each image of a batch, `[N, 6]`, for `mix_images` and `mix_labels`.

    The columns are the row of the partner; the weight of the image's own pixels in units of 2**-24; and top, left,
    bottom and right of the rectangle that comes from the partner. A row without a partner, or where one of the two is
    not valid, stays as it is: partner of itself, with its full weight and no rectangle.

    Args:
        settings: which mixing, and how strong.
        draws: `[N, settings.num_draws]`, the samples' own uniform numbers.
        valid: `[N]`, False for padding and substitutes.
        size: height and width of the images.
        repeats: how often in a row each sample comes.
    """
    rows = np.arange(len(draws))
    partner = np.where(rows // repeats % 2 == 0, rows + repeats, rows - repeats)
    partner = np.where(partner < len(rows), partner, rows)
    is_mixed = (draws[:, _GATE] < settings.probability) & valid & valid[partner] & (partner != rows)
    is_cut = draws[:, _SWITCH] < (settings.switch if settings.mixup and settings.cutmix else bool(settings.cutmix))
    is_cut, is_summed = is_cut & is_mixed, ~is_cut & is_mixed
    own = np.where(is_summed, beta_quantiles(settings.mixup or 1.0, draws[:, _SHARE]), 1.0)
    covered = np.where(is_cut, 1 - beta_quantiles(settings.cutmix or 1.0, draws[:, _SHARE]), 0.0)
    extent = np.floor(size * np.sqrt(covered))[:, None]
    first = np.floor(size * draws[:, [_TOP, _LEFT]]) - extent // 2
    corners = np.clip(np.concatenate([first, first + extent], axis=1), 0, size)
    weight = np.round(own * _ONE)
    return np.concatenate([np.where(is_mixed, partner, rows)[:, None], weight[:, None], corners], axis=1).astype(
        np.int64
    )


def mix_images(images: Tensor, columns: Tensor) -> Tensor:
    """Images `[N, 3, H, W]` mixed as `columns` `[N, 6]` say, in a new contiguous tensor of their dtype.

    Product and sum are separate calls, each rounded to the nearest number: pixels do not depend on their place in
    memory, as they may where both are one instruction in some places.
    """
    weight = _weights(columns, images.shape[2], images.shape[3])
    mixed = images * weight.to(images.dtype)
    return mixed.add_(images.index_select(0, columns[:, 0]).mul_((1 - weight).to(images.dtype)))


def mix_labels(labels: Tensor, columns: Tensor, *, num_classes: int, label_smoothing: float, size: int) -> Tensor:
    """Class indices `[N]` int64 to weights `[N, num_classes]` float32 that sum to 1, as the pixels were mixed."""
    top, left, bottom, right = columns[:, 2:].unbind(dim=1)
    uncovered = 1 - ((bottom - top) * (right - left)).float() / size**2
    own = (columns[:, 1].float() / _ONE * uncovered)[:, None]
    classes = torch.arange(num_classes, device=labels.device)
    hard, other = (chosen[:, None] == classes for chosen in (labels, labels[columns[:, 0]]))
    return (hard * own + other * (1 - own)) * (1 - label_smoothing) + label_smoothing / num_classes


def beta_quantiles(alpha: float, uniforms: Array) -> Array:
    """Where the distribution function of Beta(alpha, alpha) has the values `uniforms` `[N]`.

    Drawing from Beta by its definition takes a number of draws that is itself random. This takes one, from a table
    of the integral of the density that is exact to about a ten-thousandth.
    """
    probability, place = _beta_table(alpha)
    lower = np.interp(np.minimum(uniforms, 1 - uniforms), probability, place) ** _power(alpha) / 2
    return np.where(uniforms < 0.5, lower, 1 - lower)


@cache
def _beta_table(alpha: float) -> tuple[Array, Array]:
    """Of the lower half x = t**power / 2: values of the distribution function, and of t.

    The power takes the pole that the density has at 0 for alpha below 1.
    """
    place = np.linspace(0, 1, 2**12 + 1)
    x = place ** _power(alpha) / 2
    density = (1 - x) ** (alpha - 1) if alpha < 1 else (4 * x * (1 - x)) ** (alpha - 1)
    integral = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return integral / integral[-1] / 2, place


def _power(alpha: float) -> float:
    return max(1.0, 1 / alpha)


def _weights(columns: Tensor, height: int, width: int) -> Tensor:
    """Of each image's own pixels, `[N, 1, H, W]` float32: 0 in the rectangle."""
    _, weight, top, left, bottom, right = columns[:, :, None].unbind(dim=1)
    y, x = (torch.arange(length, device=columns.device) for length in (height, width))
    is_row, is_column = (top <= y) & (y < bottom), (left <= x) & (x < right)
    is_outside = ~(is_row[:, :, None] & is_column[:, None, :])
    return (is_outside * (weight.float() / _ONE)[:, :, None])[:, None]


_ONE = 2**24
"""The weight 1; as fine as float32 has it."""

# Slots of the plan's uniform numbers, between those of `kd_pipeline.data.transforms` and of
# `kd_pipeline.data.auto_augment`: whether to mix, how, how much, and where.
_GATE, _SWITCH, _SHARE, _TOP, _LEFT = range(35, 40)
