"""Numbers that change in the course of training: the temperature, the weights of the loss terms."""

import math
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from kd_pipeline._core.settings import Settings

__all__ = ["Ramp", "smallest", "value_at"]


class Ramp(Settings):
    """A number that goes from `start` to `end`, and stays there.

    `{start: 10, end: 1, kind: decay, rate: 0.9}` takes a temperature T to 1 + 0.9 · (T - 1) with each epoch.
    """

    start: float
    end: float
    kind: Literal["linear", "cosine", "exponential", "decay"] = "linear"
    """`linear` in equal steps, `cosine` slow at both ends, `exponential` in equal ratios, and `decay` a fixed part of
    the distance with each epoch, so that `end` is approached and not reached."""
    epochs: PositiveFloat | None = None
    """How long it takes; the whole run unless given. Not for `decay`."""
    rate: float | None = Field(default=None, gt=0, lt=1)
    """What is left of the distance to `end` after an epoch. For `decay` alone, which needs it."""

    @model_validator(mode="after")
    def _knows_its_course(self) -> Self:
        if self.kind == "decay" and self.rate is None:
            raise ValueError("kind: decay needs a rate, such as rate: 0.9")
        if self.kind == "decay" and self.epochs is not None:
            raise ValueError(f"epochs: {self.epochs:g} means nothing to kind: decay, whose speed is its rate")
        if self.kind != "decay" and self.rate is not None:
            raise ValueError(f"rate: {self.rate:g} means nothing to kind: {self.kind}; set epochs, or take kind: decay")
        if self.kind == "exponential" and smallest(self) <= 0:
            raise ValueError(
                f"kind: exponential needs numbers above 0, got {self.start:g} and {self.end:g}; take kind: cosine"
            )
        return self


def value_at(value: float | Ramp, epoch: float, epochs: int) -> float:
    """What `value` is after `epoch` epochs, a fraction within one, of a run of `epochs`."""
    if not isinstance(value, Ramp):
        return value
    start, end = value.start, value.end
    done = min(1.0, epoch / (value.epochs or epochs))
    match value.kind:
        case "linear":
            return (1 - done) * start + done * end
        case "cosine":
            share = (1 - math.cos(math.pi * done)) / 2
            return (1 - share) * start + share * end
        case "exponential":
            return float(start ** (1 - done) * end**done)
        case "decay":
            assert value.rate is not None  # as the settings have seen
            return float(end + (start - end) * value.rate**epoch)


def smallest(value: float | Ramp) -> float:
    """The smallest number that `value` ever is, for settings that must stay above one."""
    return min(value.start, value.end) if isinstance(value, Ramp) else value
