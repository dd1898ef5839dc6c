"""The mean loss of an epoch, over the valid rows of all ranks, without waiting for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["EpochLoss"]


class EpochLoss:
    """Sums the losses of an epoch's batches; those that are NaN or inf, whose step is skipped, do not count."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        """`[2]` float64 of this rank: the sum over the rows, and their number; None before the first batch."""
        self._restored: Tensor | None = None

    def start_epoch(self) -> None:
        """Start with the first batch of an epoch, or within it after `load`."""
        self._sums, self._restored = self._restored, None

    def add(self, loss: Tensor, num_valid: Tensor) -> None:
        """Add the mean loss of a batch, a scalar, over so many rows."""
        loss = loss.detach().double()
        num_valid = torch.where(loss.isfinite(), num_valid, 0).double()
        sums = torch.stack([torch.where(num_valid > 0, loss, 0) * num_valid, num_valid])
        # Only what is restored has to be moved: zeros on the CPU would be waited for in each epoch.
        self._sums = sums if self._sums is None else sums + self._sums.to(sums.device)
        self._restored = None  # not every version of Lightning says that it resumes within an epoch

    def of_all_ranks(self, trainer: Any) -> tuple[float, float]:
        """The sum over the rows of all ranks, and their number. Call it on all ranks."""
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums.clone()
        sums = sums.to(trainer.strategy.root_device)  # NCCL takes those of GPUs alone
        total, num_rows = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return total, num_rows

    def mean(self, trainer: Any) -> float | None:
        """The mean over all ranks; None if no row counted. Call it on all ranks."""
        total, num_rows = self.of_all_ranks(trainer)
        return total / num_rows if num_rows else None

    def load(self, sums: Sequence[float]) -> None:
        """Go on with what `of_all_ranks` returned within an epoch; on one rank, and on others with zeros."""
        self._sums = self._restored = torch.tensor(sums, dtype=torch.float64)
