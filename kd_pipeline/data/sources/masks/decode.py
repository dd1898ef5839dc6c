"""The values of a mask: those of a PNG, where colors of a palette stay numbers, or of an `.npy` file."""

import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kd_pipeline.data.headers import UnreadableFileError, check_size, read_header
from kd_pipeline.data.sources.pixels.stored_arrays import parse_header

__all__ = ["MASK_ENDINGS", "decode_mask"]

MASK_ENDINGS = (".png", ".npy")
"""Of the files that are masks, in any case; what is in a file says which of them it is."""

_PNG, _NPY = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_PNG_START = struct.Struct(">8x4x4sIIBB")
"""After the signature and the length of the first chunk: its kind, width, height, bits and kind of colors."""
_GRAY, _PALETTE = 0, 3
_COLORS = {2: "RGB", 4: "gray with transparency", 6: "RGB with transparency"}
_AS_CLASSES = "save the class of each pixel: Image.fromarray(classes.astype(np.uint8)).save(path), as a .png"
_KINDS = ((b"\xff\xd8", "a JPEG, which changes values"), (b"II", "a TIFF"), (b"MM", "a TIFF"), (b"BM", "a BMP"))


def decode_mask(content: NDArray[np.uint8], *, max_pixels: int) -> NDArray[Any]:
    """The integers `[H, W]` in the file with the content `content` `[L]`: uint8, uint16, or any integers of an `.npy`.

    Raises:
        UnreadableFileError: it is neither a PNG of one channel nor an array `[H, W]` of integers, is damaged, or has
            more pixels than `max_pixels` allows.
    """
    start = content[:8].tobytes()
    if start == _PNG:
        return _decode_png(content, max_pixels)
    if start.startswith(_NPY):
        return _decode_npy(content, max_pixels)
    if not len(content):
        raise UnreadableFileError("it is empty")
    kind = next((kind for mark, kind in _KINDS if start.startswith(mark)), f"of a kind that starts with {start!r}")
    raise UnreadableFileError(f"it is {kind}, and masks are PNG or .npy files; {_AS_CLASSES}")


def _decode_png(content: NDArray[np.uint8], max_pixels: int) -> NDArray[Any]:
    try:
        kind, width, height, bits, color = _PNG_START.unpack_from(content.data)
    except struct.error:
        kind = b""
    if kind != b"IHDR":
        raise UnreadableFileError("it is a PNG with a broken header")
    if color in _COLORS:
        raise UnreadableFileError(
            f"it has colors ({_COLORS[color]}), which do not say a class; {_AS_CLASSES}, with the table of colors that "
            "the data set has"
        )
    # Pillow has a copy in two parts for a moment.
    check_size(height, width, 4 if bits > 8 else 1, max_pixels)
    read_header(content.data)  # it walks through all chunks, of which Pillow has no limit
    # Pillow's plugins raise all kinds of errors on damaged files.
    try:
        with Image.open(io.BytesIO(content.tobytes()), formats=["PNG"]) as image:
            if image.size != (width, height):  # a second header
                raise ValueError(f"it has another header of {image.width}x{image.height} pixels")
            image.load()
            values = np.asarray(image)
    except Exception as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        size = f"{width}x{height}"
        raise UnreadableFileError(f"it is a {size} PNG that does not decode: {reason:.200}") from exc
    if values.shape != (height, width) or values.dtype.kind not in "bui":
        raise UnreadableFileError(
            f"it is a PNG that Pillow decodes as {values.dtype} {list(values.shape)}; {_AS_CLASSES}"
        )
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if color == _GRAY and bits in (2, 4):  # Pillow stretches these to 255
        return values // np.uint8(255 // (2**bits - 1))
    return values.astype(np.uint16) if values.dtype.itemsize > 1 else values


def _decode_npy(content: NDArray[np.uint8], max_pixels: int) -> NDArray[Any]:
    try:
        header = parse_header(content[:10_000].tobytes())
    except ValueError as exc:
        raise UnreadableFileError(f"it is no array that is read: {exc}") from exc
    if len(header.shape) != 2 or header.dtype.kind not in "bui":
        found = f"{header.dtype!s:.60} {list(header.shape)!s:.60}"
        raise UnreadableFileError(f"it is an array {found}, and a mask is integers [H, W]; {_npy_advice(header.dtype)}")
    height, width = header.shape
    check_size(height, width, header.dtype.itemsize, max_pixels)
    num_bytes = height * width * header.dtype.itemsize
    num_there = len(content) - header.start
    if num_there < num_bytes:
        raise UnreadableFileError(f"it is cut off: an array of {num_bytes} bytes, of which {num_there} are there")
    flat = np.frombuffer(content.data, header.dtype, height * width, header.start)
    values: NDArray[Any] = flat.reshape((height, width), order="F" if header.is_fortran else "C")
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _npy_advice(dtype: np.dtype[Any]) -> str:
    return "save classes.astype(np.uint8)" if dtype.kind == "f" else "save an array of that shape"
