"""What a header says, how an image may be turned, and the error for files that no decoder reads rightly."""

from enum import IntEnum
from typing import Literal, NamedTuple

__all__ = ["CONVERT", "Decoder", "Header", "Orientation", "UnreadableFileError"]

Orientation = Literal["upright", "stored"]
"""Images turned as their EXIF says, or with their pixels as they are in the file."""

CONVERT = "convert it to a PNG or JPEG of 8 bits"
"""Advice for files that are fine, but not for us."""


class UnreadableFileError(RuntimeError):
    """A file that cannot be read; the message says why in one line. A RuntimeError, as those of DALI."""


class Decoder(IntEnum):
    """What decodes a file."""

    DALI = 1
    DALI_CHECKED = 2
    """DALI, which decodes a window of the file even where the rest is damaged: decode it in full once before."""
    PILLOW = 3
    """Pillow, as DALI refuses such files or gives wrong pixels for them without an error."""


class Header(NamedTuple):
    """What the pixels of a file depend on."""

    kind: str
    """Such as `CMYK JPEG`."""
    decoder: Decoder
    format: str = ""
    """Pillow's name of the format, where Pillow decodes it."""
    max_level: int = 65535
    """The level of white in a grayscale image of more than 8 bits."""
    is_inverted: bool = False
    """Whether 0 is white in a grayscale image of more than 8 bits."""
