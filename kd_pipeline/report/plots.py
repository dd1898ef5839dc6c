"""Plots of runs and benchmarks with matplotlib: training curves, confusion matrix, stacked bars, scaling."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.optional import require
from kd_pipeline._core.text import printable
from kd_pipeline.report.metrics_rows import read_columns
from kd_pipeline.report.points import Point, downsampled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Bar", "plot_bars", "plot_confusion", "plot_curves", "plot_scaling", "save_figure"]

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6e503c", "#5a5a5a")
"""Okabe and Ito's palette, which color-blind people can tell apart, with brown and gray for yellow and black."""
_DPI = 160
_ACCURACIES = ("top1", "top5", "macro_f1", "miou", "pixel_accuracy", "agreement")
"""Ends of their names: there are `teacher_knn_top1` and others."""
_MAX_POINTS = 400
"""Longer curves are drawn through the means of equally many neighbors."""
_MAX_MARKED = 40
"""Shorter ones have a marker at each point."""
_MAX_COUNTED, _MAX_NAMED = 16, 50
"""Up to so many classes a confusion matrix shows its counts, and the name of every class."""
_MIN_LABELED = 0.05
"""Shorter parts of a bar, as a fraction of the longest bar, have no number in them."""


class Bar(NamedTuple):
    """One line of a stacked bar plot."""

    name: str
    parts: Mapping[str, float]
    """Lengths by name; the same names in every bar."""
    note: str
    """Written after the bar."""


def plot_curves(metrics_csv: Path | str) -> "Figure":
    """Draw loss terms, accuracies, cosines and learning rate over the steps, a panel for each of these that was logged.

    Args:
        metrics_csv: a run's `metrics.csv`: a column `step`, others such as `train/loss` and `val/top1`, empty cells
            where nothing was logged. A column is a loss term if there is also a column `<name>_weight`.

    Raises:
        MissingPackageError: matplotlib is not installed.
        DataError: the file cannot be read, or does not hold the metrics of a run.
    """
    columns = read_columns(Path(metrics_csv))
    names = {name: name.rpartition("/")[2] for name in columns}
    found = (
        (
            "loss",
            [name for name, last in names.items() if last in ("loss", "epoch_loss") or f"{name}_weight" in columns],
            _number,
        ),
        ("accuracy", [name for name, last in names.items() if last.endswith(_ACCURACIES)], _percentage),
        (
            "cosine to the teacher",
            [name for name, last in names.items() if last.startswith("cosine_to_teacher.")],
            _number,
        ),
        ("learning rate", [name for name, last in names.items() if last == "lr"], _number),
    )
    panels = [panel for panel in found if panel[1]]
    figure = _new_figure(9, 2.7 * max(1, len(panels)), extra="train")
    if not panels:
        figure.text(0.5, 0.5, "no metrics were logged", ha="center", va="center")
        return figure
    last_step = max(columns[name][-1][0] for _, shown, _ in panels for name in shown)
    for (title, shown, label), (axes,) in zip(panels, figure.subplots(len(panels), squeeze=False), strict=True):
        _style(axes, title, grid="y")
        for name in shown:
            points = downsampled(columns[name], _MAX_POINTS)
            marker = "o" if len(points) <= _MAX_MARKED else None
            axes.plot(*zip(*points, strict=True), marker=marker, ms=4, label=f"{name}  {label(columns[name][-1][1])}")
        axes.set_xlim(0, max(last_step, 1) * 1.01)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _, label=label: label(value))
        _legend(axes)
    axes.set_xlabel("step")
    return figure


