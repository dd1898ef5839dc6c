"""The header of a JPEG file, how many scans it has, and whether all of a progressive one are there."""

import re
import struct
from typing import NoReturn

import numpy as np

from kd_pipeline.data.headers.base import CONVERT, MAX_PARTS, PLAIN_PIXEL_BYTES, Decoder, Header, UnreadableFileError
from kd_pipeline.data.headers.exif import is_clear

__all__ = ["read_jpeg"]

_END, _SCAN, _PROGRESSIVE, _APP1 = 0xD9, 0xDA, 0xC2, 0xE1
_OTHER_PROGRESSIVE = 0xC6, 0xCA, 0xCE
_EXIF = b"Exif\0\0"
_FRAMES = {
    0xC0: "JPEG",
    0xC1: "JPEG",
    _PROGRESSIVE: "progressive JPEG",
    0xC3: "lossless JPEG",
    0xC5: "hierarchical JPEG",
    0xC6: "hierarchical JPEG",
    0xC7: "hierarchical JPEG",
    0xC9: "JPEG with arithmetic coding",
    0xCA: "JPEG with arithmetic coding",
    0xCB: "lossless JPEG with arithmetic coding",
    0xCD: "hierarchical JPEG",
    0xCE: "hierarchical JPEG",
    0xCF: "hierarchical JPEG",
    0xF7: "JPEG-LS",
}
"""By the marker at the start of the frame."""
_END_MARK = b"\xff\xd9"
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}
"""Markers without a segment after them, and the zero after a byte of image data that looks like a marker."""
_MAX_SCANS = 100
"""Passes over the whole image that a file may ask for. Encoders write about ten; a few bytes can ask for one more."""
_COEFFICIENT_BYTES = 2
_PIECE = 4096
_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""A marker with a segment after it, or the end."""


def read_jpeg(data: memoryview) -> Header:
    """The header of a JPEG; a struct.error, IndexError or OverflowError if it is broken.

    Raises:
        UnreadableFileError: it has far more scans than any encoder writes.
    """
    place, num_exif, is_exif_clear = 2, 0, True
    for _ in range(MAX_PARTS):
        place = _next_marker(data, place)
        marker = data[place]
        place += 1
        if marker in _FRAMES:
            break
        if marker == _APP1 and data[place + 2 : place + 8] == _EXIF:
            num_exif += 1
            is_exif_clear = is_clear(data[place + 8 : place + struct.unpack_from(">H", data, place)[0]])
        if marker not in _WITHOUT_LENGTH:
            place += struct.unpack_from(">H", data, place)[0]
    else:
        raise IndexError
    precision, num_components = data[place + 2], data[place + 7]
    kind = _FRAMES[marker]
    scans = _scans(data, place) if _has_many_scans(data, place) else []
    if len(scans) > _MAX_SCANS:
        raise UnreadableFileError(f"{kind} of more than {_MAX_SCANS} scans; {CONVERT}")
    pixel_bytes = _pixel_bytes(data, place, keeps_coefficients=bool(scans))
    is_plain_end = bytes(data[-2:]) == _END_MARK
    cut_off = Header("JPEG", Decoder.DALI_CHECKED, pixel_bytes=pixel_bytes)  # or with something after it
    if not is_plain_end and _END_MARK not in bytes(data[place:]):
        return cut_off
    if marker > _PROGRESSIVE or precision != 8:
        return Header(f"{kind} of {precision} bits", Decoder.PILLOW, "JPEG", pixel_bytes=pixel_bytes)
    if num_components not in (1, 3):
        # DALI decodes CMYK rightly only where Adobe's marker is, on a CPU.
        name = f"{'CMYK ' if num_components == 4 else ''}{kind} of {num_components} colors"
        return Header(name, Decoder.PILLOW, "JPEG", pixel_bytes=pixel_bytes)
    if marker == _PROGRESSIVE and not _has_all_bits(data, place, scans):
        # libjpeg smooths the blocks of such an image, and at the border of a window it does so with other neighbors.
        return Header("progressive JPEG without its last scans", Decoder.PILLOW, "JPEG", pixel_bytes=pixel_bytes)
    if num_exif > 1 or not is_exif_clear:
        # DALI's parts read different ones.
        return Header("JPEG with unusual EXIF", Decoder.PILLOW, "JPEG", pixel_bytes=pixel_bytes)
    return Header("JPEG", Decoder.DALI, pixel_bytes=pixel_bytes) if is_plain_end else cut_off


def _next_marker(data: memoryview, place: int) -> int:
    """Where the next marker's number is; what does not belong before it is skipped, as by libjpeg."""
    if data[place] == 0xFF and data[place + 1] != 0xFF:
        return place + 1
    while b"\xff" not in (piece := bytes(data[place : place + _PIECE])):
        place += len(piece) or _raise_end()
    place += piece.index(b"\xff")
    while not (rest := (piece := bytes(data[place : place + _PIECE])).lstrip(b"\xff")):
        place += len(piece) or _raise_end()
    return place + len(piece) - len(rest)


