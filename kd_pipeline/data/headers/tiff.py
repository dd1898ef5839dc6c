"""The header of a TIFF file: the tags of its first image."""

import struct

from kd_pipeline.data.headers.base import CONVERT, PLAIN_PIXEL_BYTES, Decoder, Header, UnreadableFileError

__all__ = ["read_tiff"]

_TAGS = 258, 259, 262, 266, 277, 338, 339
"""Those that are read."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _EXTRA, _FORMAT = _TAGS
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Types of a tag's unsigned integers, and what `struct` calls them."""
_MAX_VALUES = 64
"""Values of a tag that are read."""
_WHITE_IS_ZERO, _GRAY, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_PHOTOMETRICS = {
    _WHITE_IS_ZERO: "gray (white is 0)",
    _GRAY: "gray",
    _RGB: "RGB",
    _PALETTE: "palette",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
}
_REFUSED_PHOTOMETRICS = {4: "mask", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw camera", 34892: "raw camera"}
_NUMBERS = {2: "signed integers", 3: "floating-point numbers", 5: "complex integers", 6: "complex numbers"}
_DALI_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 50000}
"""None, LZW, JPEG, Deflate (two numbers), PackBits, Zstandard."""
_PILLOW_COMPRESSIONS = _DALI_COMPRESSIONS | {2, 3, 4, 6, 32771, 34925, 50001}
"""CCITT, old JPEG, LZMA and WebP too."""
_COMPRESSIONS = {
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34676: "LogLuv",
    34677: "LogLuv",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    34933: "PNG",
    34934: "JPEG XR",
    22610: "JPEG XR",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_ASSOCIATED = 1
"""Extra samples that are transparency, with which the colors are multiplied."""


def read_tiff(data: memoryview) -> Header:
    """The header of a TIFF; a struct.error, IndexError or OverflowError if it is broken.

    Raises:
        UnreadableFileError: a kind of numbers, colors or compression that no decoder reads rightly.
    """
    tags = _read_tags(data)
    compression, photometric = tags.get(_COMPRESSION, (1,))[0], tags.get(_PHOTOMETRIC, (_GRAY,))[0]
    num_samples = tags.get(_SAMPLES, (1,))[0]
    bits, extra = tags.get(_BITS, (1,)), tags.get(_EXTRA, ())
    numbers = next((_NUMBERS[kind] for kind in tags.get(_FORMAT, ()) if kind in _NUMBERS), "integers")
    if numbers != "integers" or max(bits) > 16:
        raise UnreadableFileError(
            f"TIFF of {max(bits)}-bit {numbers}, and nothing in it says which of them is white; {CONVERT}"
        )
    if compression not in _PILLOW_COMPRESSIONS:
        name = _COMPRESSIONS.get(compression, f"unknown compression {compression}")
        raise UnreadableFileError(f"TIFF with {name} inside, which is not decoded; {CONVERT}")
    if photometric not in _PHOTOMETRICS:
        name = _REFUSED_PHOTOMETRICS.get(photometric, f"unknown ({photometric})")
        raise UnreadableFileError(f"TIFF whose colors are {name}, which are not decoded; {CONVERT}")
    pixel_bytes = max(num_samples * -(-max(bits) // 8), PLAIN_PIXEL_BYTES)
    is_deep_gray = photometric == _GRAY and num_samples == 1 and set(bits) == {16}
    is_plain = (
        (photometric == _GRAY and num_samples == 1)
        or (photometric == _RGB and num_samples >= 3 and _ASSOCIATED not in extra)
        or (photometric == _YCBCR and num_samples == 3 and compression == 7)
    )
    if (
        is_plain
        and compression in _DALI_COMPRESSIONS
        and (set(bits) == {8} or is_deep_gray or (photometric == _RGB and set(bits) == {16}))
        and tags.get(_FILL_ORDER, (1,))[0] == 1
    ):
        return Header("TIFF", Decoder.DALI_CHECKED, pixel_bytes=pixel_bytes)
    kind = f"TIFF of {num_samples} x {max(bits)} bits, {_PHOTOMETRICS[photometric]}"
    white, is_inverted = (1 << max(bits)) - 1, photometric == _WHITE_IS_ZERO
    return Header(kind, Decoder.PILLOW, "TIFF", white, is_inverted, pixel_bytes)


def _read_tags(data: memoryview) -> dict[int, tuple[int, ...]]:
    """The integers of the tags of the first image."""
    order = "<" if data[0] == ord("I") else ">"
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    pointer, count, entry = ("Q", "Q", "HHQ") if is_big else ("I", "H", "HHI")
    pointer, count, entry = order + pointer, order + count, order + entry
    (place,) = struct.unpack_from(pointer, data, 8 if is_big else 4)
    (num_entries,) = struct.unpack_from(count, data, place)
    place += struct.calcsize(count)
    tags = {}
    for number in range(min(num_entries, 4096)):
        start = place + number * (20 if is_big else 12)
        tag, kind, num_values = struct.unpack_from(entry, data, start)
        if tag not in _TAGS or kind not in _TYPES or not num_values:
            continue
        content = start + struct.calcsize(entry)
        letter = _TYPES[kind]
        layout = f"{order}{min(num_values, _MAX_VALUES)}{letter}"
        if num_values * struct.calcsize(order + letter) > struct.calcsize(pointer):
            (content,) = struct.unpack_from(pointer, data, content)
        tags[tag] = struct.unpack_from(layout, data, content)
    return tags
