"""Pictures as `data:` URIs, which a page holds itself: pixels made small, and PNG files of strangers."""

import base64
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kd_pipeline._core.files import read_regular
from kd_pipeline.errors import DataError

__all__ = ["confusion_uri", "picture_uri", "thumbnail_uri"]

_THUMBNAIL = 160
_LOSSLESS = 64
"""Up to this side a picture is kept as it is; a JPEG file of it would be as large, and blurred."""
_MAX_BYTES, _MAX_PIXELS = 2**25, 30_000_000
_MAX_SIDE = 1600
_MAX_PNG = 400_000
"""Bytes; what takes more, such as photographs, becomes a JPEG file."""
_MIN_MATRIX = 640


def thumbnail_uri(pixels: NDArray[np.uint8]) -> str:
    """The picture `[H, W, 3]` with sides of at most 160 pixels."""
    image = Image.fromarray(pixels)
    if max(image.size) <= _LOSSLESS:
        return _png(image)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return _jpeg(image, quality=82)


def picture_uri(path: Path) -> str:
    """A PNG file, encoded again, with sides of at most 1600 pixels.

    Raises:
        DataError: it cannot be read, is no PNG file, or is too large.
    """
    try:
        with Image.open(io.BytesIO(read_regular(path, max_bytes=_MAX_BYTES)), formats=["PNG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{path} has {image.width} x {image.height} pixels, more than a report shows")
            shown = image.convert("RGB")
    except DataError:
        raise
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or 'it is no PNG file, or a damaged one'}") from None
    except Exception as exc:  # Pillow's decoders raise all kinds of errors on damaged files
        raise DataError(f"{path} cannot be read: {' '.join(str(exc).split())[:200]}") from None
    shown.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    png = _png(shown)
    return png if len(png) <= _MAX_PNG else _jpeg(shown, quality=85)


def confusion_uri(counts: NDArray[np.int64]) -> str:
    """A confusion matrix `[K, K]` as a picture: the darker a point, the larger its share of the label's samples.

    What is right is blue and what is wrong is orange.
    """
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    levels = (255 * np.sqrt(counts / totals).clip(0, 1)).astype(np.uint8)
    white, right, wrong = np.array([255, 255, 255]), np.array([11, 99, 165]), np.array([196, 74, 20])
    shades = np.linspace(0, 1, 256)[:, None]
    colors = (white + shades * (wrong - white)).astype(np.uint8)[levels]
    diagonal = np.arange(len(counts))
    colors[diagonal, diagonal] = (white + shades * (right - white)).astype(np.uint8)[levels.diagonal()]
    image = Image.fromarray(colors)
    if len(counts) > _MAX_SIDE:
        return _png(image.resize((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BOX))
    scale = -(-_MIN_MATRIX // len(counts))
    return _png(image.resize((scale * len(counts), scale * len(counts)), Image.Resampling.NEAREST))


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _jpeg(image: Image.Image, *, quality: int) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
