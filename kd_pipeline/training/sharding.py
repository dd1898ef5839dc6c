"""Shard a student over processes (FSDP) and gather its full weights again."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline.models.modules import deployed_network

__all__ = ["full_state_dict", "full_tensor", "is_sharded", "load_full_state_dict", "reach_outputs", "shard"]


def shard(module: nn.Module, mesh: Any) -> None:
    """Shard the parameters of `module` over `mesh`, in place.

    Each block gathers its parameters only while it computes. Blocks are the members of a `Sequential` or `ModuleList`
    that have layers of their own, such as the blocks of residual networks and transformers.

    Args:
        module: the network; its `forward` must be the entry point.
        mesh: the device mesh of the data-parallel processes.
    """
    from torch.distributed.fsdp import fully_shard  # here because importing it takes a second

    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    # Validation calls the deployed network by itself. By default a root stays gathered after forward, and in validation
    # no backward pass would reshard it.
    for root in dict.fromkeys((deployed_network(module), module)):
        fully_shard(root, mesh=mesh, reshard_after_forward=True)


def reach_outputs(loss: Tensor, outputs: Iterable[Tensor]) -> Tensor:
    """`loss`, whose backward pass gives `outputs` of a sharded network a gradient of 0 too.

    A block gathers its weights for the backward pass when its output gets a gradient, which it may not where only
    layers are compared.
    """
    reached: Tensor = _Reach.apply(loss, *outputs)
    return reached


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on `module`."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a `DTensor`; call it on all ranks. Any other tensor is returned as it is."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module` with every tensor gathered; call it on all ranks."""
    return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, the same on all ranks, into those of `module`, of which a sharded one keeps its part.

    Call it on all ranks.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, tensor in module.state_dict().items():
        whole = state[name].to(tensor.device)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)


class _Reach(torch.autograd.Function):
    """Not a sum times 0, which is NaN where an output is."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs: Tensor) -> Tensor:
        ctx.shapes = [(output.shape, output.dtype) for output in outputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules to shard one by one, inner ones first."""
    for child in module.children():
        yield from _blocks(child)
        if isinstance(module, nn.Sequential | nn.ModuleList) and _has_weights(child):
            yield child


def _has_weights(block: nn.Module) -> bool:
    is_composite = any(True for _ in block.children()) and not isinstance(block, nn.ModuleList)
    return is_composite and any(True for _ in block.parameters())
