"""Plots show what was logged or measured, with names, and nothing else."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from kd_pipeline.errors import MissingPackageError
from kd_pipeline.report.plots import Bar, plot_bars, plot_confusion, plot_curves, plot_scaling

ROWS = [{"step": step, "train/loss": step / 100} for step in range(0, 101, 10)]
BARS = [
    Bar("ours", {"loader": 1.0, "student": 99.0}, "10 images/s"),
    Bar("theirs", {"loader": 40, "student": 20}, "16"),
]


def curves_of(tmp_path: Path, rows: list[dict[str, Any]]) -> Figure:
    path = tmp_path / "metrics.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return plot_curves(path)


def rendered(figure: Figure, tmp_path: Path) -> np.ndarray:
    """The pixels of the PNG file."""
    figure.savefig(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels)) > 10, "the plot is blank"
    return pixels


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def points_of(axes: Axes, number: int = 0) -> list[tuple[float, float]]:
    return [tuple(point) for point in axes.lines[number].get_xydata().tolist()]


# Curves


def test_curve_goes_through_its_points(tmp_path: Path) -> None:
    figure = curves_of(tmp_path, ROWS)
    (axes,) = figure.axes
    assert points_of(axes) == [(row["step"], row["train/loss"]) for row in ROWS]
    assert axes.get_xlim()[0] == 0 and 100 <= axes.get_xlim()[1] < 105
    assert axes.get_xlabel() == "step" and legend(axes) == ["train/loss  1"]
    rendered(figure, tmp_path)


def test_each_kind_of_metric_has_a_panel(tmp_path: Path) -> None:
    row = {"step": 1, "train/loss": 2.0, "val/top1": 0.5, "train/lr": 0.1, "train/images_per_s": 900.0}
    figure = curves_of(tmp_path, [row, {**row, "step": 2}])
    assert titles(figure) == ["loss", "accuracy", "learning rate"]
    assert legend(figure.axes[1]) == ["val/top1  50%"]
    assert titles(curves_of(tmp_path, [{"step": 1, "val/top1": 0.5}])) == ["accuracy"]


def test_features_have_panels(tmp_path: Path) -> None:
    names = ("val/loss", "val/knn_top1", "val/teacher_linear_top1", "val/cosine_to_teacher.pooled", "val/other_cosine")
    figure = curves_of(tmp_path, [{"step": step, **dict.fromkeys(names, 0.5)} for step in (1, 2)])
    assert titles(figure) == ["loss", "accuracy", "cosine to the teacher"]
    assert legend(figure.axes[1]) == ["val/knn_top1  50%", "val/teacher_linear_top1  50%"]
    assert legend(figure.axes[2]) == ["val/cosine_to_teacher.pooled  0.5"]


def test_nothing_logged_is_said(tmp_path: Path) -> None:
    figure = curves_of(tmp_path, [{"step": 1, "train/x": 0.5}])
    assert not figure.axes and [text.get_text() for text in figure.texts] == ["no metrics were logged"]
    rendered(figure, tmp_path)


def test_loss_term_is_known_by_its_weight(tmp_path: Path) -> None:
    row = {"step": 1, "train/loss": 2.0, "train/soft_target": 1.5, "train/gradient_norm": 1.0}
    assert legend(curves_of(tmp_path, [row]).axes[0]) == ["train/loss  2"]
    figure = curves_of(tmp_path, [{**row, "train/soft_target_weight": 0.9}])
    assert legend(figure.axes[0]) == ["train/loss  2", "train/soft_target  1.5"]


@pytest.mark.parametrize("value", ["", "nan", "inf"])
def test_empty_and_non_finite_cells_are_skipped(tmp_path: Path, value: str) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": 1.0, "val/loss": ""} for step in range(9)]
    rows[4]["train/loss"], rows[8]["val/loss"] = value, 3.0
    (axes,) = curves_of(tmp_path, rows).axes
    assert points_of(axes) == [(step, 1.0) for step in range(9) if step != 4]
    assert points_of(axes, 1) == [(8, 3.0)]


def test_long_curve_is_drawn_through_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"step": step, "train/loss": float(rng.normal(5, 1))} for step in range(40_000)]
    (axes,) = curves_of(tmp_path, rows).axes
    values = np.array(points_of(axes))[:, 1]
    assert 200 <= len(values) <= 400 and values.mean() == pytest.approx(5, abs=0.05) and values.std() < 0.2


def test_single_step_has_a_marker(tmp_path: Path) -> None:
    figure = curves_of(tmp_path, [{"step": 7, "train/loss": 0.0, "val/top1": 1.0}])
    assert all(axes.lines[0].get_marker() == "o" for axes in figure.axes)
    rendered(figure, tmp_path)


# Confusion matrix


def test_large_counts_are_short():
    """As those of pixels are."""
    axes = plot_confusion([[1_234_567_890, 99_999], [123_456, 1_000_000]], ["a", "b"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.235G", "99999", "123.5k", "1M"]


def test_larger_share_of_the_label_is_darker() -> None:
    image = plot_confusion([[100, 0, 0], [50, 50, 0], [1, 0, 9]], ["a", "b", "c"]).axes[0].images[0]
    darkness = 1 - image.to_rgba(image.get_array())[..., :3].mean(axis=-1)
    assert darkness[0, 0] > darkness[2, 2] > darkness[1, 0] == darkness[1, 1] > darkness[2, 0] > 0.05
    assert darkness[0, 1] == darkness[1, 2] == darkness[2, 1] < 0.02


def test_confusion_shows_names_counts_and_accuracy(tmp_path: Path) -> None:
    figure = plot_confusion([[3, 1], [0, 0]], ["cat", "a class with a long name"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["3", "1"]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "a class wit…ong name"]
    assert titles(figure)[0] == "3 of 4 correct (75.0%)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "label")
    rendered(plot_confusion([[1]], [r"$\frac$"]), tmp_path)  # is no formula
    numbered = plot_confusion([[3, 1], [0, 0]], None).axes[0]
    assert [label.get_text() for label in numbered.get_xticklabels()] == ["0", "1"]


@pytest.mark.parametrize(
    ("num_classes", "num_counts", "num_names"), [(1, 1, 1), (16, 16, 16), (17, 0, 17), (100, 0, 20), (1000, 0, 20)]
)
def test_any_number_of_classes(tmp_path: Path, num_classes: int, num_counts: int, num_names: int) -> None:
    figure = plot_confusion(np.eye(num_classes, dtype=int).tolist(), None)
    assert len(figure.axes[0].texts) == num_counts and len(figure.axes[0].get_xticks()) == num_names
    height, width, _ = rendered(figure, tmp_path).shape
    assert 300 < height < 2600 and 500 < width < 2600


# Bars


def test_bars_stack_their_parts(tmp_path: Path) -> None:
    figure = plot_bars(BARS, title="Time of a step", x="milliseconds")
    (axes,) = figure.axes
    boxes = [(box.get_x(), box.get_width()) for container in axes.containers for box in container]
    assert boxes == [(0, 1), (0, 40), (1, 99), (40, 20)]
    assert legend(axes) == ["loader", "student"] and axes.get_xlabel() == "milliseconds"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "theirs"]
    assert titles(figure) == ["Time of a step"] and axes.get_xlim()[1] > 100
    written = {text.get_text() for text in axes.texts}
    assert {"99", "40", "20", "10 images/s", "16"} <= written and "1" not in written, "too short for its number"
    pixels = rendered(figure, tmp_path)
    for container in axes.containers:
        color = np.round(255 * np.array(to_rgb(container[0].get_facecolor())))
        assert (pixels == color).all(axis=-1).sum() > 50


# Scaling


def test_scaling_is_drawn_over_the_logarithm(tmp_path: Path) -> None:
    points = [(1.0, 0.0), (2.0, 20.0), (8.0, 60.0), (32.0, 100.0)]
    figure = plot_scaling({"low": points, "high": [(2.0, 200.0)], "empty": []}, title="speed", x="batch", y="images/s")
    (axes,) = figure.axes
    assert points_of(axes) == points and axes.get_xscale() == "log" and axes.get_ylim()[0] == 0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "8", "32"]
    assert legend(axes) == ["low", "high"] and titles(figure) == ["speed"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch", "images/s")
    assert len({line.get_color() for line in axes.lines}) == 2
    rendered(figure, tmp_path)


@pytest.mark.parametrize("curves", [{}, {"ours": [(1.0, 5.0)]}, {"ours": [(7.0, 5.0)]}])
def test_one_size_or_none_is_a_plot(tmp_path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    rendered(plot_scaling(curves, title=r"$\frac$.onnx", x="batch", y="images/s"), tmp_path)


@pytest.mark.parametrize(
    ("plot", "extra"),
    [
        (lambda: plot_confusion([[1]], None), "train"),
        (lambda: plot_bars(BARS, title="time", x="ms"), "bench"),
        (lambda: plot_scaling({}, title="speed", x="batch", y="images/s"), "bench"),
    ],
)
def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, plot: Any, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=rf"matplotlib.* pip install 'kd_pipeline\[{extra}\]'"):
        plot()
