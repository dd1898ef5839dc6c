"""Stacked bars that show at a glance where the time goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_pipeline.report.canvas import BLACK, COLORS, GRAY, PALE, WHITE, Canvas, text_width, ticks

__all__ = ["Bar", "save_bars"]

_ROW, _BAR = 34.0, 20.0
"""Distance of the bars, and their height."""
_PLOT_WIDTH, _TOP = 520.0, 78.0
_NARROW = 26.0
"""Parts that are drawn shorter have no number in them."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of the picture."""

    name: str
    parts: Mapping[str, float]
    """Lengths by name; the same names in every bar."""
    note: str
    """Stands behind the bar."""


def save_bars(bars: Sequence[Bar], path: Path, *, title: str, unit: str) -> Path:
    """Draw `bars`, one below the other, as a PNG at `path`."""
    left = max(text_width(bar.name, 11) for bar in bars) + 24
    right = left + _PLOT_WIDTH
    canvas = Canvas(right + max(text_width(bar.note, 11) for bar in bars) + 28, _TOP + _ROW * len(bars) + 40)
    marks = ticks(0, max(sum(bar.parts.values()) for bar in bars))
    scale = _PLOT_WIDTH / marks[-1]
    bottom = _TOP + _ROW * len(bars)
    canvas.text((left, 18), title, size=14)
    colors = dict(zip(bars[0].parts, COLORS, strict=False))
    place = left
    for name, color in colors.items():
        canvas.box((place, 39), (place + 12, 51), color=color, fill=color)
        canvas.text((place + 18, 45), name)
        place += text_width(name, 11) + 44
    for mark in marks:
        canvas.line([(left + mark * scale, _TOP - 8), (left + mark * scale, bottom)], color=PALE)
        canvas.text((left + mark * scale, bottom + 8), f"{mark:,.0f} {unit}", anchor="mt", color=GRAY)
    for number, bar in enumerate(bars):
        middle = _TOP + _ROW * number + _BAR / 2
        canvas.text((left - 10, middle), bar.name, anchor="rm")
        end = left
        for name, length in bar.parts.items():
            start, end = end, end + max(length, 0) * scale
            canvas.box((start, middle - _BAR / 2), (end, middle + _BAR / 2), color=colors[name], fill=colors[name])
            if end - start >= _NARROW:
                canvas.text(((start + end) / 2, middle), f"{length:,.0f}", anchor="mm", color=WHITE, size=10)
        canvas.text((end + 8, middle), bar.note, color=BLACK)
    return canvas.save(path)
