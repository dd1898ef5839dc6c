"""Pictures of a run: its curves over the steps, and the confusion matrix of what came out."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.report.canvas import BLACK, COLORS, GRAY, PALE, WHITE, Canvas, Point, text_width, ticks

__all__ = ["save_confusion", "save_curves"]

_DARKEST = (8, 48, 107)
"""Of the matrix, for a class that is always taken for another, or always recognized."""

_WIDTH, _PLOT_LEFT, _PLOT_WIDTH, _PLOT_HEIGHT = 860, 62, 600, 190
_PANEL_HEIGHT = 262
_MAX_POINTS = 400
"""Longer curves are drawn through the means of equally many neighbors."""
_MAX_MARKED = 40
"""Shorter ones have a dot at each point."""

_ACCURACIES = {"top1", "top5", "macro_f1", "agreement"}
_MAX_COUNTED, _MAX_NAMED = 16, 50
"""Classes up to which a matrix shows its counts, and the name of every class."""


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    curves: dict[str, list[Point]]
    label: Callable[[float], str]
    """How a value reads on the axis."""


def save_curves(metrics_csv: Path | str, path: Path | str) -> Path:
    """Draw loss terms, accuracies and learning rate over the steps as a PNG at `path`.

    Args:
        metrics_csv: a run's `metrics.csv`: a column `step`, others such as `train/loss` and `val/top1`, empty cells
            where nothing was logged. Whatever has a column `<name>_weight` beside it is a loss term.
        path: the picture; a panel that nothing was logged for is left out.
    """
    columns = _read(Path(metrics_csv))
    losses = [name for name in columns if _last(name) == "loss" or f"{name}_weight" in columns]
    accuracies = [name for name in columns if _last(name) in _ACCURACIES]
    rates = [name for name in columns if _last(name) == "lr"]
    panels = [
        _Panel(title, {name: columns[name] for name in names}, label)
        for title, names, label in (
            ("loss", losses, _plain_number),
            ("accuracy", accuracies, _percentage),
            ("learning rate", rates, _plain_number),
        )
        if names
    ]
    canvas = Canvas(_WIDTH, _PANEL_HEIGHT * max(1, len(panels)) + 8)
    last_step = max((points[-1][0] for panel in panels for points in panel.curves.values()), default=0.0)
    for number, panel in enumerate(panels):
        _draw_panel(canvas, panel, top=number * _PANEL_HEIGHT + 34, last_step=last_step)
    if not panels:
        canvas.text((_WIDTH / 2, _PANEL_HEIGHT / 2), "nothing was logged", anchor="mm", color=GRAY)
    return canvas.save(Path(path))


def save_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str] | None, path: Path | str) -> Path:
    """Draw a confusion matrix as a PNG at `path`: the darker a cell, the larger its part of the label's samples.

    Args:
        matrix: `[K][K]` counts; rows are labels, columns predictions.
        classes: names of the K classes; their numbers where left out.
        path: the picture. With few classes it shows the counts, with many only some of the names.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    num_classes = len(counts)
    names = [str(label) for label in range(num_classes)] if classes is None else [_shortened(name) for name in classes]
    cell = min(44.0, max(1.0, 640 / num_classes))
    side = cell * num_classes
    step = 1 if num_classes <= _MAX_NAMED else math.ceil(num_classes / 20)
    shown = range(0, num_classes, step)
    size = min(12.0, max(7.0, cell * 0.8))
    margin = max(text_width(names[label], size) for label in shown) + 14
    left, top = margin + 22, 56.0
    canvas = Canvas(max(left + side + 96, 360), top + side + margin + 28)

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    canvas.paste(_shades(shares), (left, top), (side, side))
    canvas.box((left, top), (left + side, top + side), color=GRAY)
    for label in shown:
        middle = (label + 0.5) * cell
        canvas.text((left - 6, top + middle), names[label], size=size, anchor="rm")
        canvas.text_upwards((left + middle, top + side + 6), names[label], size=size)
    if num_classes <= _MAX_COUNTED:
        _draw_counts(canvas, counts, shares, (left, top), cell)
    _draw_scale(canvas, (left + side + 22, top), min(side, 160))
    total, right = int(counts.sum()), int(np.trace(counts))
    canvas.text((left, 14), f"{right:,} of {total:,} right ({right / max(total, 1):.1%})", size=15)
    canvas.text((left, 36), "the shade is the part of a label's samples", size=11, color=GRAY)
    canvas.text_upwards((12, top + side / 2), "label", size=12, color=GRAY, anchor="mm")
    canvas.text((left + side / 2, top + side + margin + 12), "prediction", size=12, color=GRAY, anchor="mm")
    return canvas.save(Path(path))