def _raise_end() -> NoReturn:
    raise IndexError


def _has_many_scans(data: memoryview, frame: int) -> bool:
    """Whether the image is in several scans, as libjpeg finds out: progressive, or one without all components first."""
    if data[frame - 1] in (_PROGRESSIVE, *_OTHER_PROGRESSIVE):
        return True
    place = frame + struct.unpack_from(">H", data, frame)[0]
    for _ in range(MAX_PARTS):
        place = _next_marker(data, place)
        if data[place] == _SCAN:
            return data[place + 3] != data[frame + 7]
        place += 1 + (0 if data[place] in _WITHOUT_LENGTH else struct.unpack_from(">H", data, place + 1)[0])
    raise IndexError


def _scans(data: memoryview, frame: int) -> list[int]:
    """Where the header of each scan starts, after its marker, up to one too many; `frame` is the frame's header."""
    place = frame + struct.unpack_from(">H", data, frame)[0]
    scans: list[int] = []
    for _ in range(MAX_PARTS):
        found = _SEGMENT.search(data, place)
        if found is None or data[found.start() + 1] == _END or found.start() + 4 > len(data):
            return scans
        place = found.end()
        if data[place - 1] == _SCAN:
            scans.append(place)
            if len(scans) > _MAX_SCANS:
                return scans
        place += struct.unpack_from(">H", data, place)[0]
    raise IndexError


def _pixel_bytes(data: memoryview, frame: int, *, keeps_coefficients: bool) -> int:
    """Bytes that libjpeg takes for a pixel; where there are several scans, it keeps all coefficients in memory."""
    num_components = data[frame + 7]
    if not keeps_coefficients:
        return max(num_components, PLAIN_PIXEL_BYTES)
    sampling = [data[frame + 9 + 3 * number] for number in range(num_components)]
    blocks = [(each >> 4) * (each & 15) for each in sampling]
    largest = max((each >> 4 for each in sampling), default=0) * max((each & 15 for each in sampling), default=0)
    return max(-(-_COEFFICIENT_BYTES * sum(blocks) // max(largest, 1)), num_components, PLAIN_PIXEL_BYTES)


def _has_all_bits(data: memoryview, frame: int, scans: list[int]) -> bool:
    """Whether each coefficient of each component of a progressive JPEG comes to its last bit."""
    missing_bits = {data[frame + 8 + 3 * number]: np.full(64, 16) for number in range(data[frame + 7])}
    for scan in scans:
        end = scan + struct.unpack_from(">H", data, scan)[0]
        first, last, bits = data[end - 3], data[end - 2], data[end - 1] & 0x0F
        for component in data[scan + 3 : end - 3 : 2]:
            if component in missing_bits:
                missing_bits[component][first : last + 1] = bits
    return not any(bits.any() for bits in missing_bits.values())
