"""What the loader hands to the training loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

__all__ = ["KDBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KDBatch:
    """One batch; every row describes one sample, in all fields alike.

    `images` is the very buffer that the teacher read: DALI's own or, where images are mixed, one of torch's. It stays
    valid for as long as it is held, and nobody writes to it; whoever wants to change it in place clones it first.
    """

    images: Tensor
    """`[N, 3, H, W]`, float32 or float16, normalized as the transform says."""
    labels: Tensor | None
    """`[N]` int64 class indices, `[N, K]` float32 weights after mixing, or None for unlabeled data."""
    index: Tensor
    """`[N]` int64, position of the sample in its dataset."""
    valid: Tensor
    """`[N]` bool; False for a row that must not count: padding, or a substitute for an unreadable image."""
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    """The teacher's outputs by name, `"logits"` `[N, K]` float32 always among them; empty without a teacher."""

    def to(self, device: torch.device | str) -> Self:
        """This batch on `device`; itself where it is there already, which spares Lightning and accelerate a copy."""
        if self.images.device == torch.device(device):
            return self
        moved = {name: tensor.to(device) for name, tensor in self.teacher.items()}
        labels = None if self.labels is None else self.labels.to(device)
        return replace(
            self,
            images=self.images.to(device),
            labels=labels,
            index=self.index.to(device),
            valid=self.valid.to(device),
            teacher=moved,
        )

    def __len__(self) -> int:
        return int(self.images.shape[0])
