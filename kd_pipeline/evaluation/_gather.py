"""Join the rows of all ranks."""

import torch
import torch.distributed
from torch import Tensor

__all__ = ["of_all_ranks"]


def of_all_ranks(rows: Tensor) -> Tensor:
    """Concatenate the `rows` `[n, ...]` of all ranks, on every rank; n may differ."""
    world_size = torch.distributed.get_world_size()
    number = torch.tensor([len(rows)], device=rows.device)
    numbers = [torch.zeros_like(number) for _ in range(world_size)]
    torch.distributed.all_gather(numbers, number)
    padded = torch.cat([rows, rows.new_zeros(int(max(numbers)) - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([part[: int(num)] for part, num in zip(gathered, numbers, strict=True)])
