"""Headers of all formats, told apart by the first bytes of a file and never by its name."""

import re
import struct
from collections.abc import Callable

from kd_pipeline.data.headers.base import CONVERT, MAX_PARTS, PLAIN_PIXEL_BYTES, Decoder, Header, UnreadableFileError
from kd_pipeline.data.headers.exif import is_clear
from kd_pipeline.data.headers.jpeg import read_jpeg
from kd_pipeline.data.headers.jpeg2000 import read_jpeg2000
from kd_pipeline.data.headers.tiff import read_tiff

__all__ = ["read_header"]

_OTHER_KINDS = (
    (0, b"GIF8", "a GIF"),
    (4, b"ftypavi", "an AVIF image or video"),
    (4, b"ftyphei", "a HEIF image"),
    (4, b"ftyphevc", "a HEIF image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftyp", "a video"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"II\xbc\x01", "a JPEG XR image"),
    (0, b"P7\n", "a PAM image"),
    (0, b"PF\n", "a PFM image of floating-point numbers"),
    (0, b"Pf\n", "a PFM image of floating-point numbers"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"#?RADIANCE", "a Radiance HDR image"),
    (128, b"DICM", "a DICOM file"),
    (0, b"\x00\x00\x01\x00", "an icon"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", "a git-lfs pointer, whose file `git lfs pull` fetches,"),
)
"""Where the bytes are that name a kind of file which is not read, and what it is."""
_PROFILE = b"Raw profile type exif"
"""How ImageMagick starts a text that is EXIF."""
_WEBP_ANIMATION, _WEBP_EXIF, _WEBP_ALPHA = 2, 8, 16
"""Flags of an extended WebP."""
_ANIMATED_PIXEL_BYTES = 8
"""Of two images with transparency, from which Pillow's decoder makes the next one."""
_NUMBER = re.compile(rb"\s*(\d{1,10})(?=\s)")


def read_header(data: memoryview) -> Header:
    """The header of a file with the content `data`.

    Raises:
        UnreadableFileError: no decoder reads such a file rightly, or its header is broken.
    """
    start = bytes(data[:4])
    read: Callable[[memoryview], Header] | None = _READERS.get(start[:2])
    if start == b"RIFF" and bytes(data[8:12]) == b"WEBP":
        read = _read_webp
    elif start == b"\x00\x00\x00\x0c" and bytes(data[4:8]) == b"jP  ":
        read = read_jpeg2000
    elif start == b"\x89PNG":
        read = _read_png
    if read is None or start == b"II\xbc\x01":
        raise _unknown(data)
    try:
        return read(data)
    except (struct.error, IndexError, OverflowError) as exc:  # it is cut off, or points outside of the file
        raise UnreadableFileError(f"its header is broken; it starts with {bytes(data[:8])!r}") from exc


def _unknown(data: memoryview) -> UnreadableFileError:
    for place, mark, kind in _OTHER_KINDS:
        if bytes(data[place : place + len(mark)]) == mark:
            advice = "" if kind.endswith(",") else f"; {CONVERT}"
            return UnreadableFileError(f"this is {kind} and not of a kind that is read{advice}")
    start = bytes(data[:8])
    return UnreadableFileError(
        f"DALI does not know this kind of file, or its header is broken; it starts with {start!r}"
    )


def _read_png(data: memoryview) -> Header:
    """Of EXIF in a PNG, DALI reads only what the standard has: one chunk that starts as a TIFF does."""
    # Whatever the colors are, they become RGB of the file's own depth first.
    pixel_bytes = PLAIN_PIXEL_BYTES * (2 if data[24] > 8 else 1)
    with_exif = Header("PNG with unusual EXIF", Decoder.PILLOW, "PNG", pixel_bytes=pixel_bytes + 1)
    place, num_exif = 8, 0
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            return Header("PNG", Decoder.DALI, pixel_bytes=pixel_bytes)
        length, kind = struct.unpack_from(">I4s", data, place)
        start = place + 8
        if kind == b"eXIf":
            num_exif += 1
            if num_exif > 1 or not is_clear(data[start : start + length]):
                return with_exif
        elif kind in (b"zTXt", b"tEXt", b"iTXt") and data[start : start + len(_PROFILE)] == _PROFILE:
            return with_exif
        if start + length > len(data):  # DALI would take so much memory first
            raise IndexError
        place = start + length + 4
    raise IndexError


def _read_webp(data: memoryview) -> Header:
    """DALI misses the byte that pads a chunk of odd length, and with it the EXIF chunk after it."""
    if bytes(data[12:16]) != b"VP8X":
        return Header("WebP", Decoder.DALI)
    if data[20] & _WEBP_ANIMATION:
        return Header("animated WebP", Decoder.PILLOW, "WEBP", pixel_bytes=_ANIMATED_PIXEL_BYTES)
    pixel_bytes = 4 if data[20] & _WEBP_ALPHA else PLAIN_PIXEL_BYTES
    if not data[20] & _WEBP_EXIF:
        return Header("WebP", Decoder.DALI, pixel_bytes=pixel_bytes)
    place = 12
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            return Header("WebP with EXIF", Decoder.DALI, pixel_bytes=pixel_bytes)
        (length,) = struct.unpack_from("<I", data, place + 4)
        if length % 2:
            return Header("WebP with EXIF", Decoder.PILLOW, "WEBP", pixel_bytes=pixel_bytes)
        place += 8 + length
    raise IndexError


def _read_bmp(data: memoryview) -> Header:
    (header,) = struct.unpack_from("<I", data, 14)
    bits, compression = struct.unpack_from("<HI", data, 28) if header >= 40 else (data[24], 0)
    if header >= 40 and (compression, bits) in ((0, 8), (0, 24), (0, 32), (3, 32)):
        return Header("BMP", Decoder.DALI_CHECKED, pixel_bytes=4 if bits == 32 else PLAIN_PIXEL_BYTES)
    names = {1: "run-length encoded ", 2: "run-length encoded ", 4: "JPEG inside ", 5: "PNG inside "}
    return Header(f"BMP of {names.get(compression, '')}{bits} bits", Decoder.PILLOW, "BMP")


def _read_pnm(data: memoryview) -> Header:
    """Of PNM, DALI takes the levels as they are, whatever the largest is. Pillow takes 32 bits for a deep one."""
    kind, head = chr(data[1]), bytes(data[2:64])
    if kind in "56":
        numbers: list[int] = []
        place = 0
        while len(numbers) < 3 and (found := _NUMBER.match(head, place)):
            numbers.append(int(found[1]))
            place = found.end()
        if len(numbers) == 3 and numbers[2] == 255:
            return Header("PNM", Decoder.DALI)
    return Header(f"PNM P{kind}", Decoder.PILLOW, "PPM", pixel_bytes=4)


_READERS: dict[bytes, Callable[[memoryview], Header]] = {
    b"\xff\xd8": read_jpeg,
    b"\xff\x4f": read_jpeg2000,
    b"II": read_tiff,
    b"MM": read_tiff,
    b"BM": _read_bmp,
    **{f"P{digit}".encode(): _read_pnm for digit in range(1, 7)},
}
