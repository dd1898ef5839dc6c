"""The learning-rate schedule, a pure function of the number of epochs done."""

import math
from collections.abc import Collection
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import ConfigError

__all__ = ["ScheduleSettings", "build_schedule", "check_length", "lr_factor"]

_SETTINGS_OF = {
    "cosine": {"final_factor", "cooldown_epochs"},
    "linear": {"final_factor", "cooldown_epochs"},
    "poly": {"final_factor", "cooldown_epochs", "power"},
    "step": {"milestones", "gamma"},
    "constant": set[str](),
}
"""The settings of each kind that not all kinds have."""


class ScheduleSettings(Settings):
    """How the learning rate changes. Setting what the chosen kind does not use is an error.

    A linear warm-up comes first. The decay of `kind` takes the rest of the run up to the cool-down, as with timm's
    `warmup_prefix=True`; timm's default is a decay that starts with the run and is hidden by the warm-up at first.
    Only the milestones of `step` are counted from the start of the run.
    """

    factory: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")
    """Your own function that returns a scheduler of torch, as `package.module:function`, instead of a `kind`. It is
    called as `function(optimizer, total_steps=..., steps_per_epoch=..., **kwargs)`, and what it returns is stepped
    after every optimizer step."""
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """More arguments of the factory."""
    kind: Literal["cosine", "linear", "poly", "step", "constant"] = "cosine"
    """Shape of the decay: half a cosine, a line, a polynomial, steps at `milestones`, or none."""
    per: Literal["step", "epoch"] = "step"
    """Whether to update the learning rate after every optimizer step or after every epoch."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of the linear warm-up, in epochs."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """The same as a fraction of the run, such as 0.1; set one of the two."""
    warmup_start: float = Field(default=0.01, ge=0, le=1)
    """Factor of the learning rate at the first step of the warm-up."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Factor of the learning rate at the end, for `cosine`, `linear` and `poly`."""
    cooldown_epochs: float = Field(default=0.0, ge=0)
    """How long `cosine`, `linear` and `poly` stay at `final_factor` before the run ends."""
    power: PositiveFloat = 0.9
    """For `poly`: the factor is (1 - fraction of the decay done) to this power."""
    milestones: tuple[PositiveFloat, ...] = ()
    """For `step`: epochs, counted from the start of the run, after which the learning rate is multiplied by `gamma`."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """For `step`: factor of the learning rate at each milestone."""

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        if self.factory is not None:
            for name, info in type(self).model_fields.items():
                if name not in ("factory", "kwargs") and (value := getattr(self, name)) != info.default:
                    raise ValueError(f"{name}: {value} has no effect with a factory; set it in kwargs, or remove one")
        elif self.kwargs:
            raise ValueError("kwargs are arguments of a factory; set factory, or remove them")
        if self.warmup_epochs and self.warmup_fraction:
            raise ValueError("warmup_epochs and warmup_fraction are the same; set one of them")
        for name in sorted(set().union(*_SETTINGS_OF.values()) - _SETTINGS_OF[self.kind]):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {value} has no effect with kind: {self.kind}; remove it or change kind")
        if self.kind == "step" and not self.milestones:
            raise ValueError("kind: step needs milestones, such as milestones: [150, 180, 210]")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {list(self.milestones)}")
        return self

    def warmup_of(self, epochs: int) -> float:
        """Epochs of warm-up in a run of `epochs`."""
        return self.warmup_epochs or self.warmup_fraction * epochs


def lr_factor(settings: ScheduleSettings, epoch: float, epochs: int) -> float:
    """The factor of the learning rate after `epoch` of `epochs` epochs; `epoch` may be a fraction."""
    if settings.per == "epoch":
        epoch = math.floor(epoch)
    warmup = settings.warmup_of(epochs)
    if epoch < warmup:
        return settings.warmup_start + (1 - settings.warmup_start) * epoch / warmup
    length = epochs - warmup - settings.cooldown_epochs
    remaining = max(0.0, 1 - (epoch - warmup) / length)
    match settings.kind:
        case "constant":
            return 1.0
        case "step":
            return float(settings.gamma ** sum(milestone <= epoch for milestone in settings.milestones))
        case "linear":
            decay = remaining
        case "poly":
            decay = float(remaining**settings.power)
        case "cosine":
            decay = (1 - math.cos(math.pi * remaining)) / 2
    return decay + settings.final_factor * (1 - decay)


def build_schedule(
    optimizer: Optimizer,
    settings: ScheduleSettings,
    *,
    epochs: int,
    steps_per_epoch: int,
    plugins: Collection[str] = (),
) -> LRScheduler:
    """Apply `lr_factor` to every parameter group of `optimizer`, or call a factory; step it after each optimizer step.

    The only state of the first is the number of steps, so a loaded schedule resumes exactly. A factory's scheduler
    resumes by its own `state_dict`.

    Args:
        optimizer: its learning rates are the peaks of the schedule.
        settings: what to build.
        epochs: length of the run.
        steps_per_epoch: optimizer steps in an epoch; with gradient accumulation fewer than batches.
        plugins: modules that a factory may come from.

    Raises:
        ConfigError: the schedule does not fit into the run; or the factory is not allowed, fails, or returns no
            scheduler that is stepped without a metric.
    """
    if settings.factory is not None:
        return _from_factory(optimizer, settings, settings.factory, epochs * steps_per_epoch, steps_per_epoch, plugins)
    check_length(settings, epochs)
    return LambdaLR(optimizer, lambda step: lr_factor(settings, step / steps_per_epoch, epochs))


def check_length(settings: ScheduleSettings, epochs: int) -> None:
    """Check that the schedule fits into a run of `epochs`.

    Raises:
        ConfigError: warm-up and cool-down leave no epoch in between, or a milestone comes after the end.
    """
    if (warmup := settings.warmup_of(epochs)) + settings.cooldown_epochs >= epochs:
        name = "warmup_epochs" if settings.warmup_epochs else f"warmup_fraction: {settings.warmup_fraction:g}, epochs"
        raise ConfigError(
            f"{name}: {warmup:g} and cooldown_epochs: {settings.cooldown_epochs:g} take all "
            f"{epochs} epochs of the run; shorten them or raise epochs"
        )
    if late := [f"{milestone:g}" for milestone in settings.milestones if milestone >= epochs]:
        raise ConfigError(
            f"milestones: {', '.join(late)} come after the {epochs} epochs of the run; move them or raise epochs"
        )


def _from_factory(
    optimizer: Optimizer,
    settings: ScheduleSettings,
    factory: str,
    total_steps: int,
    steps_per_epoch: int,
    plugins: Collection[str],
) -> LRScheduler:
    """What the user's function returns, if it is a scheduler."""
    function = import_function("train.schedule.factory", factory, plugins)
    try:
        found = function(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **settings.kwargs)
    except Exception as exc:  # the user's code can raise anything
        raise ConfigError(
            f"train.schedule.factory: {factory} failed ({type(exc).__name__}: {exc}); it is called with the optimizer, "
            f"total_steps={total_steps}, steps_per_epoch={steps_per_epoch} and kwargs: {settings.kwargs}"
        ) from exc
    if not isinstance(found, LRScheduler) or isinstance(found, ReduceLROnPlateau):
        why = "is stepped with a metric" if isinstance(found, ReduceLROnPlateau) else "is no scheduler of torch"
        raise ConfigError(
            f"train.schedule.factory: {factory} returned a {type(found).__name__}, which {why}; return an LRScheduler "
            "of torch.optim.lr_scheduler that is stepped after every optimizer step"
        )
    if found.optimizer is not optimizer:
        raise ConfigError(
            f"train.schedule.factory: {factory} returned a schedule of another optimizer; use the one given"
        )
    return found
