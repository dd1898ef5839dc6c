"""Find the parameters that no term of the loss reaches, such as those of a head where only features are compared."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.modules import call_network, eval_mode, trial_inputs

__all__ = ["unreached_parameters"]


def unreached_parameters(student: nn.Module, distillation: Distillation, *, example: Mapping[str, Tensor]) -> list[str]:
    """Names of the trainable parameters of `student` that get no gradient, by one pass of two rows.

    The student runs in eval mode and is left as it was; one with losses of its own runs as a copy in training mode.

    Args:
        student: the network.
        distillation: the loss.
        example: inputs of two rows by name.

    Raises:
        ConfigError: the student does not return what the loss compares.
    """
    named = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    if not named:
        return []
    has_losses = bool(distillation.settings.student_losses)
    student = copy.deepcopy(student).train() if has_losses else student
    if has_losses:
        named = {name: student.get_parameter(name) for name in named}
    with (
        torch.random.fork_rng(devices=[], enabled=has_losses),
        nullcontext() if has_losses else eval_mode(student),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        distillation.student_features(student) as features,
    ):
        outputs = call_network(student, trial_inputs(student, example))
    compared = [each.float().sum() for each in distillation.compared(outputs, features) if each.requires_grad]
    if not compared:
        return list(named)
    gradients = torch.autograd.grad(torch.stack(compared).sum(), list(named.values()), allow_unused=True)
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
