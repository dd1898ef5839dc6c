"""What the ranks of a run know together, for statistics and references that one rank alone does not have."""

import torch
from torch import Tensor, distributed

__all__ = ["RowGatherer", "from_rank_zero", "is_distributed", "sum_over_ranks"]


def is_distributed() -> bool:
    """Whether there are several ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sum_over_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sum of each over the ranks, in one collective; all must have the same dtype."""
    if not is_distributed():
        return tensors
    total = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(total)
    parts = torch.split(total, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def from_rank_zero(tensor: Tensor) -> Tensor:
    """What rank zero has, in place."""
    if is_distributed():
        distributed.broadcast(tensor, 0)
    return tensor


class RowGatherer:
    """Gathers the rows of all ranks, which may be of different numbers in the last batch of an epoch."""

    def __init__(self) -> None:
        self._capacity = 0
        """The largest number of rows that a rank had."""

    def __call__(self, rows_ND: Tensor, valid_N: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of rank 0, then those of rank 1 and so on, and which of them are valid; there is no gradient.

        Call it on all ranks. A rank with few rows is padded with rows that are not valid.
        """
        rows_ND, valid_N = rows_ND.detach().contiguous(), valid_N.contiguous()
        if not is_distributed():
            return rows_ND, valid_N
        if len(rows_ND) > self._capacity:
            # Only the last batch of an epoch is smaller, and it is so on all ranks: they all are here, or none is.
            self._capacity = _max_over_ranks(len(rows_ND), rows_ND.device)
        num_missing = self._capacity - len(rows_ND)
        if num_missing:
            rows_ND = torch.cat([rows_ND, rows_ND.new_zeros(num_missing, rows_ND.shape[1])])
            valid_N = torch.cat([valid_N, valid_N.new_zeros(num_missing)])
        num_ranks = distributed.get_world_size()
        rows = [torch.empty_like(rows_ND) for _ in range(num_ranks)]
        valid = [torch.empty_like(valid_N, dtype=torch.uint8) for _ in range(num_ranks)]
        distributed.all_gather(rows, rows_ND)
        distributed.all_gather(valid, valid_N.to(torch.uint8))
        return torch.cat(rows), torch.cat(valid).bool()


def _max_over_ranks(number: int, device: torch.device) -> int:
    """It waits for the device."""
    largest = torch.tensor(number, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)
