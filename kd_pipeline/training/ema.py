"""An exponential moving average (EMA) of the student's weights, which often generalizes better than the weights."""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.sharding import full_tensor

__all__ = ["EmaSettings", "StudentEma"]


class EmaSettings(Settings):
    """How fast the average follows the weights. Updates are counted from 0."""

    decay: Annotated[float, Field(ge=0, lt=1)] | Annotated[str, Field(pattern=r"^\w+(\.\w+)*:\w+$")] = 0.9999
    """Weight of the old average in an update; the student's weights get the rest. Or your own function of the number n
    of the update, as `package.module:function`, which returns this weight, from 0 to 1."""
    warmup: bool | Literal["exponential", "power"] = True
    """Start with a lower decay, so the initial weights are soon forgotten. Update n uses the smaller of `decay` and
    (1 + n) / (10 + n) if `true`, as TensorFlow does, or 1 - (1 + n / `warmup_updates`)^(-`power`) with `power`, as
    timm's `ModelEmaV3`; and `decay` · (1 - exp(-n / `warmup_updates`)) with `exponential`, as Ultralytics' YOLOs. It is
    `false` for a function of your own."""
    warmup_updates: PositiveFloat | None = None
    """How slow `exponential` and `power` rise; defaults to 2000 for the first and 1 for the second."""
    power: PositiveFloat | None = None
    """How steep `power` is; defaults to 2/3."""
    every_steps: int = Field(default=1, ge=1)
    """Optimizer steps between updates."""

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        if isinstance(self.decay, str):
            if self.warmup and "warmup" in self.model_fields_set:
                raise ValueError(f"warmup has no effect on {self.decay}; remove it, and let the function start lower")
            object.__setattr__(self, "warmup", False)  # the settings are frozen for everybody else
        if self.warmup_updates is not None and not isinstance(self.warmup, str):
            raise ValueError("warmup_updates is of warmup: exponential and warmup: power; set one, or remove it")
        if self.power is not None and self.warmup != "power":
            raise ValueError("power is of warmup: power; set that, or remove it")
        return self


class StudentEma:
    """The averaged student, as a network of its own that is never trained.

    Parameters are averaged in float32, whatever the student's dtype. Buffers, such as BatchNorm statistics, are copied
    from the student: they are running averages already, or counts. (timm's `ModelEmaV3` averages them too, unless it is
    told to exclude them.)

    It holds the student alone: no teacher, and no projectors of the loss. It is no `nn.Module`, so it cannot slip into
    an optimizer, a wrapper or `train()`.
    """

    def __init__(self, student: nn.Module, settings: EmaSettings, *, plugins: Collection[str] = ()) -> None:
        """Start with the weights of `student`; `plugins` are modules that a decay of the user's may come from.

        Raises:
            ConfigError: the function in the settings is not allowed, or does not exist.
        """
        self._settings = settings
        self._decay = _decay_rule(settings, plugins)
        self._num_steps = 0
        self._student = copy.deepcopy(student).float().eval().requires_grad_(False)

    @property
    def student(self) -> nn.Module:
        """The averaged student, in eval mode, on the device of the student at the last update."""
        return self._student

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Update the average with the weights of `student`; call it after each optimizer step, on all ranks.

        Raises:
            ConfigError: a function of the user's returned no decay.
        """
        self._num_steps += 1
        if self._num_steps % self._settings.every_steps:
            return
        parameters = list(student.parameters())
        if next(self._student.parameters()).device != parameters[0].device:
            self._student.to(parameters[0].device)
        num_updates = self._num_steps // self._settings.every_steps - 1
        average = get_ema_multi_avg_fn(self._decay(num_updates))  # type: ignore[no-untyped-call]
        weights = [full_tensor(parameter).float() for parameter in parameters]
        average(list(self._student.parameters()), weights, self._num_steps)
        for averaged, buffer in zip(self._student.buffers(), student.buffers(), strict=True):
            averaged.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to resume exactly: tensors and plain values."""
        return {"num_steps": self._num_steps, "student": self._student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned.

        Raises:
            StateError: it is the average of a different network.
        """
        try:
            self._student.load_state_dict(state["student"])
        except RuntimeError as exc:
            raise StateError(f"the saved EMA belongs to a different student: {exc}") from exc
        self._num_steps = state["num_steps"]


def _decay_rule(settings: EmaSettings, plugins: Collection[str]) -> Callable[[int], float]:
    """The decay as a function of the number of the update."""
    decay, scale = settings.decay, settings.warmup_updates
    if isinstance(decay, str):
        return _OwnDecay(decay, plugins)
    match settings.warmup:
        case "exponential":
            return lambda number: decay * -math.expm1(-number / (scale or 2000))
        case "power":
            return lambda number: min(decay, 1 - (1 + number / (scale or 1)) ** -(settings.power or 2 / 3))
        case True:
            return lambda number: min(decay, (1 + number) / (10 + number))
        case _:
            return lambda number: decay


class _OwnDecay:
    """A function of the user's, whose values are checked."""

    def __init__(self, path: str, plugins: Collection[str]) -> None:
        self._path, self._function = path, import_function("train.ema.decay", path, plugins)

    def __call__(self, number: int) -> float:
        decay = self._function(number)
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
            raise ConfigError(
                f"train.ema.decay: {self._path} returned {decay!r} for update {number}; return a number from 0 to 1"
            )
        return float(decay)
