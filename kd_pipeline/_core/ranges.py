"""Probabilities and ranges of positive numbers, as settings."""

from typing import Annotated

from pydantic import AfterValidator, Field

__all__ = ["FractionRange", "Probability", "Range"]


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"must be [low, high] with 0 < low <= high, got {list(value)}")
    return value


Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], AfterValidator(_check_range)]
"""Low and high, both positive."""
FractionRange = Annotated[tuple[float, Probability], AfterValidator(_check_range)]
"""Low and high, 1 at most."""
