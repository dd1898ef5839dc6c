"""The header of a JPEG file, and whether all scans of a progressive one are there."""

import struct

import numpy as np

from kd_pipeline.data.headers.base import Decoder, Header
from kd_pipeline.data.headers.exif import is_clear

__all__ = ["read_jpeg"]

_END, _SCAN, _PROGRESSIVE, _APP1 = 0xD9, 0xDA, 0xC2, 0xE1
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
_PLAIN_JPEG, _CUT_OFF = Header("JPEG", Decoder.DALI), Header("JPEG", Decoder.DALI_CHECKED)
"""With its end, and without it or with something after it, as after damage."""


def read_jpeg(data: memoryview) -> Header:
    """The header of a JPEG; a struct.error, IndexError or OverflowError if it is broken."""
    place, num_exif, is_exif_clear = 2, 0, True
    while True:
        while data[place] != 0xFF:  # what does not belong there is skipped, as by libjpeg
            place += 1
        while data[place] == 0xFF:
            place += 1
        marker = data[place]
        place += 1
        if marker in _FRAMES:
            break
        if marker == _APP1 and data[place + 2 : place + 8] == _EXIF:
            num_exif += 1
            is_exif_clear = is_clear(data[place + 8 : place + struct.unpack_from(">H", data, place)[0]])
        if marker not in _WITHOUT_LENGTH:
            place += struct.unpack_from(">H", data, place)[0]
    precision, num_components = data[place + 2], data[place + 7]
    kind = _FRAMES[marker]
    is_plain_end = bytes(data[-2:]) == _END_MARK
    if not is_plain_end and _END_MARK not in bytes(data[place:]):
        return _CUT_OFF
    if marker > _PROGRESSIVE or precision != 8:
        return Header(f"{kind} of {precision} bits", Decoder.PILLOW, "JPEG")
    if num_components not in (1, 3):
        # DALI decodes CMYK rightly only where Adobe's marker is, on a CPU.
        return Header(
            f"{'CMYK ' if num_components == 4 else ''}{kind} of {num_components} colors", Decoder.PILLOW, "JPEG"
        )
    if marker == _PROGRESSIVE and not _has_all_scans(data, place):
        # libjpeg smooths the blocks of such an image, and at the border of a window it does so with other neighbors.
        return Header("progressive JPEG without its last scans", Decoder.PILLOW, "JPEG")
    if num_exif > 1 or not is_exif_clear:
        return Header("JPEG with unusual EXIF", Decoder.PILLOW, "JPEG")  # of which DALI's parts read different ones
    return _PLAIN_JPEG if is_plain_end else _CUT_OFF


def _has_all_scans(data: memoryview, frame: int) -> bool:
    """Whether each coefficient of each component of a progressive JPEG comes to its last bit; `frame` is its header."""
    array = np.frombuffer(data, np.uint8)
    marks = np.flatnonzero(array[:-1] == 0xFF)
    following = array[marks + 1]
    marks = marks[(following > 1) & (following < 0xFF) & ((following < 0xD0) | (following > 0xD7))]
    missing_bits = {data[frame + 8 + 3 * number]: np.full(64, 16) for number in range(data[frame + 7])}
    place = frame + struct.unpack_from(">H", data, frame)[0]
    while True:
        number = int(np.searchsorted(marks, place))
        if number == len(marks):
            break
        mark = int(marks[number])
        if data[mark + 1] == _END or mark + 4 > len(data):
            break
        place = mark + 2 + struct.unpack_from(">H", data, mark + 2)[0]
        if data[mark + 1] == _SCAN:
            first, last, bits = data[place - 3], data[place - 2], data[place - 1] & 0x0F
            for component in data[mark + 5 : place - 3 : 2]:
                if component in missing_bits:
                    missing_bits[component][first : last + 1] = bits
    return not any(bits.any() for bits in missing_bits.values())
