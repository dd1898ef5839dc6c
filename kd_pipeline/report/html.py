"""Turn a report into one HTML page that loads nothing, runs no script and shows every text as text."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from kd_pipeline._core.text import printable
from kd_pipeline.report.document import Chart, Document, Matrix
from kd_pipeline.report.points import downsampled

__all__ = ["render"]

_MAX_POINTS = 300
"""Of a line; longer ones are drawn through the means of equally many neighbors."""
_MAX_DOTS = 40
"""Lines of fewer points have a dot at each."""
_SIDE = 1000
"""Of the square in which lines are drawn, and which the page stretches."""
_NUM_COLORS = 8
_MAX_SHOWN = 1e100
"""Larger values are not drawn."""
_MIN_TO_CUT, _OUTLIER = 10, 8
"""Of so many values, a tenth may be cut off that is so many times as far from the lowest as the others."""


class _Tick(NamedTuple):
    at: float
    """Percent of the axis, from the left or the top."""
    label: str


class _Line(NamedTuple):
    name: str
    last: str
    color: int
    dashed: bool
    path: str
    dots: str
    """A path of points without length, which round caps make dots; empty for a line of many points."""


class _Drawn(NamedTuple):
    lines: Sequence[_Line]
    x_ticks: Sequence[_Tick]
    y_ticks: Sequence[_Tick]
    is_cut: bool
    """Whether some values are above the chart."""


def render(document: Document) -> str:
    """The page as text.

    It has a policy by which a browser loads nothing and runs no script. Control characters, and those that reorder
    text, are shown escaped.
    """
    return _environment().get_template("report.html").render(document=document)


@cache
def _environment() -> Environment:
    """Every value is escaped, also in attributes, as the template quotes them all."""
    environment = Environment(
        loader=PackageLoader("kd_pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"drawn": _drawn, "heat": _heat, "text": _text}
    return environment


def _shown(value: Any) -> Any:
    """A value of the template; of those, texts may be a stranger's."""
    return printable(value, keep="\n\t") if type(value) is str else value


def _text(value: str) -> str:
    """Text of one line."""
    return printable(value)


def _heat(matrix: Matrix) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each class its name, and the text and the strength of the color of each cell."""
    rows = []
    for name, counts in zip(matrix.classes, matrix.counts, strict=True):
        shares = [count / max(sum(counts), 1) for count in counts]
        texts = [
            f"{share:.0%}" if matrix.in_percent else str(count) for share, count in zip(shares, counts, strict=True)
        ]
        # The square root makes small shares visible: these are the confusions to look for.
        strengths = [round(math.sqrt(share), 3) for share in shares]
        rows.append(
            (name, [(text if count else "", each) for text, count, each in zip(texts, counts, strengths, strict=True)])
        )
    return rows


def _drawn(chart: Chart) -> _Drawn:
    """The lines of a chart and the ticks of its axes."""
    usable = [(each, [(x, y) for x, y in each.points if abs(y) < _MAX_SHOWN]) for each in chart.series]
    series = [(each, downsampled(points, _MAX_POINTS)) for each, points in usable if points]
    xs = [x for _, points in usable for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    # At least half of each line stays in sight.
    highest = max([_highest(ys), *(median(y for _, y in points) for _, points in series)])
    x_ticks, y_ticks = _ticks(min([0.0, *xs]), max([1.0, *xs]), 4), _ticks(min(ys, default=0), highest, 4)
    left, right = 0.0 if min(xs, default=0) >= 0 else x_ticks[0], max([1.0, *xs])
    bottom, top = y_ticks[0], y_ticks[-1]

    def place(point: tuple[float, float]) -> str:
        x, y = point
        return f"{_SIDE * (x - left) / (right - left):.0f} {_SIDE * (top - y) / (top - bottom):.0f}"

    lines = [
        _Line(
            each.name,
            each.last,
            each.color % _NUM_COLORS,
            each.dashed,
            "M" + "L".join(map(place, points)),
            "".join(f"M{place(point)}h0" for point in points) if len(points) <= _MAX_DOTS else "",
        )
        for each, points in series
    ]
    shown_x = [_Tick(round(100 * (x - left) / (right - left), 2), _number(x)) for x in x_ticks if left <= x <= right]
    label = _percentages(y_ticks) if chart.in_percent else [_number(y) for y in y_ticks]
    shown_y = [_Tick(round(100 * (top - y) / (top - bottom), 2), text) for y, text in zip(y_ticks, label, strict=True)]
    return _Drawn(lines, shown_x, shown_y, is_cut=max(ys, default=top) > top + 1e-6 * (top - bottom))


def _highest(values: Sequence[float]) -> float:
    """The upper end of an axis: without the few values that would flatten all others, such as the first losses."""
    if not values:
        return 1.0
    ordered = sorted(values)
    usual, low = ordered[int(0.9 * (len(ordered) - 1))], ordered[0]
    outlies = len(ordered) >= _MIN_TO_CUT and ordered[-1] - low > _OUTLIER * (usual - low) > 0
    return usual + (usual - low) / 5 if outlies else ordered[-1]


def _ticks(low: float, high: float, number: int) -> list[float]:
    """About `number` round numbers, the first of which is not above `low` and the last not below `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1 / _MAX_SHOWN):
        margin = abs(low) / 2 if abs(low) > 1 / _MAX_SHOWN else 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * count for count in range(first, last + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2g}"


def _percentages(values: Sequence[float]) -> list[str]:
    return [f"{100 * value:.4g}%" for value in values]
