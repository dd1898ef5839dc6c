"""Points of curves, and fewer of them."""

import math
from collections.abc import Sequence
from statistics import fmean

__all__ = ["Point", "downsampled"]

Point = tuple[float, float]


def downsampled(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: the means of equally many neighbors."""
    length = math.ceil(len(points) / most)
    chunks = [points[start : start + length] for start in range(0, len(points), length)]
    return [(fmean(x for x, _ in chunk), fmean(y for _, y in chunk)) for chunk in chunks]
