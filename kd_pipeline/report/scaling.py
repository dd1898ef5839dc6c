"""Pictures of how something grows with a size that doubles."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_pipeline.report.canvas import COLORS, GRAY, PALE, Canvas, Point, text_width, ticks

__all__ = ["save_scaling"]

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 46, 560, 320
_LINE = 18.0
"""From one name in the legend to the next."""


def save_scaling(curves: Mapping[str, Sequence[Point]], path: Path | str, *, title: str, x: str, y: str) -> Path:
    """Draw a line with dots for each of `curves` as a PNG at `path`, x on a scale on which every doubling is as wide.

    Args:
        curves: points `(x, y)` by name, x above 0 and rising, y from 0; one without points is left out.
        path: the picture.
        title: what stands above it.
        x: what stands at the lower axis.
        y: what stands at the left axis.
    """
    drawn = {name: points for name, points in curves.items() if points}
    sizes = sorted({size for points in drawn.values() for size, _ in points}) or [1.0]
    heights = ticks(0.0, max((value for points in drawn.values() for _, value in points), default=1.0))
    first, last = math.log2(sizes[0]), math.log2(sizes[-1])
    right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT

    def place(point: Point) -> Point:
        along = (math.log2(point[0]) - first) / ((last - first) or 1.0)
        return _LEFT + 12 + along * (_WIDTH - 24), bottom - point[1] / heights[-1] * _HEIGHT

    legend = max((text_width(name, 11) for name in drawn), default=0.0)
    canvas = Canvas(right + legend + 76, max(bottom, _TOP + len(drawn) * _LINE) + 54)
    canvas.text((_LEFT, 20), title, size=14)
    for height in heights:
        _, level = place((sizes[0], height))
        canvas.line([(_LEFT, level), (right, level)], color=PALE)
        canvas.text((_LEFT - 8, level), f"{height:,.4g}", anchor="rm")
    for size in sizes:
        along, _ = place((size, 0))
        canvas.line([(along, bottom), (along, bottom + 4)], color=GRAY)
        canvas.text((along, bottom + 8), f"{size:,.0f}", anchor="mt")
    canvas.line([(_LEFT, bottom), (right, bottom)], color=GRAY)
    canvas.text((right, bottom + 28), x, color=GRAY, anchor="rt")
    canvas.text_upwards((14, _TOP + _HEIGHT / 2), y, color=GRAY, anchor="mm")
    for number, (name, points) in enumerate(drawn.items()):
        color = COLORS[number % len(COLORS)]
        places = [place(point) for point in points]
        if len(places) > 1:
            canvas.line(places, color=color, width=1.6)
        for dot in places:
            canvas.dot(dot, color=color, radius=3)
        level = _TOP + 8 + number * _LINE
        canvas.line([(right + 16, level), (right + 36, level)], color=color, width=2.4)
        canvas.text((right + 44, level), name)
    return canvas.save(Path(path))
