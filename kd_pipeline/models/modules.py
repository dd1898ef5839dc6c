"""Helpers for any `nn.Module`: layer names, eval mode, a frozen copy, outputs by name."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline.errors import TeacherError

__all__ = [
    "call_network",
    "eval_mode",
    "frozen_copy",
    "is_channels_last",
    "is_in_layer",
    "named_outputs",
    "trial_inputs",
    "zero_images",
]


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


def call_network(network: Callable[..., Any], inputs: Tensor | Mapping[str, Tensor]) -> Any:
    """What a network, or a teacher, returns for its only input, or for several inputs by name.

    A network takes several as keywords, as those of Hugging Face do; a `Teacher` takes the mapping.
    """
    if isinstance(inputs, Tensor) or not isinstance(network, nn.Module):
        return network(inputs)
    return network(**inputs)


@contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Put every module of a network into eval mode, and restore each one's mode afterward; anything else has none."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def zero_images(module: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    """Two images `[2, *image_shape]` of zeros, in the dtype and on the device of the weights of `module`."""
    like = next(module.parameters(), torch.zeros(()))
    return torch.zeros(2, *image_shape, dtype=like.dtype, device=like.device)


def trial_inputs(
    module: nn.Module, example: Mapping[str, Tensor] | tuple[int, int, int]
) -> Tensor | Mapping[str, Tensor]:
    """What to call `module` with for a trial run: `example` on its device, and in its dtype where that is a float.

    Args:
        module: the network.
        example: its inputs by name, of two rows, or the `(C, H, W)` of images, which are then zeros.
    """
    if isinstance(example, tuple):
        return zero_images(module, example)
    like = next(module.parameters(), torch.zeros(()))
    moved = {
        name: each.to(like.device, like.dtype if each.is_floating_point() else None) for name, each in example.items()
    }
    return next(iter(moved.values())) if len(moved) == 1 else moved


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` in eval mode, without gradients; `module` is unchanged.

    Raises:
        TeacherError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module).eval().requires_grad_(False)
    except Exception as exc:
        raise TeacherError(f"the teacher {type(module).__qualname__} cannot be copied: {exc}") from exc


def named_outputs(output: object, *, vector: str = "logits", owner: str = "a teacher") -> Mapping[str, Tensor]:
    """The return value of a module by name.

    A mapping keeps its keys, but for those without a value. A tensor `[N, D]` is called `vector`, and any other, a map
    or tokens, `"spatial"`.

    Raises:
        TeacherError: it is something else. `owner` is whose output it is, for the message.
    """
    if isinstance(output, Tensor):
        return {vector if output.ndim == 2 else "spatial": output}
    if not isinstance(output, Mapping):
        raise TeacherError(
            f"{owner} returns a tensor or a mapping of tensors by name, got {type(output).__qualname__}; wrap the "
            "module to return one"
        )
    named = {key: value for key, value in output.items() if value is not None}
    for key, value in named.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TeacherError(f"{owner} returns tensors by name, got {type(value).__qualname__} for {key!r}")
    if not named:
        raise TeacherError(f"{owner} returns tensors by name, got none")
    return named
