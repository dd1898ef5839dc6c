"""A student whose weights are shared out among the processes (FSDP), and those weights made whole again."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_sharded", "shard", "whole", "whole_weights"]


def shard(module: nn.Module, mesh: Any) -> None:
    """Leave this process its share of the parameters of `module`, which is changed in place.

    A process has the whole of one block at a time, while it computes with it. Blocks are the members of a `Sequential`
    or `ModuleList` that have layers of their own, such as those of residual networks and transformers.

    Args:
        module: a network that is called as a whole.
        mesh: the processes.
    """
    from torch.distributed.fsdp import fully_shard  # here, as it takes a second to import

    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    # Kept whole between forward and backward, the root would be so in validation too, where nothing takes it apart.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was here."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with the shares of all processes, each of which must ask; itself where it is not shared out."""
    full_tensor = getattr(tensor, "full_tensor", None)  # a DTensor has it
    found: Tensor = tensor if full_tensor is None else full_tensor()
    return found


@torch.no_grad()
def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module` with the shares of all processes, each of which must ask."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Those inside others first."""
    for child in module.children():
        yield from _blocks(child)
        if isinstance(module, nn.Sequential | nn.ModuleList) and _has_weights(child):
            yield child


def _has_weights(block: nn.Module) -> bool:
    is_composite = any(True for _ in block.children()) and not isinstance(block, nn.ModuleList)
    return is_composite and any(True for _ in block.parameters())
