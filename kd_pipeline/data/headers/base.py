"""What a header says, how an image may be turned, how large it may be, and the error for what is not read."""

from enum import IntEnum
from typing import Literal, NamedTuple

__all__ = [
    "CONVERT",
    "MAX_PARTS",
    "PLAIN_PIXEL_BYTES",
    "Decoder",
    "Header",
    "Orientation",
    "UnreadableFileError",
    "check_size",
    "max_file_bytes",
]

Orientation = Literal["upright", "stored"]
"""Images turned as their EXIF says, or with their pixels as they are in the file."""

CONVERT = "convert it to a PNG or JPEG of 8 bits"
"""Advice for files that are fine, but not for us."""

PLAIN_PIXEL_BYTES = 3
"""Bytes of an RGB pixel of 8 bits, which is what all images become; `max_pixels` counts such pixels."""
MAX_PARTS = 100_000
"""Segments, chunks or boxes of a file that are walked through; a header after more of them counts as broken."""
_METADATA_BYTES = 64 * 2**20
"""Room for what a file holds besides its pixels, such as color profiles and previews."""


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
    pixel_bytes: int = PLAIN_PIXEL_BYTES
    """Bytes of memory that the decoder takes for a pixel, before it is converted to RGB of 8 bits; at least those."""


def check_size(height: int, width: int, pixel_bytes: int, max_pixels: int) -> None:
    """Check an image's size before its decoder takes memory for it.

    Raises:
        UnreadableFileError: it has no pixels, or more of them or of their bytes than `max_pixels` allows.
    """
    pixels = height * width
    if min(height, width) < 1:
        raise UnreadableFileError(f"its header claims {width}x{height} pixels")
    if pixels > max_pixels:
        raise UnreadableFileError(f"its header claims {width}x{height} pixels, more than max_pixels={max_pixels}")
    if pixels * pixel_bytes > PLAIN_PIXEL_BYTES * max_pixels:
        needed = -(-pixels * pixel_bytes // PLAIN_PIXEL_BYTES)
        raise UnreadableFileError(
            f"its header claims {width}x{height} pixels, which take {pixels * pixel_bytes} bytes unpacked, as many as "
            f"{needed} pixels of 8-bit RGB do, more than max_pixels={max_pixels}"
        )


def max_file_bytes(max_pixels: int) -> int:
    """The most bytes that are read of a file; an image of `max_pixels` fits even without compression."""
    return PLAIN_PIXEL_BYTES * max_pixels + _METADATA_BYTES
