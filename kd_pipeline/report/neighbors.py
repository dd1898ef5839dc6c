"""Draw what networks find alike: images, and beside each its nearest neighbors in the features of every network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from kd_pipeline._core.text import printable
from kd_pipeline.report.pixels import save_image

__all__ = ["save_neighbors"]

_TILE, _GAP, _BORDER = 56, 24, 3
_TEXT_HEIGHT = 20
_BLACK, _GREEN, _RED = (20, 20, 20), (0, 140, 50), (210, 30, 30)

Images = NDArray[np.uint8]


def save_neighbors(
    queries: Images,
    neighbors: Mapping[str, tuple[Images, NDArray[np.bool_] | None]],
    path: Path,
) -> Path:
    """Write a PNG file with a row for each query: the query, then its neighbors in the features of each network.

    A neighbor of the query's class has a green frame, another a red one, and all have a black one if classes are not
    known. A link at `path` is replaced, and not written through.

    Args:
        queries: `[Q, H, W, 3]` uint8.
        neighbors: by the name of the network, the neighbors `[Q, K, H, W, 3]` uint8, the nearest first, and whether
            each is of the query's class `[Q, K]`, or None where classes are not known.
        path: the file.

    Raises:
        ConfigError: it cannot be written.
    """
    groups = {"": (queries[:, None], None), **neighbors}
    widths = [images.shape[1] * _TILE for images, _ in groups.values()]
    size = (sum(widths) + _GAP * (len(widths) + 1), len(queries) * _TILE + _TEXT_HEIGHT + _GAP)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    x = _GAP
    for (name, (images, is_alike)), width in zip(groups.items(), widths, strict=True):
        draw.text((x, 4), printable(name), fill=_BLACK, font=font)
        for row, tiles in enumerate(images):
            colors: Sequence[tuple[int, int, int]] = (
                [_BLACK] * len(tiles) if is_alike is None else [_GREEN if alike else _RED for alike in is_alike[row]]
            )
            for column, (tile, color) in enumerate(zip(tiles, colors, strict=True)):
                _draw_tile(picture, tile, (x + column * _TILE, _TEXT_HEIGHT + row * _TILE), color)
        x += width + _GAP
    return save_image(picture, path)


def _draw_tile(picture: Image.Image, tile: Images, corner: tuple[int, int], color: tuple[int, int, int]) -> None:
    """One image within a frame of this color."""
    frame = Image.new("RGB", (_TILE - 2, _TILE - 2), color)
    inner = _TILE - 2 - 2 * _BORDER
    frame.paste(Image.fromarray(tile).resize((inner, inner), Image.Resampling.NEAREST), (_BORDER, _BORDER))
    picture.paste(frame, (corner[0] + 1, corner[1] + 1))
