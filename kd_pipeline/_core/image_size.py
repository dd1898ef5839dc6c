"""Sizes of images as settings: one number for a square, or height and width."""

from typing import Annotated

from pydantic import AfterValidator, Field

__all__ = ["Side", "Size", "as_size", "height_width", "size_text"]


def as_size(value: int | tuple[int, int]) -> int | tuple[int, int]:
    """One number for a square, so equal sizes are equal settings."""
    return value[0] if isinstance(value, tuple) and value[0] == value[1] else value


Side = Annotated[int, Field(gt=0, le=8192)]
Size = Annotated[Side | tuple[Side, Side], AfterValidator(as_size)]
"""Height and width in pixels, one number for a square."""


def size_text(size: int | tuple[int, int]) -> str:
    """A `Size` as the command line takes it: `224`, or `384x640`."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of a `Size`."""
    return size if isinstance(size, tuple) else (size, size)
