"""Helpers for any `nn.Module`: layer names, a frozen copy, outputs by name."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_pipeline.errors import TeacherError

__all__ = ["frozen_copy", "is_channels_last", "is_in_layer", "named_outputs"]


def is_in_layer(name: str, layer: str) -> bool:
    """Whether `name`, of a parameter, buffer or module, is `layer` or inside it."""
    return f"{name}.".startswith(f"{layer}.")


def is_channels_last(module: nn.Module) -> bool:
    """Whether the convolutions of `module` have their weights in channels-last order, as `module.to` makes them."""
    return any(
        # Weights of 1x1 are in both orders.
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in module.parameters()
    )


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` in eval mode, without gradients; `module` is unchanged.

    Raises:
        TeacherError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module).eval().requires_grad_(False)
    except Exception as exc:
        raise TeacherError(f"the teacher {type(module).__qualname__} cannot be copied: {exc}") from exc


def named_outputs(output: object) -> Mapping[str, Tensor]:
    """The return value of a module by name: a tensor is `"logits"`, a mapping keeps its keys.

    Raises:
        TeacherError: it is something else, or has no `"logits"`.
    """
    if isinstance(output, Tensor):
        return {"logits": output}
    if not isinstance(output, Mapping):
        raise TeacherError(
            f"a teacher returns a tensor or a mapping of tensors with 'logits', got {type(output).__qualname__}; "
            "wrap the module to return one"
        )
    if "logits" not in output:
        raise TeacherError(f"a teacher returns 'logits' among its outputs, got {', '.join(map(repr, output))}")
    for key, value in output.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TeacherError(f"a teacher returns tensors by name, got {type(value).__qualname__} for {key!r}")
    return output
