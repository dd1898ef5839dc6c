"""The batch that the loader yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

__all__ = ["KDBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KDBatch:
    """One batch; row i of every field belongs to the same sample.

    `images` is the buffer that the teacher read: DALI's own, or torch's if images are mixed. It is not overwritten
    while it is referenced. Clone it before changing it in place.
    """

    images: Tensor
    """`[N, 3, H, W]`, float32 or float16, normalized by the transform."""
    labels: Tensor | None
    """`[N]` int64 class indices, `[N, K]` float32 weights after mixing, or None for unlabeled data."""
    index: Tensor
    """`[N]` int64, index of the sample in the dataset."""
    valid: Tensor
    """`[N]` bool; False for a row to ignore: padding, or the substitute for an unreadable image."""
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    """The teacher's outputs by name, float32: those of `Teacher.outputs`, such as `"logits"` `[N, K]`; empty without a
    teacher."""

    def to(self, device: torch.device | str) -> Self:
        """The batch on `device`; returns `self` if it is there already, as Lightning and accelerate expect."""
        if self.images.device == torch.device(device):
            return self
        return replace(
            self,
            images=self.images.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            index=self.index.to(device),
            valid=self.valid.to(device),
            teacher={name: tensor.to(device) for name, tensor in self.teacher.items()},
        )

    def __len__(self) -> int:
        return int(self.images.shape[0])
