"""Every doubling is as wide as the last, and every curve is drawn where its points are."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.report import scaling
from kd_pipeline.report.canvas import COLORS
from kd_pipeline.report.scaling import save_scaling

SCALE = 2
"""Pixels for each unit of the canvas."""


def drawn(tmp_path: Path, curves: dict[str, list[tuple[float, float]]]) -> np.ndarray:
    path = save_scaling(curves, tmp_path / "deep/picture.png", title="speed", x="batch", y="images/s")
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def places_of(pixels: np.ndarray, number: int) -> np.ndarray:
    """Rows and columns `[n, 2]` of a curve within the axes, in the canvas's units."""
    places = np.argwhere(np.abs(pixels - np.array(COLORS[number])).max(axis=2) <= 4) / SCALE
    return places[places[:, 1] <= scaling._LEFT + scaling._WIDTH]


def test_a_curve_goes_through_its_points_over_the_logarithm_of_the_size(tmp_path: Path) -> None:
    curve = [(1.0, 0.0), (2.0, 20.0), (8.0, 60.0), (32.0, 100.0)]  # 20 more for every doubling
    places = places_of(drawn(tmp_path, {"ours": curve}), 0)
    rise = (scaling._TOP + scaling._HEIGHT - places[:, 0]) / scaling._HEIGHT
    along = (places[:, 1] - scaling._LEFT - 12) / (scaling._WIDTH - 24)
    assert len(places) > 1000 and np.abs(rise - along).max() < 0.03
    for size, value in curve:
        assert np.hypot(along - math.log2(size) / 5, rise - value / 100).min() < 0.005


@pytest.mark.parametrize("size", [1.0, 7.0])
def test_one_size_alone_is_a_dot(tmp_path: Path, size: float) -> None:
    places = places_of(drawn(tmp_path, {"ours": [(size, 5.0)]}), 0)
    assert 50 < len(places) < 300 and np.ptp(places[:, 0]) < 8


def test_curves_have_colors_and_names_of_their_own_and_share_the_axes(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, {"low": [(1.0, 1.0), (2.0, 1.0)], "high": [(1.0, 2.0), (2.0, 2.0)]})
    low, high = places_of(pixels, 0), places_of(pixels, 1)
    height = scaling._TOP + scaling._HEIGHT - np.median(high[:, 0])
    assert height == pytest.approx(scaling._HEIGHT, abs=3)
    assert scaling._TOP + scaling._HEIGHT - np.median(low[:, 0]) == pytest.approx(height / 2, abs=3)
    wider = drawn(tmp_path, {"low": [(1.0, 1.0)], "a far longer name than that": [(1.0, 2.0)]})
    assert wider.shape[1] > pixels.shape[1] + 100


def test_a_curve_without_points_is_left_out_and_none_at_all_is_a_picture_too(tmp_path: Path) -> None:
    both = drawn(tmp_path, {"empty": [], "ours": [(1.0, 1.0), (4.0, 2.0)]})
    assert (both == drawn(tmp_path, {"ours": [(1.0, 1.0), (4.0, 2.0)]})).all()
    assert drawn(tmp_path, {}).shape[0] > 600
