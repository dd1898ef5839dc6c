"""The user's own optimizer of a run, with its scheduler: checked against what is trained."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_pipeline.errors import ConfigError

__all__ = ["OwnOptimizer", "use_own_optimizer"]

OwnOptimizer = Optimizer | tuple[Optimizer, Any] | Callable[[nn.Module], Any]
"""An optimizer, a pair of it and its scheduler, which steps after each step of the optimizer, or a function that makes
either of a module whose parameters are those of `student` and `distillation`, its children."""


def use_own_optimizer(own: OwnOptimizer, student: nn.Module, distillation: nn.Module) -> dict[str, Any]:
    """What Lightning's `configure_optimizers` returns for an optimizer of the user's own.

    Args:
        own: the optimizer.
        student: the network to train.
        distillation: the loss, whose projectors are trained too.

    Raises:
        ConfigError: it is no optimizer, or does not train the student and every projector.
    """
    made = own
    if not isinstance(own, Optimizer | tuple):
        made = own(nn.ModuleDict({"student": student, "distillation": distillation}))
    optimizer, scheduler = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            "optimizer should be a torch optimizer, a pair (optimizer, scheduler), or a function of a module that "
            f"returns either, and it is {type(made).__qualname__}"
        )
    _check_parameters(optimizer, student, distillation)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "optimizer: ReduceLROnPlateau needs a metric, and a scheduler of a run steps after each optimizer step; "
            "use one that follows the number of steps"
        )
    found: dict[str, Any] = {"optimizer": optimizer}
    return found if scheduler is None else {**found, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _check_parameters(optimizer: Optimizer, student: nn.Module, distillation: nn.Module) -> None:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in student.parameters()):
        raise ConfigError(
            "optimizer: it trains no parameter of the student; make it of student.parameters() of the very object that "
            "is trained, or pass a function: lambda module: torch.optim.SGD(module.parameters(), lr=0.1)"
        )
    lacking = [
        name
        for name, parameter in distillation.named_parameters()
        if parameter.requires_grad and id(parameter) not in trained
    ]
    if lacking:
        raise ConfigError(
            f"optimizer: it does not train {lacking[0]!r} of the loss ({len(lacking)} in all), a projector that learns "
            "with the student; pass a function, whose module has all parameters: "
            "lambda module: torch.optim.SGD(module.parameters(), lr=0.1)"
        )
