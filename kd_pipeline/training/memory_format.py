"""Whether the student trains in channels-last order (NHWC), in which most convolutions are faster."""

import logging
from typing import Literal

import torch
from torch import nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import eval_mode, zero_images

__all__ = ["ChannelsLast", "use_channels_last"]

_logger = logging.getLogger("kd_pipeline")

ChannelsLast = bool | Literal["auto"]
"""`auto` is channels last where that is faster."""


def use_channels_last(
    student: nn.Module, setting: ChannelsLast, *, image_shape: tuple[int, int, int], device: torch.device, is_half: bool
) -> None:
    """Put the weights of `student` in channels-last order, in place, if `setting` says so.

    With `auto` that depends on layers, device and precision alone. A student that can only run in the usual order, such
    as one with `x.view(len(x), -1)` after a convolution, keeps it.

    Args:
        student: the network, on any device.
        setting: what to do.
        image_shape: `(C, H, W)` of its images.
        device: where it will train.
        is_half: whether its convolutions compute in 16 bits.

    Raises:
        ConfigError: the setting is True and the student does not run so.
    """
    if setting is False or (setting == "auto" and not _is_faster(student, device, is_half)):
        return
    student.to(memory_format=torch.channels_last)
    problem = _problem(student, image_shape)
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
    return bool(layers) and not (is_half and any(layer.groups == layer.in_channels > 1 for layer in layers))


def _problem(student: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """Why `student` fails on two images in channels-last order; None if it does not."""
    try:
        with eval_mode(student), torch.no_grad():
            student(zero_images(student, image_shape).to(memory_format=torch.channels_last))
    except Exception as exc:  # a user's own network may raise anything
        return str(exc).partition("\n")[0]
    return None
