"""Run a student once on two rows, to know the names and shapes of its outputs and layers before training."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.returned import returned_losses, student_outputs
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.features import capture_features
from kd_pipeline.models.modules import call_network, deployed_network, eval_mode, trial_inputs

__all__ = ["DryRun", "check_logits", "run_dry"]


class DryRun(NamedTuple):
    """What one pass of a student gave, by name."""

    outputs: dict[str, Tensor]
    """What it returns."""
    features: dict[str, Tensor]
    """The outputs of the layers that were asked for."""
    losses: dict[str, Tensor]
    """Losses of its own, which it may return in training mode only."""


def run_dry(student: nn.Module, layers: Sequence[str], example: Mapping[str, Tensor]) -> DryRun:
    """Run `student` in eval mode on `example`, inputs of a few rows by name; its modes are unchanged.

    Raises:
        ConfigError: it fails, or returns something that has no names.
    """
    name, inputs = type(student).__qualname__, trial_inputs(student, example)
    try:
        with (
            eval_mode(student),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            capture_features(deployed_network(student), layers) as features,
        ):
            outputs = call_network(student, inputs)
        return DryRun(dict(student_outputs(outputs)), dict(features), returned_losses(outputs))
    except ConfigError:
        raise
    except Exception as exc:
        shapes = ", ".join(
            f"{list(each.shape)}" if len(example) == 1 else f"{key} {list(each.shape)}" for key, each in example.items()
        )
        what = "zeros" if all(not each.any() for each in example.values()) else "a batch of two rows"
        raise ConfigError(f"the student {name} fails on {what} {shapes}: {exc}") from exc


def check_logits(
    student: nn.Module,
    outputs: Mapping[str, Tensor],
    num_classes: int | None,
    *,
    num_rows: int,
    needed_by: Sequence[str],
) -> None:
    """Raise a ConfigError if the logits lack, or have another number of classes than the data."""
    name = type(student).__qualname__
    if LOGITS not in outputs:
        found = ", ".join(f"{key!r} {list(output.shape)}" for key, output in outputs.items()) or "losses"
        maps = [key for key, each in outputs.items() if each.ndim == 4 and each.shape[1] == num_classes]
        raise ConfigError(
            f"the student {name} returns {found}, and no logits, which {' and '.join(needed_by)} compares: give it a "
            "head with num_classes, or set distill.loss: null and distill.features to what is to be compared"
            + (f"; if {maps[0]!r} has the logits of each pixel, return {{'logits': it}}" if maps else "")
        )
    found_shape = list(outputs[LOGITS].shape)
    is_map = len(found_shape) == 4
    if num_classes is not None and (found_shape[:2] if is_map else found_shape) != [num_rows, num_classes]:
        grid = f", {', '.join(map(str, found_shape[2:]))}" if is_map else ""
        raise ConfigError(
            f"the student {name} should return logits [{num_rows}, {num_classes}{grid}] for {num_rows} samples of "
            f"{num_classes} classes, got {found_shape}; set its num_classes"
        )
