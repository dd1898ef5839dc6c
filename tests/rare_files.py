"""Image files of rare kinds, made byte by byte where Pillow cannot write them."""

import io
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["RARE", "UNSUPPORTED", "bmp", "deep_jpeg2000", "pnm", "tiff", "without_last_scans"]

Photo = NDArray[np.uint8]
_GRAY, _RGB, _WHITE_IS_ZERO, _CMYK, _LAB = 1, 2, 0, 5, 8


def tiff(
    pixels: NDArray[Any],
    photometric: int,
    *,
    bits: int | None = None,
    samples: int = 1,
    kind: int = 1,
    extra: Sequence[int] = (),
    compression: int = 1,
    order: str = "<",
    is_big: bool = False,
    size: tuple[int, int] | None = None,
) -> bytes:
    """A TIFF of one strip; `kind` is 1 for unsigned, 2 for signed, and 3 for floating-point numbers."""
    height, width = size or pixels.shape[:2]
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    head = 16 if is_big else 8
    values = {
        256: (width,),
        257: (height,),
        258: (bits or pixels.dtype.itemsize * 8,) * samples,
        259: (compression,),
        262: (photometric,),
        273: (head,),
        277: (samples,),
        278: (height,),
        279: (len(body),),
        338: tuple(extra),
        339: (kind,) * samples,
    }
    pointer, count, room = ("Q", "Q", 8) if is_big else ("I", "H", 4)
    entries = {tag: numbers for tag, numbers in values.items() if numbers}
    body += bytes(-len(body) % 2)
    place = head + len(body)
    after = place + struct.calcsize(f"={count}") + len(entries) * (12 + 2 * (room - 4)) + room
    if is_big:
        after += 0
    directory, outside = struct.pack(f"{order}{count}", len(entries)), b""
    for tag, numbers in sorted(entries.items()):
        code, letter = (4, "I") if tag in (256, 257, 273, 278, 279) else (3, "H")
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > room:
            packed, outside = struct.pack(f"{order}{pointer}", after + len(outside)), outside + packed
        directory += struct.pack(f"{order}HH{pointer}", tag, code, len(numbers)) + packed.ljust(room, b"\0")
    mark = {"<": b"II", ">": b"MM"}[order]
    magic = struct.pack(f"{order}HHHQ", 43, 8, 0, place) if is_big else struct.pack(f"{order}HI", 42, place)
    return mark + magic + body + directory + bytes(room) + outside


def pnm(kind: int, pixels: NDArray[Any], max_level: int | None, *, comment: str = "") -> bytes:
    """A PNM of the kind P1 to P6."""
    height, width = pixels.shape[:2]
    head = f"P{kind}\n{comment}{width} {height}\n" + ("" if max_level is None else f"{max_level}\n")
    if kind < 4:
        return head.encode() + " ".join(map(str, pixels.ravel().tolist())).encode() + b"\n"
    if kind == 4:
        return head.encode() + np.packbits(pixels, axis=1).tobytes()
    return head.encode() + pixels.astype(np.uint8 if (max_level or 0) < 256 else ">u2").tobytes()


def bmp(
    body: bytes,
    size: tuple[int, int],
    bits: int,
    *,
    compression: int = 0,
    masks: Sequence[int] = (),
    palette: bytes = b"",
) -> bytes:
    """A BMP of `size` (height, width), with a negative height if its first row is the top."""
    height, width = size
    start = 54 + 4 * len(masks) + len(palette)
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 2835, 2835, len(palette) // 4, 0
    )
    content = header + struct.pack(f"<{len(masks)}I", *masks) + palette + body
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + content


def deep_jpeg2000(levels: NDArray[np.uint16], bits: int) -> bytes:
    """A lossless grayscale JPEG 2000 of `bits` bits, written as one of 16 bits with the same coefficients."""
    shifted = levels + np.uint16(2**15 - 2 ** (bits - 1))
    stream = io.BytesIO()
    Image.fromarray(shifted).save(stream, "JPEG2000", num_resolutions=3)
    data = bytearray(stream.getvalue())
    data[data.index(b"ihdr") + 14] = bits - 1
    data[data.index(b"\xff\x4f\xff\x51") + 42] = bits - 1
    return bytes(data)


