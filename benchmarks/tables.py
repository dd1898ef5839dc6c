"""Cells and tables of results in Markdown."""

from collections.abc import Sequence
from statistics import median

__all__ = ["markdown_table", "with_range"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column aligned left and the others right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (header, align, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def with_range(values: Sequence[float], digits: int) -> str:
    """The median, the lowest and the highest, such as `2.0 (1.0-4.0)`."""
    middle, low, high = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"
