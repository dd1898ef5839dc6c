"""Run a student once on zeros, to know the names and shapes of its outputs and layers before training."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.features import capture_features
from kd_pipeline.models.modules import call_network, eval_mode, named_outputs, trial_inputs

__all__ = ["check_logits", "run_on_zeros", "student_outputs"]


def student_outputs(outputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a student returns, by name.

    Raises:
        ConfigError: it is neither a tensor nor a mapping of tensors.
    """
    try:
        return named_outputs(outputs, owner="a student")
    except TeacherError as exc:
        raise ConfigError(str(exc)) from None


def run_on_zeros(
    student: nn.Module, layers: Sequence[str], example: Mapping[str, Tensor] | tuple[int, int, int]
) -> dict[str, Tensor]:
    """The student's outputs, or the features of `layers`, for an example of two rows; its modes are unchanged.

    `example` is its inputs by name, or the `(C, H, W)` of images, which are then zeros.
    """
    name = type(student).__qualname__
    inputs = trial_inputs(student, example)
    try:
        with (
            eval_mode(student),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            capture_features(student, layers) as features,
        ):
            outputs = call_network(student, inputs)
        return dict(features) if layers else dict(student_outputs(outputs))
    except ConfigError:
        raise
    except Exception as exc:
        named = {"": inputs} if isinstance(inputs, Tensor) else inputs
        shapes = ", ".join(f"{key} {list(each.shape)}".strip() for key, each in named.items())
        what = "zeros" if isinstance(example, tuple) else "an example"
        raise ConfigError(f"the student {name} fails on {what} {shapes}: {exc}") from exc


def check_logits(
    student: nn.Module, outputs: Mapping[str, Tensor], num_classes: int | None, *, needed_by: Sequence[str]
) -> None:
    """Raise a ConfigError if the logits lack, or have another number of classes than the data."""
    name = type(student).__qualname__
    if LOGITS not in outputs:
        found = ", ".join(f"{key!r} {list(output.shape)}" for key, output in outputs.items())
        raise ConfigError(
            f"the student {name} returns {found}, and no logits, which {' and '.join(needed_by)} compares: give it a "
            "head with num_classes, or set distill.loss: null and distill.features to what is to be compared"
        )
    found_shape = list(outputs[LOGITS].shape)
    if num_classes is not None and found_shape != [2, num_classes]:
        raise ConfigError(
            f"the student {name} should return logits [2, {num_classes}] for 2 images of {num_classes} classes, got "
            f"{found_shape}; set its num_classes"
        )
