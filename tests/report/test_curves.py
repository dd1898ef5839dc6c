"""The pictures show what was logged, where it was logged, and nothing else."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.report import canvas, curves
from kd_pipeline.report.canvas import COLORS, GRAY
from kd_pipeline.report.curves import save_confusion, save_curves

PANEL = curves._PANEL_HEIGHT * canvas._SCALE
"""Pixels from one panel to the next."""
LEFT, RIGHT = (canvas._SCALE * x for x in (curves._PLOT_LEFT, curves._PLOT_LEFT + curves._PLOT_WIDTH))
TOP, BOTTOM = (canvas._SCALE * y for y in (34, 34 + curves._PLOT_HEIGHT))


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def places_of(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns `[n, 2]` of that color."""
    return np.argwhere(np.abs(pixels - np.array(color)).max(axis=2) <= 4)


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def drawn(tmp_path: Path, rows: list[dict[str, float]]) -> np.ndarray:
    return pixels_of(save_curves(write(tmp_path / "metrics.csv", rows), tmp_path / "deep" / "curves.png"))


def in_plot(pixels: np.ndarray, number: int = 0) -> np.ndarray:
    """What is between the axes of a panel."""
    return pixels[number * PANEL + TOP : number * PANEL + BOTTOM - 4, LEFT + 8 : RIGHT - 8]


def test_a_curve_goes_through_its_points(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": step / 100} for step in range(0, 101, 10)]
    places = places_of(in_plot(drawn(tmp_path, rows)), COLORS[0])
    rise = 1 - places[:, 0] / (BOTTOM - TOP)
    along = (places[:, 1] + 8) / (RIGHT - LEFT)
    assert len(places) > 1000 and np.abs(rise - along).max() < 0.03
    assert along.min() < 0.03 and along.max() > 0.97


def test_every_kind_of_number_has_its_panel_and_what_was_not_logged_has_none(tmp_path: Path) -> None:
    whole = {"step": 1, "train/loss": 2.0, "val/top1": 0.5, "train/lr": 0.1, "train/images_per_s": 900.0}
    for names, num_panels in ((whole, 3), ({"step": 1, "val/top1": 0.5}, 1), ({"step": 1, "train/x": 0.5}, 1)):
        pixels = drawn(tmp_path, [names, {**names, "step": 2}])
        assert round((len(pixels) - 16) / PANEL) == num_panels
    assert not len(places_of(pixels, COLORS[0]))  # of the last one, where nothing is to be drawn


def test_a_loss_term_is_known_by_its_weight(tmp_path: Path) -> None:
    row = {"train/loss": 2.0, "train/soft_target": 1.5, "train/gradient_norm": 1.0}
    without = in_plot(drawn(tmp_path, [{"step": step, **row} for step in (1, 2)]))
    row["train/soft_target_weight"] = 0.9
    with_term = in_plot(drawn(tmp_path, [{"step": step, **row} for step in (1, 2)]))
    assert not len(places_of(without, COLORS[1])) and len(places_of(with_term, COLORS[1]))
    assert not len(places_of(with_term, COLORS[2]))


def test_empty_cells_and_numbers_that_are_none_are_passed_over(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": 1.0 + step % 3, "val/loss": ""} for step in range(9)]
    rows[8]["val/loss"] = 3.0
    found = []
    for value in ("", "nan", "inf"):
        rows[4]["train/loss"] = value
        found.append(drawn(tmp_path, rows))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    assert len(places_of(in_plot(found[0]), COLORS[0])) > 1000


def test_a_long_curve_is_drawn_through_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"step": step, "train/loss": float(rng.normal(5, 1))} for step in range(40_000)]
    rows[20_000]["train/loss"] = 50.0
    places = places_of(in_plot(drawn(tmp_path, rows)), COLORS[0])
    middle = 1 - places[:, 0] / (BOTTOM - TOP)
    assert np.quantile(middle, 0.95) - np.quantile(middle, 0.05) < 0.05


def test_one_step_and_a_constant_are_drawn_too(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, [{"step": 7, "train/loss": 0.0, "val/top1": 1.0}])
    assert len(places_of(pixels, COLORS[0])) > 100
    assert len(places_of(in_plot(drawn(tmp_path, [{"step": s, "val/top1": 0.5} for s in (0, 9)])), COLORS[0]))


# The confusion matrix


def cells(path: Path, num_classes: int, size: float) -> np.ndarray:
    """The color at an inner corner of each cell, `[K, K, 3]`, off its count."""
    pixels = pixels_of(path)
    frame = places_of(pixels, GRAY)
    columns, counts = np.unique(frame[:, 1], return_counts=True)
    left = columns[counts > 0.9 * size * num_classes][0]
    rows, counts = np.unique(frame[:, 0], return_counts=True)
    top = rows[counts > 0.9 * size * num_classes][0]
    at = (np.arange(num_classes) * size + 6).astype(int)
    return pixels[top + at][:, left + at]


def test_a_cell_is_the_darker_the_larger_its_part_of_the_row(tmp_path: Path) -> None:
    matrix = [[100, 0, 0], [50, 50, 0], [1, 0, 9]]
    found = cells(save_confusion(matrix, ["a", "b", "c"], tmp_path / "c.png"), 3, 88)
    darkness = 255 - found.mean(axis=2)
    assert np.abs(found[0, 0] - np.array(curves._DARKEST)).max() <= 2
    assert darkness[1, 0] == pytest.approx(darkness[1, 1]) and darkness[0, 0] > darkness[1, 0] > darkness[2, 0] > 10
    assert darkness[0, 1] == darkness[1, 2] == darkness[2, 1] == 0


def test_names_stand_at_the_axes_and_numbers_where_there_are_none(tmp_path: Path) -> None:
    matrix = np.eye(4, dtype=int).tolist()
    short = pixels_of(save_confusion(matrix, None, tmp_path / "a.png"))
    long = pixels_of(save_confusion(matrix, ["a class with a long name"] * 4, tmp_path / "b.png"))
    assert long.shape[0] > short.shape[0] + 100 and long.shape[1] > short.shape[1] + 100


@pytest.mark.parametrize("num_classes", [1, 16, 17, 100, 1000])
def test_any_number_of_classes_makes_a_picture_of_a_size_to_look_at(tmp_path: Path, num_classes: int) -> None:
    path = save_confusion(np.eye(num_classes, dtype=int).tolist(), None, tmp_path / "c.png")
    height, width, _ = pixels_of(path).shape
    assert 200 < height < 2600 and 500 < width < 2600


def test_a_label_without_samples_is_a_white_row(tmp_path: Path) -> None:
    found = cells(save_confusion([[3, 0], [0, 0]], None, tmp_path / "c.png"), 2, 88)
    assert (found[1] == 255).all()
