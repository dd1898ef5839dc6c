"""The header of a JPEG 2000 file: the boxes of a .jp2 and the sizes at the start of its codestream."""

import struct
from collections.abc import Iterator

from kd_pipeline.data.headers.base import CONVERT, MAX_PARTS, Decoder, Header, UnreadableFileError

__all__ = ["read_jpeg2000"]

_GRAY, _SRGB = 17, 16
_PREMULTIPLIED = 2
_HIGH_THROUGHPUT = 0x4000
_MAX_TILES = 65535
_COMPONENT_BYTES = 4
"""OpenJPEG's levels, of any depth."""


def read_jpeg2000(data: memoryview) -> Header:
    """The header of a JPEG 2000 file; a struct.error, IndexError or OverflowError if it is broken.

    Raises:
        UnreadableFileError: a header that crashes DALI, or transparency that is already in the colors.
    """
    stream, is_plain = 0, True
    if data[0] == 0:
        boxes = dict(_boxes(data, 0, len(data)))
        stream, _ = boxes.get(b"jp2c", (len(data), 0))
        inner = dict(_boxes(data, *boxes.get(b"jp2h", (0, 0))))
        is_plain = _is_plain(data, inner)
    capabilities, width, height, left, top = struct.unpack_from(">HIIII", data, stream + 6)
    tile_width, tile_height = struct.unpack_from(">II", data, stream + 24)
    (num_components,) = struct.unpack_from(">H", data, stream + 40)
    has_tiles = tile_width and tile_height and -(-width // tile_width) * -(-height // tile_height) <= _MAX_TILES
    if not (has_tiles and num_components and width > left and height > top):
        raise UnreadableFileError(
            f"its header is broken: JPEG 2000 of {width}x{height} pixels in tiles of {tile_width}x{tile_height}"
        )
    numbers = struct.unpack_from(f"{3 * num_components}B", data, stream + 42)
    components = set(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    depth = max(depth for depth, _, _ in components)
    # The first bit is set for signed levels, the others are the number of bits less one.
    if (
        is_plain
        and components == {(7, 1, 1)}  # on damaged files of 16 bits, DALI 2.4 may crash
        and num_components in (1, 3, 4)
        and not capabilities & _HIGH_THROUGHPUT
        and not left
        and not top
    ):
        return Header("JPEG 2000", Decoder.DALI_CHECKED, pixel_bytes=_COMPONENT_BYTES * num_components)
    kind = f"{'signed ' if depth & 0x80 else ''}JPEG 2000 of {num_components} x {(depth & 0x7F) + 1} bits"
    return Header(kind, Decoder.PILLOW, "JPEG2000", pixel_bytes=_COMPONENT_BYTES * num_components)


def _boxes(data: memoryview, place: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The kind of each box from `place` on, and where its content starts and ends."""
    for _ in range(MAX_PARTS):
        if place + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", data, place)
        start = place + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        last = end if length == 0 else min(place + length, end)
        if last < start:
            return
        yield kind, (start, last)
        place = last
    raise IndexError


def _is_plain(data: memoryview, boxes: dict[bytes, tuple[int, int]]) -> bool:
    """Whether the components of a file with these boxes in its header are gray or red, green and blue.

    Raises:
        UnreadableFileError: its colors are multiplied with its transparency.
    """
    if b"cdef" in boxes:
        start, end = boxes[b"cdef"]
        for place in range(start + 2, end - 5, 6):
            if struct.unpack_from(">HH", data, place)[1] == _PREMULTIPLIED:
                raise UnreadableFileError(f"JPEG 2000 whose colors are multiplied with its transparency; {CONVERT}")
    if b"pclr" in boxes:
        return False
    if b"colr" not in boxes:
        return True
    start, _ = boxes[b"colr"]
    return data[start] != 1 or struct.unpack_from(">I", data, start + 3)[0] in (_GRAY, _SRGB)