def without_last_scans(photo: Photo, num_scans: int) -> bytes:
    """The first scans of a progressive JPEG, with an end after them."""
    data = _encoded(Image.fromarray(photo), "JPEG", quality=95, progressive=True)
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    table = data.rindex(b"\xff\xc4", 0, scans[num_scans])
    return data[: table if table > scans[num_scans - 1] else scans[num_scans]] + b"\xff\xd9"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _gray(photo: Photo) -> Photo:
    return np.asarray(Image.fromarray(photo).convert("L"))


def _bright(photo: Photo) -> NDArray[np.bool_]:
    return _gray(photo) > 127


def _black_and_white(photo: Photo) -> Photo:
    return np.where(_bright(photo), 255, 0).astype(np.uint8)


def _alpha(photo: Photo) -> Photo:
    """From 50 to 255, from left to right."""
    height, width, _ = photo.shape
    return np.tile(np.linspace(50, 255, width).astype(np.uint8), (height, 1))


def _multiplied(pixels: Photo, alpha: Photo) -> Photo:
    alpha = alpha.reshape(*alpha.shape, *[1] * (pixels.ndim - 2))
    return np.rint(pixels * (alpha / 255)).astype(np.uint8)


def _cmyk(photo: Photo, *, marker: bool) -> bytes:
    """A CMYK JPEG with inverted levels, with or without Adobe's marker that says so."""
    data = _encoded(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=95)
    start = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[start + 2 : start + 4])
    return data if marker else data[:start] + data[start + 2 + length :]


def _scaled(pixels: Photo, max_level: int) -> NDArray[np.uint16]:
    return np.rint(pixels / 255 * max_level).astype(np.uint16)


def _odd_webp(photo: Photo) -> bytes:
    """A lossless WebP with EXIF after a chunk of odd length."""
    exif = Image.Exif()
    exif[0x0112] = 1
    for width in range(photo.shape[1], 0, -1):
        shown = photo.copy()
        shown[:, width:] = shown[:, width - 1 : width]
        data = _encoded(Image.fromarray(shown), "WEBP", lossless=True, exif=exif)
        if struct.unpack("<I", data[34:38])[0] % 2:
            return data
    raise AssertionError("no chunk of odd length")


def _animation(photo: Photo, kind: str) -> bytes:
    others = [Image.fromarray(photo[::-1]), Image.fromarray(255 - photo)]
    return _encoded(Image.fromarray(photo), kind, save_all=True, append_images=others, lossless=True)


def _pages(photo: Photo) -> bytes:
    return _encoded(Image.fromarray(photo), "TIFF", save_all=True, append_images=[Image.fromarray(photo[::-1])])


def _levels_of_five_bits(photo: Photo) -> Photo:
    return ((photo >> 3).astype(np.uint16) * 255 // 31).astype(np.uint8)


def _bmp_of_15_bits(photo: Photo) -> bytes:
    five = photo[::-1].astype(np.uint16) >> 3
    rows = five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]
    return bmp(_rows_of_four_bytes(rows.astype("<u2")), photo.shape[:2], 16)


def _bmp_run_length(photo: Photo) -> bytes:
    gray = _gray(photo)[::-1]
    rows = (b"".join(bytes([1, level]) for level in row.tolist()) + b"\0\0" for row in gray)
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    return bmp(b"".join(rows) + b"\0\1", photo.shape[:2], 8, compression=1, palette=palette)


def _bmp_top_down(photo: Photo) -> bytes:
    height, width, _ = photo.shape
    return bmp(_rows_of_four_bytes(photo[..., ::-1]), (-height, width), 24)


def _bmp_os2(photo: Photo) -> bytes:
    height, width, _ = photo.shape
    body = _rows_of_four_bytes(photo[::-1, :, ::-1])
    return (
        b"BM" + struct.pack("<IHHI", 26 + len(body), 0, 0, 26) + struct.pack("<IHHHH", 12, width, height, 1, 24) + body
    )


def _rows_of_four_bytes(pixels: NDArray[Any]) -> bytes:
    rows = pixels.reshape(len(pixels), -1)
    padding = np.zeros((len(rows), -(rows[:1].nbytes) % 4), np.uint8)
    return np.concatenate([np.ascontiguousarray(rows).view(np.uint8), padding], axis=1).tobytes()