def _read(path: Path) -> dict[str, list[Point]]:
    """The finite numbers of each column with their steps."""
    columns: dict[str, list[Point]] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for name, cell in row.items():
                if name != "step" and cell and math.isfinite(float(cell)):
                    columns.setdefault(name, []).append((float(row["step"]), float(cell)))
    return columns


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _draw_panel(canvas: Canvas, panel: _Panel, *, top: float, last_step: float) -> None:
    values = [y for points in panel.curves.values() for _, y in points]
    y_ticks, x_ticks = ticks(min(values), max(values)), ticks(0, last_step)
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    bottom, right = top + _PLOT_HEIGHT, _PLOT_LEFT + _PLOT_WIDTH

    def place(point: Point) -> Point:
        x, y = point[0] / max(last_step, 1), (point[1] - low) / (high - low)
        return _PLOT_LEFT + x * _PLOT_WIDTH, bottom - y * _PLOT_HEIGHT

    canvas.text((_PLOT_LEFT, top - 18), panel.title, size=14)
    for tick in y_ticks:
        _, y = place((0, tick))
        canvas.line([(_PLOT_LEFT, y), (right, y)], color=PALE)
        canvas.text((_PLOT_LEFT - 8, y), panel.label(tick), anchor="rm")
    for tick in x_ticks:
        if tick > last_step:
            break
        x, _ = place((tick, low))
        canvas.line([(x, bottom), (x, bottom + 4)], color=GRAY)
        canvas.text((x, bottom + 8), f"{tick:,.0f}", anchor="mt")
    canvas.line([(_PLOT_LEFT, bottom), (right, bottom)], color=GRAY)
    canvas.text((right, bottom + 24), "step", color=GRAY, anchor="rt")
    for number, (name, points) in enumerate(panel.curves.items()):
        color = COLORS[number % len(COLORS)]
        drawn = [place(point) for point in _thinned(points)]
        canvas.line(drawn, color=color, width=1.6)
        if len(drawn) <= _MAX_MARKED:
            for point in drawn:
                canvas.dot(point, color=color, radius=2.4)
        y = top + 8 + number * min(18.0, _PLOT_HEIGHT / len(panel.curves))
        canvas.line([(right + 16, y), (right + 36, y)], color=color, width=2.4)
        canvas.text((right + 44, y), f"{name}  {panel.label(points[-1][1])}")


def _thinned(points: list[Point]) -> list[Point]:
    length = math.ceil(len(points) / _MAX_POINTS)
    chunks = [points[start : start + length] for start in range(0, len(points), length)]
    return [(fmean(x for x, _ in chunk), fmean(y for _, y in chunk)) for chunk in chunks]


def _plain_number(value: float) -> str:
    return f"{value:.3g}"


def _percentage(value: float) -> str:
    return f"{100 * value:.3g}%"


def _shades(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """White for 0 and dark for 1, `[..., 3]`; small shares stand out, as those are what one looks for."""
    white, dark = np.array(WHITE, dtype=np.float64), np.array(_DARKEST, dtype=np.float64)
    return (white + (dark - white) * np.sqrt(shares)[..., None]).round().astype(np.uint8)


def _draw_counts(
    canvas: Canvas, counts: NDArray[np.int64], shares: NDArray[np.float64], place: Point, cell: float
) -> None:
    longest = len(f"{counts.max()}")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            middle = place[0] + (column + 0.5) * cell, place[1] + (row + 0.5) * cell
            color = WHITE if shares[row, column] > 0.2 else BLACK
            canvas.text(middle, str(count), size=min(13.0, 1.4 * cell / longest), color=color, anchor="mm")


def _draw_scale(canvas: Canvas, place: Point, height: float) -> None:
    left, top = place
    canvas.paste(_shades(np.linspace(1, 0, 200)[:, None]), place, (12, height))
    canvas.box(place, (left + 12, top + height), color=GRAY)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.text((left + 18, top + height * (1 - share)), f"{share:.0%}", size=10)


def _shortened(name: str) -> str:
    """With both its ends, one of which mostly tells it from its neighbors."""
    return name if len(name) <= 20 else f"{name[:11]}…{name[-8:]}"
