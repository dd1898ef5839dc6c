"""Tensors that say that they are on a GPU and have no values, for what runs on a GPU but is tested without one.

torch refuses for them what a GPU refuses or waits for: operations on tensors of two devices, values that the host reads
(`.item()`, `if tensor`), and results whose shape depends on values (`nonzero`, boolean indexing). Copies between host
and GPU are collected. torch cannot run the backward pass of such tensors without CUDA.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Copy:
    """A copy between host and GPU."""

    to: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    waits: bool
    """Whether the host waits until it is done; one from pinned memory only does not if it is `non_blocking`."""


class OnGpu:
    """A context in which tensors without values stand in for those of a GPU.

    with OnGpu() as gpu:
        logits = gpu.module(net)(gpu.tensor(images))
    assert logits.device == DEVICE and not gpu.copies
    """

    def __init__(self) -> None:
        self._fake, self._seen = FakeTensorMode(), _Copies()

    @property
    def copies(self) -> list[Copy]:
        """Between host and GPU so far."""
        return self._seen.copies

    def __enter__(self) -> Self:
        self._fake.__enter__()
        self._seen.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._seen.__exit__(kind, exc, traceback)
        self._fake.__exit__(kind, exc, traceback)

    def tensor(self, like: Tensor) -> Tensor:
        """One on the GPU of the same shape, strides and dtype."""
        empty = _empty_like(like)
        return empty.requires_grad_(like.requires_grad) if like.is_leaf else empty

    def fake(self, tensor: Tensor) -> Tensor:
        """One on the host of the same shape and dtype, of a tensor that torch did not make, such as of an array."""
        return self._fake.from_tensor(tensor)

    def module(self, module: nn.Module) -> nn.Module:
        """`module` itself, with all its parameters and buffers on the GPU, wherever it was made."""
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None:
                    each._parameters[name] = nn.Parameter(_empty_like(parameter), parameter.requires_grad)
            for name, buffer in each._buffers.items():
                if buffer is not None:
                    each._buffers[name] = _empty_like(buffer)
        return module


def _empty_like(like: Tensor) -> Tensor:
    """It asks for properties alone: `like` may have been made outside of the context, and have values."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=DEVICE)


class _Copies(TorchDispatchMode):
    """Collects copies between host and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Copy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = args[1] if func is torch.ops.aten.copy_.default else args[0]
            non_blocking = kwargs.get("non_blocking", False) or (func is torch.ops.aten.copy_.default and len(args) > 2)
            if given.device.type != result.device.type:
                self.copies.append(Copy(result.device, tuple(given.shape), given.dtype, waits=not non_blocking))
        elif func is torch.ops.aten.lift_fresh.default:
            for tensor in tree_leaves(result):
                if tensor.device.type == "cuda":  # `torch.tensor(..., device="cuda")`
                    self.copies.append(Copy(tensor.device, tuple(tensor.shape), tensor.dtype, waits=True))
        return result
