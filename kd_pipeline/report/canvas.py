"""A white picture to draw on with Pillow, and the colors that the pictures of this room share."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["BLACK", "COLORS", "GRAY", "PALE", "WHITE", "Canvas", "Color", "Point", "text_width", "ticks"]

Color = tuple[int, int, int]
Point = tuple[float, float]

BLACK, GRAY, PALE, WHITE = (32, 32, 32), (120, 120, 120), (226, 226, 226), (255, 255, 255)
COLORS: tuple[Color, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (110, 80, 60),
    (90, 90, 90),
)
"""Those of Okabe and Ito, which color-blind people can tell apart."""

_SCALE = 2
"""Pixels of a picture for each unit of length here."""
_SMOOTH = 2
"""It is drawn so many times larger first, as Pillow's lines have hard edges."""


class Canvas:
    """A white picture to draw on in units of its own, with x to the right and y down."""

    def __init__(self, width: float, height: float) -> None:
        self._factor = _SCALE * _SMOOTH
        self._image = Image.new("RGB", (round(width * self._factor), round(height * self._factor)), WHITE)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], *, color: Color = BLACK, width: float = 1) -> None:
        """Draw through `points`."""
        places = [self._place(point) for point in points]
        self._draw.line(places, fill=color, width=round(width * self._factor), joint="curve")

    def box(self, first: Point, last: Point, *, color: Color, fill: Color | None = None) -> None:
        """Outline the rectangle between two opposite corners."""
        self._draw.rectangle([self._place(first), self._place(last)], fill, color, self._factor // 2)

    def dot(self, center: Point, *, color: Color, radius: float) -> None:
        """Draw a filled circle."""
        x, y = center
        corners = [self._place((x - radius, y - radius)), self._place((x + radius, y + radius))]
        self._draw.ellipse(corners, color)

    def text(self, place: Point, text: str, *, size: float = 11, color: Color = BLACK, anchor: str = "lm") -> None:
        """Write `text` with `place` at what Pillow calls its anchor: by default the middle of its left edge."""
        self._draw.text(self._place(place), text, color, ImageFont.load_default(size * self._factor), anchor)

    def text_upwards(
        self, place: Point, text: str, *, size: float = 11, color: Color = BLACK, anchor: str = "mt"
    ) -> None:
        """Write `text` from the bottom up, with `place` at the middle of its upper end, or of all of it (`mm`)."""
        font = ImageFont.load_default(size * self._factor)
        _, above, _, below = font.getbbox("Ag", anchor="ls")
        mask = Image.new("L", (math.ceil(font.getlength(text)), math.ceil(below - above)))
        ImageDraw.Draw(mask).text((0, -above), text, 255, font, "ls")
        turned = mask.rotate(90, expand=True)
        x, y = self._place(place)
        rise = turned.height / 2 if anchor == "mm" else 0
        self._image.paste(color, (round(x - turned.width / 2), round(y - rise)), turned)

    def paste(self, pixels: NDArray[np.uint8], place: Point, size: Point) -> None:
        """Put pixels `[H, W, 3]` at `place`, stretched to `size` with sharp edges."""
        x, y = self._place(place)
        width, height = self._place(size)
        stretched = Image.fromarray(pixels).resize((round(width), round(height)), Image.Resampling.NEAREST)
        self._image.paste(stretched, (round(x), round(y)))

    def save(self, path: Path) -> Path:
        """Write the picture as the file `path`, in a folder that is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._image.reduce(_SMOOTH).save(path)
        return path

    def _place(self, point: Point) -> Point:
        return point[0] * self._factor, point[1] * self._factor


def ticks(low: float, high: float, *, number: int = 6) -> list[float]:
    """Round numbers around `low` to `high`, about `number` of them; from 0 on where the two are equal."""
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / number))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= number)
    return [step * place for place in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]


def text_width(text: str, size: float) -> float:
    """Of text on one line, in the canvas's units."""
    return ImageFont.load_default(size * _SCALE).getlength(text) / _SCALE
