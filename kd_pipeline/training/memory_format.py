"""Whether the student trains in channels-last order (NHWC), in which most convolutions are faster."""

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import call_network, eval_mode, trial_inputs

__all__ = ["ChannelsLast", "use_channels_last"]

_logger = logging.getLogger("kd_pipeline")

ChannelsLast = bool | Literal["auto"]
"""`auto` is channels last where that is faster."""


def use_channels_last(
    student: nn.Module, setting: ChannelsLast, *, example: Mapping[str, Tensor], device: torch.device, is_half: bool
) -> None:
    """Put the weights of `student` in channels-last order, in place, if `setting` says so.

    With `auto` that depends on layers, device and precision alone. A student that can only run in the usual order, such
    as one with `x.view(len(x), -1)` after a convolution, keeps it.

    Args:
        student: the network, on any device.
        setting: what to do.
        example: its inputs of two rows by name; only images `[2, C, H, W]` have such an order.
        device: where it will train.
        is_half: whether its convolutions compute in 16 bits.

    Raises:
        ConfigError: the setting is True and the student does not run so.
    """
    if setting is False or (setting == "auto" and not _is_faster(student, device, is_half)):
        return
    student.to(memory_format=torch.channels_last)
    problem = _problem(student, example)
    if problem is None:
        return
    if setting is True:
        raise ConfigError(
            f"train.channels_last: the student fails on images in channels-last order: {problem}; use reshape or "
            "flatten instead of view in its forward, or set train.channels_last: false"
        )
    student.to(memory_format=torch.contiguous_format)
    _logger.info("the student does not train in channels-last order, which would be faster: %s", problem)


def _is_faster(student: nn.Module, device: torch.device, is_half: bool) -> bool:
    """Whether `student` has convolutions that channels-last kernels speed up; it makes no difference to the others.

    On CPUs kernels of depthwise convolutions in 16 bits are slower so, and on GPUs those in float32.
    """
    layers = [
        layer for layer in student.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size != layer.stride
    ]
    if device.type == "cuda":
        return is_half and bool(layers)
    if any(_crashes(layer) for layer in layers):
        return False
    return bool(layers) and not (is_half and any(layer.groups == layer.in_channels > 1 for layer in layers))


def _crashes(layer: nn.Conv2d) -> bool:
    """Whether a training step of `layer` in channels-last order can end the process on a CPU.

    Seen with torch 2.14 and several threads: the backward pass of a 1x1 convolution that skips pixels of fewer than 16
    channels writes out of bounds, for batches such as 3 or 29. With 16 channels and more it never did.
    """
    skips = layer.kernel_size == (1, 1) and layer.stride != (1, 1)
    return skips and layer.in_channels // layer.groups < 16


def _problem(student: nn.Module, example: Mapping[str, Tensor]) -> str | None:
    """Why `student` fails on two images in channels-last order; None if it does not."""
    try:
        with eval_mode(student), torch.no_grad():
            inputs = trial_inputs(student, example)
            call_network(student, _channels_last(inputs))
    except Exception as exc:  # a user's own network may raise anything
        return str(exc).partition("\n")[0]
    return None


def _channels_last(inputs: Tensor | Mapping[str, Tensor]) -> Tensor | Mapping[str, Tensor]:
    """`inputs` with what has four dimensions in channels-last order."""

    def reorder(each: Tensor) -> Tensor:
        return each.to(memory_format=torch.channels_last) if each.ndim == 4 else each

    return reorder(inputs) if isinstance(inputs, Tensor) else {name: reorder(each) for name, each in inputs.items()}
