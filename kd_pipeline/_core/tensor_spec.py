"""Shape and dtype of a tensor."""

from dataclasses import dataclass

import torch

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor; None in the shape means any size."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    num_prefix_tokens: int | None = None
    """Of tokens `[N, L, D]`: how many at the start are no part of the image, such as class and register tokens; None
    if it is unknown, and for anything else."""

    def accepts(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a tensor of this shape and dtype fits."""
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(expected in (None, size) for expected, size in zip(self.shape, shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"[{sizes}] {str(self.dtype).removeprefix('torch.')}"
