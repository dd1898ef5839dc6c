"""Unreadable files, and odd but readable ones, made from a photograph."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.rare_files import RARE, UNSUPPORTED

__all__ = ["BROKEN", "ODD", "Broken", "Odd", "cut_in_half", "encoded", "photo_of", "png_of_zeros"]

Photo = NDArray[np.uint8]
BOMB_SIDE = 30_000


@dataclass(frozen=True)
class Broken:
    """An unreadable file."""

    name: str
    reason: str
    """Text that the error must contain."""
    put: Callable[[Path, Photo], object]
    """Writes it."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Odd:
    """An unusual but readable image file."""

    name: str
    encode: Callable[[Photo], bytes]
    shows: Callable[[Photo], Photo] = lambda photo: photo
    """The pixels that it shows."""

    def __str__(self) -> str:
        return self.name


def photo_of(photos: tuple[Photo, Photo]) -> Photo:
    """A piece of the flower, `[150, 190, 3]`."""
    return photos[1][100:250, 200:390]


def encoded(image: Photo | Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cut_in_half(path: Path) -> None:
    """Truncate a file, like an interrupted download."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _jpeg(photo: Photo) -> bytes:
    return encoded(photo, "JPEG", quality=92)


def _jpeg_header(photo: Photo) -> bytes:
    """Everything up to the first byte of pixels."""
    jpeg = _jpeg(photo)
    scan = jpeg.index(b"\xff\xda")
    (length,) = struct.unpack(">H", jpeg[scan + 2 : scan + 4])
    return jpeg[: scan + 2 + length]


def _jpeg_that_claims(photo: Photo, height: int, width: int) -> bytes:
    jpeg = _jpeg(photo)
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def _png_bomb() -> bytes:
    """A valid PNG of a few kilobytes with 2.7 GB of pixels."""
    row = bytes(1 + -(-BOMB_SIDE // 8))
    compressor = zlib.compressobj(9)
    pixels = b"".join([*(compressor.compress(row) for _ in range(BOMB_SIDE)), compressor.flush()])
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _png_that_claims(photo: Photo, height: int, width: int) -> bytes:
    png = encoded(photo, "PNG")
    return png[:8] + _chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def png_of_zeros(height: int, width: int, *, bits: int = 8, channels: int = 3) -> bytes:
    """A black RGB or gray PNG, which is compressed to almost nothing; `height` is a multiple of 50."""
    compressor, rows, checksum = zlib.compressobj(9), bytes((1 + width * channels * bits // 8) * 50), 1
    first, each = (compressor.compress(rows) + compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    for _ in range(height // 50):
        checksum = zlib.adler32(rows, checksum)
    pixels = first + each * (height // 50 - 1) + compressor.flush()[:-4] + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _gray(photo: Photo) -> Photo:
    return np.asarray(Image.fromarray(photo).convert("L"))


def _converted(mode: str) -> Callable[[Photo], Image.Image]:
    return lambda photo: Image.fromarray(photo).convert(mode)


def _file(encode: Callable[[Photo], bytes]) -> Callable[[Path, Photo], object]:
    return lambda path, photo: path.write_bytes(encode(photo))


BROKEN = [
    Broken("half.jpg", "cut off", _file(lambda photo: _jpeg(photo)[: len(_jpeg(photo)) // 2])),
    Broken("without_its_last_two_bytes.jpg", "cut off", _file(lambda photo: _jpeg(photo)[:-2])),
    Broken("header_only.jpg", "cut off", _file(_jpeg_header)),
    Broken("half_jpeg.png", "cut off", _file(lambda photo: _jpeg(photo)[: len(_jpeg(photo)) // 2])),
    Broken("half_progressive.jpg", "cut off", _file(lambda photo: encoded(photo, "JPEG", progressive=True)[:2000])),
    Broken("half.png", "header is broken", _file(lambda photo: encoded(photo, "PNG")[:10_000])),
    Broken("without_its_last_two_bytes.png", "does not decode", _file(lambda photo: encoded(photo, "PNG")[:-2])),
    Broken("half.webp", "does not decode", _file(lambda photo: encoded(photo, "WEBP")[:1000])),
    Broken("half.bmp", "does not decode", _file(lambda photo: encoded(photo, "BMP")[:40_000])),
    Broken("half.tif", "does not decode", _file(lambda photo: encoded(photo, "TIFF")[:40_000])),
    Broken(
        "without_its_last_row.tif", "does not decode", _file(lambda photo: encoded(photo, "TIFF")[: -photo[-1].nbytes])
    ),
    Broken("negative_width.png", "pixels", _file(lambda photo: _png_that_claims(photo, 150, 2**31))),
    Broken("empty.jpg", "empty", _file(lambda photo: b"")),
    Broken("one_byte.jpg", "header is broken", _file(lambda photo: b"\xff")),
    Broken("two_bytes.jpg", "header is broken", _file(lambda photo: b"\xff\xd8")),
    Broken("zeros.jpg", "header is broken", _file(lambda photo: bytes(5000))),
    Broken("text.jpg", "does not know this kind", _file(lambda photo: b"This is no image.\n" * 20)),
    Broken("page.jpg", "does not know this kind", _file(lambda photo: b"<!DOCTYPE html><title>404 Not Found</title>")),
    Broken("no_height.jpg", "190x0", _file(lambda photo: _jpeg_that_claims(photo, 0, 190))),
    Broken("huge_header.jpg", "65500x65500", _file(lambda photo: _jpeg_that_claims(photo, 65500, 65500))),
    Broken("bomb.png", "30000x30000", _file(lambda photo: _png_bomb())),
    Broken("missing.jpg", "does not exist", lambda path, photo: None),
    Broken("directory.jpg", "directory", lambda path, photo: path.mkdir()),
    Broken("pipe.jpg", "this is a pipe", lambda path, photo: os.mkfifo(path)),
    Broken("link_to_a_device.jpg", "this is a device", lambda path, photo: path.symlink_to("/dev/zero")),
    *(Broken(name, reason, _file(encode)) for name, (encode, reason) in UNSUPPORTED.items()),
]

ODD = [
    Odd("gray.jpg", lambda photo: encoded(_gray(photo), "JPEG", quality=95), _gray),
    Odd("cmyk.jpg", lambda photo: encoded(_converted("CMYK")(photo), "JPEG", quality=95)),
    Odd("palette.png", lambda photo: encoded(_converted("P")(photo), "PNG")),
    Odd("transparent.png", lambda photo: encoded(_converted("RGBA")(photo), "PNG")),
    Odd("gray_transparent.png", lambda photo: encoded(_converted("LA")(photo), "PNG"), _gray),
    Odd("sixteen_bits.png", lambda photo: encoded(Image.fromarray(_gray(photo).astype(np.uint16) * 257), "PNG"), _gray),
    Odd("progressive.jpg", lambda photo: encoded(photo, "JPEG", quality=95, progressive=True)),
    Odd("photo.webp", lambda photo: encoded(photo, "WEBP", quality=95)),
    Odd("photo.bmp", lambda photo: encoded(photo, "BMP")),
    Odd("photo.tif", lambda photo: encoded(photo, "TIFF")),
    Odd("photo.ppm", lambda photo: encoded(photo, "PPM")),
    Odd("junk_after_its_end.jpg", lambda photo: encoded(photo, "JPEG", quality=95) + b"\0" * 37),
    Odd("really_a_png.jpg", lambda photo: encoded(photo, "PNG")),
    Odd("really_a_jpeg.png", lambda photo: encoded(photo, "JPEG", quality=95)),
    Odd("one_pixel.png", lambda photo: encoded(photo[:1, :1], "PNG"), lambda photo: photo[:1, :1]),
    Odd("one_row.png", lambda photo: encoded(photo[:1], "PNG"), lambda photo: photo[:1]),
    *(Odd(name, *functions) for name, functions in RARE.items()),
]
