"""Temperatures and loss weights that change during training."""

import math
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from kd_pipeline._core.settings import Settings

__all__ = ["Ramp", "max_value", "min_value", "value_at"]


class Ramp(Settings):
    """A number that changes from `start` to `end` and stays there.

    `{start: 10, end: 1, kind: decay, rate: 0.9}` updates a temperature T to 1 + 0.9 · (T - 1) per epoch.
    """

    start: float
    """The number at the start of the run."""
    end: float
    """The number at the end, where it stays."""
    kind: Literal["linear", "cosine", "exponential", "decay"] = "linear"
    """`linear` changes in equal steps, `cosine` slowly at both ends, `exponential` by a constant factor, and `decay`
    by a fixed fraction of the remaining distance per epoch, so it approaches `end` without reaching it."""
    epochs: PositiveFloat | None = None
    """Duration in epochs; defaults to the whole run. Not for `decay`."""
    rate: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of the distance to `end` that remains after each epoch. Required for `decay`, and only for it."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "decay" and self.rate is None:
            raise ValueError("kind: decay needs a rate, such as rate: 0.9")
        if self.kind == "decay" and self.epochs is not None:
            raise ValueError(f"epochs: {self.epochs:g} has no effect on kind: decay; set its rate instead")
        if self.kind != "decay" and self.rate is not None:
            raise ValueError(
                f"rate: {self.rate:g} has no effect on kind: {self.kind}; set epochs instead, or kind: decay"
            )
        if self.kind == "exponential" and min_value(self) <= 0:
            raise ValueError(
                f"kind: exponential needs numbers above 0, got {self.start:g} and {self.end:g}; use kind: cosine"
            )
        return self


def value_at(value: float | Ramp, epoch: float, epochs: int) -> float:
    """`value` after `epoch` epochs, which may be fractional, of a run of `epochs`."""
    if not isinstance(value, Ramp):
        return value
    start, end = value.start, value.end
    progress = min(1.0, epoch / (value.epochs or epochs))
    match value.kind:
        case "linear":
            return (1 - progress) * start + progress * end
        case "cosine":
            share = (1 - math.cos(math.pi * progress)) / 2
            return (1 - share) * start + share * end
        case "exponential":
            return float(start ** (1 - progress) * end**progress)
        case "decay":
            assert value.rate is not None  # checked by the settings
            return float(end + (start - end) * value.rate**epoch)


def min_value(value: float | Ramp) -> float:
    """The minimum of `value` over a run."""
    return min(value.start, value.end) if isinstance(value, Ramp) else value


def max_value(value: float | Ramp) -> float:
    """The maximum of `value` over a run."""
    return max(value.start, value.end) if isinstance(value, Ramp) else value
