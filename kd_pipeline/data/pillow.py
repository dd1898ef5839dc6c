"""Pixels of the files that DALI refuses or decodes wrongly without an error, by Pillow."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from kd_pipeline.data.headers import Header, Orientation, UnreadableFileError, check_size
from kd_pipeline.data.headers.base import CONVERT

__all__ = ["decode_with_pillow"]

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation."""
_TO_STORED = _TO_UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_WITHOUT_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr"}
"""Pillow's modes that its `convert` turns into RGB as they look."""


def decode_with_pillow(data: bytes, header: Header, *, orientation: Orientation, max_pixels: int) -> NDArray[np.uint8]:
    """The RGB pixels `[H, W, 3]` of the file with the content `data`, without transparency.

    Raises:
        UnreadableFileError: Pillow cannot decode it, or its header claims more than `max_pixels` allows.
    """
    # Pillow's plugins raise all kinds of errors on damaged files.
    try:
        image = Image.open(io.BytesIO(data), formats=[header.format])
    except Image.DecompressionBombError as exc:
        raise UnreadableFileError(
            f"its header claims more pixels than PIL.Image.MAX_IMAGE_PIXELS allows: {exc}"
        ) from exc
    except Exception as exc:
        raise UnreadableFileError(f"{header.kind}, which neither DALI nor Pillow decodes; {CONVERT}") from exc
    with image:
        width, height = image.size
        check_size(height, width, header.pixel_bytes, max_pixels)
        try:
            # Loading turns a TIFF, and finds the EXIF of a PNG that stands after the pixels.
            of_tiff = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation, 1)
            image.load()
            turn = _turn(image, of_tiff, orientation)
            converted = _to_rgb(image, header)
            return np.asarray(converted if turn is None else converted.transpose(turn))
        except UnreadableFileError:
            raise
        except Exception as exc:
            reason = " ".join(str(exc).split())
            raise UnreadableFileError(f"{width}x{height} {header.kind} that does not decode: {reason}") from exc


def _turn(image: Image.Image, of_tiff: int, orientation: Orientation) -> Image.Transpose | None:
    """What to do with the pixels that Pillow gives; of a TIFF they are upright."""
    if image.format == "TIFF":
        return _TO_STORED.get(of_tiff) if orientation == "stored" else None
    if orientation == "stored":
        return None
    try:
        return _TO_UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing
        return None


def _to_rgb(image: Image.Image, header: Header) -> Image.Image:
    if image.mode in _WITHOUT_PREMULTIPLIED:
        image = image.convert(_WITHOUT_PREMULTIPLIED[image.mode])
    if image.mode in _EIGHT_BITS:
        return image.convert("RGB")
    # Pillow's own conversion of these would clip at 255.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and header.format == "PPM")):
        raise UnreadableFileError(f"{header.kind}, which Pillow decodes as {image.mode!r}; {CONVERT}")
    levels = np.minimum(np.arange(2**16) * (255 / header.max_level), 255)
    levels = 255 - levels if header.is_inverted else levels
    gray = np.take(np.rint(levels).astype(np.uint8), np.asarray(image), mode="clip")
    return Image.fromarray(gray).convert("RGB")
