"""The picture of neighbors: a row for each query, and frames that say which neighbors are alike."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.errors import ConfigError
from kd_pipeline.report.neighbors import save_neighbors


def tiles(*grays: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), gray, dtype=np.uint8) for gray in grays])


def test_frames_say_which_neighbors_are_alike(tmp_path: Path) -> None:
    neighbors = np.stack([tiles(200, 210), tiles(220, 230)])
    is_alike = np.array([[True, False], [True, True]])
    path = save_neighbors(tiles(100, 150), {"student": (neighbors, is_alike)}, tmp_path / "new" / "a.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    found = {
        tuple(color): int(count) for color, count in zip(*np.unique(pixels, axis=0, return_counts=True), strict=True)
    }
    for gray in (100, 150, 200, 210, 220, 230):
        assert 48**2 <= found[(gray,) * 3] < 48**2 + 20  # letters have gray edges
    green, red = (
        sum(count for (r, g, b), count in found.items() if test(r, g, b))
        for test in (lambda r, g, b: g > r + 50, lambda r, g, b: r > g + 50)
    )
    assert green == 3 * red > 0


def test_unwritable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_neighbors(tiles(1), {}, tmp_path / "file" / "a.png")