def plot_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str] | None) -> "Figure":
    """Draw a confusion matrix: the darker a cell, the larger its share of the label's samples.

    Args:
        matrix: `[K][K]` counts; rows are labels, columns predictions.
        classes: names of the K classes; None shows their numbers. With few classes the plot shows the counts, with
            many only some of the names.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes, num_samples, num_correct = len(counts), int(counts.sum()), int(np.trace(counts))
    names = [str(label) for label in range(num_classes)] if classes is None else [_shortened(name) for name in classes]
    shown = range(0, num_classes, 1 if num_classes <= _MAX_NAMED else math.ceil(num_classes / 20))
    side = min(8.0, max(3.0, 0.4 * num_classes))
    figure = _new_figure(side + 3, side + 2, extra="train")
    axes = figure.subplots()
    axes.set_title(f"{num_correct:,} of {num_samples:,} correct ({num_correct / max(num_samples, 1):.1%})", loc="left")
    axes.set(xlabel="prediction", ylabel="label")
    # The square root makes small shares visible: these are the confusions to look for.
    colors = require("matplotlib.colors", extra="train").PowerNorm(0.5, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=colors)
    ticks = [names[label] for label in shown]
    axes.set_xticks(shown, ticks, rotation=90, fontsize=8, parse_math=False)  # a name may have dollar signs
    axes.set_yticks(shown, ticks, fontsize=8, parse_math=False)
    bar = figure.colorbar(image, format=lambda share, _: f"{share:.0%}", shrink=0.6, label="share of a label's samples")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1])
    if num_classes <= _MAX_COUNTED:
        for (label, prediction), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[label, prediction] > 0.3 else "black"
                axes.text(prediction, label, _count_text(int(count)), ha="center", va="center", color=color, fontsize=8)
    return figure


def _count_text(count: int) -> str:
    """Short enough for a cell, as the counts of pixels are large."""
    for unit, size, least in (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e5)):
        if count >= least:
            return f"{count / size:.4g}{unit}"
    return str(count)


def plot_bars(bars: Sequence[Bar], *, title: str, x: str) -> "Figure":
    """Draw horizontal stacked bars, one below the other; `x` is the label of the axis.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = _new_figure(10, 1.3 + 0.4 * len(bars), extra="bench")
    axes = figure.subplots()
    _style(axes, title, grid="x")
    rows, ends = range(len(bars)), np.zeros(len(bars))
    longest = max(sum(bar.parts.values()) for bar in bars)
    for name in bars[0].parts:
        lengths = np.array([max(bar.parts[name], 0) for bar in bars])
        drawn = axes.barh(rows, lengths, left=ends, height=0.6, label=name)
        labels = [f"{length:,.0f}" if length >= _MIN_LABELED * longest else "" for length in lengths]
        axes.bar_label(drawn, labels, label_type="center", color="white", fontsize=8)
        ends += lengths
    for row, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        axes.annotate(bar.note, (end, row), (5, 0), textcoords="offset points", va="center")
    axes.set(xlabel=x, xlim=(0, 1.2 * longest or 1))  # with space for the notes
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks(rows, [bar.name for bar in bars])
    axes.invert_yaxis()
    _legend(axes)
    return figure


def plot_scaling(curves: Mapping[str, Sequence[Point]], *, title: str, x: str, y: str) -> "Figure":
    """Draw how something grows with a size: a line with markers for each curve, over the logarithm of the size.

    Args:
        curves: points `(x, y)` by name, x above 0 and ascending, y from 0; one without points is left out.
        title: of the plot.
        x: label of the horizontal axis.
        y: label of the vertical axis.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    drawn = {name: points for name, points in curves.items() if points}
    sizes = sorted({size for points in drawn.values() for size, _ in points})
    figure = _new_figure(9, max(4.5, 1 + 0.25 * len(drawn)), extra="bench")
    axes = figure.subplots()
    _style(axes, title, grid="y")
    for name, points in drawn.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.4g}")
    axes.set(xlabel=x, ylabel=y)
    if drawn:
        _legend(axes)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write the PNG file `path`; a link there is replaced, and not written through."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def _new_figure(width: float, height: float, *, extra: str) -> "Figure":
    """An empty figure of that size in inches, outside of pyplot's global state."""
    figure: Figure = require("matplotlib.figure", extra=extra).Figure((width, height), _DPI, layout="constrained")
    return figure


def _style(axes: Any, title: str, *, grid: str) -> None:
    axes.set_prop_cycle(color=_COLORS)
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e2e2e2")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any) -> None:
    """On the right of the plot, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percentage(value: float) -> str:
    return f"{100 * value:.3g}%"


def _shortened(name: str) -> str:
    """Both ends of a name, as one of them usually differs from the neighbors'."""
    name = printable(name)
    return name if len(name) <= 20 else f"{name[:11]}…{name[-8:]}"
