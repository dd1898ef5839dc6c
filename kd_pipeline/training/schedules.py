"""The learning rate's course, as a pure function of how many epochs are done."""

import math
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import ConfigError

__all__ = ["ScheduleSettings", "build_schedule", "check_length", "factor"]

_KNOWN_TO = {
    "cosine": {"final_factor", "cooldown_epochs"},
    "linear": {"final_factor", "cooldown_epochs"},
    "poly": {"final_factor", "cooldown_epochs", "power"},
    "step": {"milestones", "gamma"},
    "constant": set[str](),
}
"""Settings that not every kind has, by the kinds that have them."""


class ScheduleSettings(Settings):
    """How the learning rate changes. A setting that the chosen kind does not use is an error.

    A straight warm-up comes first, then the course that `kind` names takes the rest of the run up to the cool-down.
    """

    kind: Literal["cosine", "linear", "poly", "step", "constant"] = "cosine"
    per: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes with each step of the optimizer, or only from epoch to epoch."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_start: float = Field(default=0.01, ge=0, le=1)
    """Factor of the learning rate at the first step of a warm-up."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Factor of the learning rate at the end, for `cosine`, `linear` and `poly`."""
    cooldown_epochs: float = Field(default=0.0, ge=0)
    """How long these three stay at `final_factor` before the run ends."""
    power: PositiveFloat = 0.9
    """Of `poly`, which goes as (1 - share of the course done) to this power."""
    milestones: tuple[PositiveFloat, ...] = ()
    """Epochs, counted from the start of the run, after which `step` multiplies the learning rate by `gamma`."""
    gamma: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        for name in sorted(set().union(*_KNOWN_TO.values()) - _KNOWN_TO[self.kind]):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {value} means nothing to kind: {self.kind}; remove it or change kind")
        if self.kind == "step" and not self.milestones:
            raise ValueError("kind: step needs milestones, such as milestones: [150, 180, 210]")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones should rise from one to the next, got {list(self.milestones)}")
        return self


def factor(settings: ScheduleSettings, epoch: float, epochs: int) -> float:
    """What the learning rate is multiplied by after `epoch` epochs, a fraction within one, of a run of `epochs`."""
    if settings.per == "epoch":
        epoch = math.floor(epoch)
    if epoch < settings.warmup_epochs:
        return settings.warmup_start + (1 - settings.warmup_start) * epoch / settings.warmup_epochs
    length = epochs - settings.warmup_epochs - settings.cooldown_epochs
    left = max(0.0, 1 - (epoch - settings.warmup_epochs) / length)
    match settings.kind:
        case "constant":
            return 1.0
        case "step":
            return float(settings.gamma ** sum(milestone <= epoch for milestone in settings.milestones))
        case "linear":
            share = left
        case "poly":
            share = float(left**settings.power)
        case "cosine":
            share = (1 - math.cos(math.pi * left)) / 2
    return share + settings.final_factor * (1 - share)


def build_schedule(optimizer: Optimizer, settings: ScheduleSettings, *, epochs: int, steps_per_epoch: int) -> LambdaLR:
    """`factor` for every group of `optimizer`, to be stepped after each step of the optimizer.

    What it remembers is the number of steps, so that a loaded one goes on exactly.

    Args:
        optimizer: its learning rates are the highest of the schedule.
        settings: what to build.
        epochs: how long the run is.
        steps_per_epoch: steps of the optimizer in an epoch; with accumulated gradients fewer than batches.

    Raises:
        ConfigError: the schedule does not fit into the run.
    """
    check_length(settings, epochs)
    return LambdaLR(optimizer, lambda step: factor(settings, step / steps_per_epoch, epochs))


def check_length(settings: ScheduleSettings, epochs: int) -> None:
    """Refuse a schedule that does not fit into a run of `epochs`.

    Raises:
        ConfigError: warm-up and cool-down leave nothing between them, or a milestone comes too late.
    """
    if settings.warmup_epochs + settings.cooldown_epochs >= epochs:
        raise ConfigError(
            f"warmup_epochs: {settings.warmup_epochs:g} and cooldown_epochs: {settings.cooldown_epochs:g} take all "
            f"{epochs} epochs of the run; shorten them or raise epochs"
        )
    if late := [f"{milestone:g}" for milestone in settings.milestones if milestone >= epochs]:
        raise ConfigError(
            f"milestones: {', '.join(late)} come after the {epochs} epochs of the run; move them or raise epochs"
        )