def _with_precision(photo: Photo, bits: int) -> bytes:
    data = bytearray(_encoded(Image.fromarray(photo), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = bits
    return bytes(data)


def _with_frame(photo: Photo, marker: int) -> bytes:
    return _encoded(Image.fromarray(photo), "JPEG").replace(b"\xff\xc0", bytes([0xFF, marker]), 1)


def _without_tiles(photo: Photo) -> bytes:
    data = bytearray(_encoded(Image.fromarray(photo), "JPEG2000"))
    siz = data.index(b"\xff\x4f\xff\x51")
    data[siz + 24 : siz + 28] = bytes(4)
    return bytes(data)


def _lab(photo: Photo) -> bytes:
    return tiff(photo, _LAB, samples=3)


def _jpeg2000_in_tiff(photo: Photo) -> bytes:
    inside = np.frombuffer(_encoded(Image.fromarray(photo), "JPEG2000", no_jp2=True), np.uint8)
    return tiff(inside, _RGB, bits=8, samples=3, compression=34712, size=photo.shape[:2])


_Encode = Callable[[Photo], bytes]

RARE: dict[str, tuple[_Encode, Callable[[Photo], Photo]]] = {
    "cmyk_without_adobe.jpg": (lambda photo: _cmyk(photo, marker=False), lambda photo: photo),
    "cmyk_of_adobe.jpg": (lambda photo: _cmyk(photo, marker=True), lambda photo: photo),
    "odd_chunk.webp": (_odd_webp, lambda photo: np.asarray(Image.open(io.BytesIO(_odd_webp(photo))))),
    "animated.webp": (lambda photo: _animation(photo, "WEBP"), lambda photo: photo),
    "animated.png": (lambda photo: _animation(photo, "PNG"), lambda photo: photo),
    "max_100.pgm": (lambda photo: pnm(5, _scaled(_gray(photo), 100), 100), _gray),
    "max_1.pgm": (lambda photo: pnm(5, _bright(photo).astype(int), 1), _black_and_white),
    "max_256.pgm": (lambda photo: pnm(5, _scaled(_gray(photo), 256), 256), _gray),
    "max_4095.pgm": (lambda photo: pnm(5, _scaled(_gray(photo), 4095), 4095), _gray),
    "max_65535.pgm": (lambda photo: pnm(5, _scaled(_gray(photo), 65535), 65535), _gray),
    "max_100.ppm": (lambda photo: pnm(6, _scaled(photo, 100), 100), lambda photo: photo),
    "max_1023.ppm": (lambda photo: pnm(6, _scaled(photo, 1023), 1023), lambda photo: photo),
    "text_bits.pbm": (lambda photo: pnm(1, 1 - _bright(photo).astype(int), None), _black_and_white),
    "bits.pbm": (lambda photo: pnm(4, ~_bright(photo), None), _black_and_white),
    "text.pgm": (lambda photo: pnm(2, _scaled(_gray(photo), 200), 200), _gray),
    "text.ppm": (lambda photo: pnm(3, photo, 255), lambda photo: photo),
    "comments.ppm": (lambda photo: pnm(6, photo, 255, comment="# 7 5 100\n#\n"), lambda photo: photo),
    "twelve_bits.jp2": (lambda photo: deep_jpeg2000(_scaled(_gray(photo), 4095), 12), _gray),
    "ten_bits.jp2": (lambda photo: deep_jpeg2000(_scaled(_gray(photo), 1023), 10), _gray),
    "sixteen_bits.jp2": (lambda photo: deep_jpeg2000(_scaled(_gray(photo), 65535), 16), _gray),
    "gray_transparent.jp2": (lambda photo: _encoded(Image.fromarray(photo).convert("LA"), "JPEG2000"), _gray),
    "ycc.jp2": (lambda photo: _encoded(Image.fromarray(photo).convert("YCbCr"), "JPEG2000"), lambda photo: photo),
    "codestream.j2k": (lambda photo: _encoded(Image.fromarray(photo), "JPEG2000", no_jp2=True), lambda photo: photo),
    "white_is_zero.tif": (lambda photo: tiff(255 - _gray(photo), _WHITE_IS_ZERO), _gray),
    "sixteen_bits_white_is_zero.tif": (lambda photo: tiff(65535 - _scaled(_gray(photo), 65535), _WHITE_IS_ZERO), _gray),
    "sixteen_bits.tif": (lambda photo: tiff(_scaled(_gray(photo), 65535), _GRAY, order=">"), _gray),
    "sixteen_bits_color.tif": (lambda photo: tiff(_scaled(photo, 65535), _RGB, samples=3), lambda photo: photo),
    "big_endian.tif": (lambda photo: tiff(photo, _RGB, samples=3, order=">"), lambda photo: photo),
    "big.tif": (lambda photo: tiff(photo, _RGB, samples=3, is_big=True), lambda photo: photo),
    "one_bit.tif": (
        lambda photo: tiff(np.packbits(_bright(photo), axis=1), _GRAY, bits=1, size=photo.shape[:2]),
        _black_and_white,
    ),
    "gray_and_extra.tif": (
        lambda photo: tiff(np.dstack([_gray(photo), _alpha(photo)]), _GRAY, samples=2, extra=[0]),
        _gray,
    ),
    "gray_and_transparency.tif": (
        lambda photo: tiff(np.dstack([_gray(photo), _alpha(photo)]), _GRAY, samples=2, extra=[2]),
        _gray,
    ),
    "gray_premultiplied.tif": (
        lambda photo: tiff(
            np.dstack([_multiplied(_gray(photo), _alpha(photo)), _alpha(photo)]), _GRAY, samples=2, extra=[1]
        ),
        _gray,
    ),
    "premultiplied.tif": (
        lambda photo: tiff(np.dstack([_multiplied(photo, _alpha(photo)), _alpha(photo)]), _RGB, samples=4, extra=[1]),
        lambda photo: photo,
    ),
    "transparent.tif": (
        lambda photo: tiff(np.dstack([photo, _alpha(photo)]), _RGB, samples=4, extra=[2]),
        lambda photo: photo,
    ),
    "cmyk.tif": (lambda photo: _encoded(Image.fromarray(photo).convert("CMYK"), "TIFF"), lambda photo: photo),
    "pages.tif": (_pages, lambda photo: photo),
    "fax.tif": (
        lambda photo: _encoded(Image.fromarray(_black_and_white(photo)).convert("1"), "TIFF", compression="group4"),
        _black_and_white,
    ),
    "lzma.tif": (lambda photo: _encoded(Image.fromarray(photo), "TIFF", compression="lzma"), lambda photo: photo),
    "fifteen_bits.bmp": (_bmp_of_15_bits, _levels_of_five_bits),
    "run_length.bmp": (_bmp_run_length, _gray),
    "top_down.bmp": (_bmp_top_down, lambda photo: photo),
    "os2.bmp": (_bmp_os2, lambda photo: photo),
}
"""How each is made, and what it shows."""

UNSUPPORTED: dict[str, tuple[_Encode, str]] = {
    "floats.tif": (lambda photo: tiff(_gray(photo).astype(np.float32), _GRAY, kind=3), "32-bit floating-point"),
    "halves.tif": (lambda photo: tiff((photo / 255).astype(np.float16), _RGB, samples=3, kind=3), "16-bit floating"),
    "doubles.tif": (lambda photo: tiff(_gray(photo) / 255, _GRAY, kind=3), "64-bit floating-point"),
    "signed.tif": (lambda photo: tiff(_gray(photo).astype(np.int16), _GRAY, kind=2), "16-bit signed"),
    "thirty_two_bits.tif": (lambda photo: tiff(_gray(photo).astype(np.uint32), _GRAY), "32-bit integers"),
    "lab.tif": (_lab, "CIELab"),
    "jpeg2000.tif": (_jpeg2000_in_tiff, "TIFF with JPEG 2000 inside"),
    "five_samples.tif": (lambda photo: tiff(np.dstack([photo, photo[..., :2]]), _GRAY, samples=5), "5 x 8 bits, gray"),
    "twelve_bits.jpg": (lambda photo: _with_precision(photo, 12), "JPEG of 12 bits"),
    "many_bits.jpg": (lambda photo: _with_precision(photo, 77), "JPEG of 77 bits"),
    "jpeg_ls.jpg": (lambda photo: _with_frame(photo, 0xF7), "JPEG-LS"),
    "hierarchical.jpg": (lambda photo: _with_frame(photo, 0xC5), "hierarchical JPEG"),
    "no_tiles.jp2": (_without_tiles, "tiles of 0x"),
    "really_a_gif.jpg": (lambda photo: _encoded(Image.fromarray(photo), "GIF"), "this is a GIF"),
    "half_cmyk.jpg": (lambda photo: _cmyk(photo, marker=True)[:3000], "cut off"),
    "half.pgm": (lambda photo: pnm(5, _scaled(_gray(photo), 100), 100)[:5000], "does not decode"),
    "half_fifteen_bits.bmp": (lambda photo: _bmp_of_15_bits(photo)[:5000], "does not decode"),
    "half_animation.webp": (lambda photo: _animation(photo, "WEBP")[:5000], "WebP"),
}
"""How each is made, and part of the reason why it is refused."""
