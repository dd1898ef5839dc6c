"""Headers of image files: which decoder they need, and what is refused."""

import contextlib
import struct

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.data.headers import Decoder, UnreadableFileError, read_header
from kd_pipeline.data.headers.base import MAX_PARTS
from kd_pipeline.data.pillow import decode_with_pillow
from tests.corpus import ODD, Odd, encoded, photo_of, png_of_zeros
from tests.rare_files import RARE, UNSUPPORTED, deep_jpeg2000, tiff, without_last_scans


@pytest.fixture(scope="module")
def photo(photos):
    return photo_of(photos)


def _frame(marker: int) -> bytes:
    """The header of a JPEG's frame of 16 x 16 pixels and three colors."""
    return b"\xff" + bytes([marker]) + b"\0\x11\x08\0\x10\0\x10\3\1\x22\0\2\x11\0\3\x11\0"


def decoder_of(data: bytes) -> Decoder:
    return read_header(memoryview(data)).decoder


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_usual_files_are_left_to_dali(photo, kind):
    checked = Decoder.DALI_CHECKED if kind in ("BMP", "TIFF", "JPEG2000") else Decoder.DALI
    assert decoder_of(encoded(photo, kind)) is checked


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd.name in RARE], ids=str)
def test_pillow_gives_rare_pixels(odd: Odd, photo):
    data = odd.encode(photo)
    header = read_header(memoryview(data))
    if header.decoder is Decoder.PILLOW:
        enough = -(-photo[..., 0].size * header.pixel_bytes // 3)
        pixels = decode_with_pillow(data, header, orientation="upright", max_pixels=enough)
        shown = np.asarray(Image.fromarray(odd.shows(photo)).convert("RGB")).astype(float)
        assert np.abs(pixels - shown).mean() < 2
        with pytest.raises(UnreadableFileError, match=rf"190x150 pixels.* more than max_pixels={enough - 1}$"):
            decode_with_pillow(data, header, orientation="upright", max_pixels=enough - 1)


def test_twelve_bits_are_scaled():
    """In a TIFF and a JPEG 2000; Pillow's `convert` clips at 255."""
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    packed = np.empty((64, 32, 3), np.uint8)
    even, odd = levels[:, ::2], levels[:, 1::2]
    packed[..., 0], packed[..., 1], packed[..., 2] = even >> 4, (even & 15) << 4 | odd >> 8, odd & 255
    for data in (deep_jpeg2000(levels, 12), tiff(packed, 1, bits=12, size=(64, 64))):
        pixels = decode_with_pillow(data, read_header(memoryview(data)), orientation="upright", max_pixels=10**4)
        np.testing.assert_allclose(pixels[..., 0], levels / 4095 * 255, atol=1)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_reason_is_one_line_that_says_what_to_do(photo, name):
    encode, reason = UNSUPPORTED[name]
    data = encode(photo)
    try:
        header = read_header(memoryview(data))
        if header.decoder is not Decoder.PILLOW:
            assert reason == "cut off"  # DALI's business
            return
        decode_with_pillow(data, header, orientation="upright", max_pixels=10**6)
    except UnreadableFileError as error:
        assert reason in str(error) and "\n" not in str(error)
        assert "convert it" in str(error) or "does not decode" in str(error) or "broken" in str(error)
    else:
        pytest.fail("it was read")


def test_progressive_jpeg_needs_all_scans(photo):
    assert decoder_of(encoded(photo, "JPEG", progressive=True)) is Decoder.DALI
    assert decoder_of(encoded(photo, "JPEG", progressive=True) + b"junk") is Decoder.DALI_CHECKED
    assert decoder_of(encoded(photo[..., 0], "JPEG", progressive=True)) is Decoder.DALI
    for num_scans in range(1, 10):
        assert decoder_of(without_last_scans(photo, num_scans)) is Decoder.PILLOW


def test_thumbnail_in_a_jpeg_is_no_header(photo):
    thumbnail = encoded(Image.fromarray(photo[:40, :40]).convert("CMYK"), "JPEG")
    segment = b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    jpeg = encoded(photo, "JPEG")
    assert decoder_of(jpeg[:2] + segment + jpeg[2:]) is Decoder.DALI


@pytest.mark.parametrize("name", RARE)
def test_any_part_of_a_header_is_read_or_refused(photo, name):
    """In one kind of error, whatever is missing or wrong."""
    encode, _ = RARE[name]
    data = encode(photo)
    rng = np.random.default_rng(0)
    for _ in range(300):
        spoiled = np.frombuffer(data, np.uint8)[: rng.integers(0, 300) if rng.random() < 0.3 else None].copy()
        for place in rng.integers(0, min(len(spoiled), 200), size=3) if len(spoiled) else ():
            spoiled[place] = rng.choice([0, 1, 255, rng.integers(256)])
        try:
            read_header(spoiled.data)
        except UnreadableFileError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("kind", "options", "pixel_bytes"),
    [
        ("JPEG", {}, 3),
        ("JPEG", {"progressive": True, "subsampling": 0}, 6),
        ("JPEG", {"progressive": True, "subsampling": 2}, 3),
        ("PNG", {}, 3),
        ("WEBP", {}, 3),
        ("BMP", {}, 3),
        ("TIFF", {}, 3),
        ("JPEG2000", {}, 12),
    ],
)
def test_memory_of_a_pixel_is_known(photo, kind, options, pixel_bytes):
    assert read_header(memoryview(encoded(photo, kind, **options))).pixel_bytes == pixel_bytes


@pytest.mark.parametrize(
    ("name", "pixel_bytes"),
    [
        ("cmyk_without_adobe.jpg", 4),
        ("animated.webp", 8),
        ("max_65535.pgm", 4),
        ("twelve_bits.jp2", 4),
        ("sixteen_bits_color.tif", 6),
        ("sixteen_bits.tif", 3),
        ("transparent.tif", 4),
    ],
)
def test_memory_of_a_rare_pixel_is_known(photo, name, pixel_bytes):
    encode, _ = RARE[name]
    assert read_header(memoryview(encode(photo))).pixel_bytes == pixel_bytes
    assert read_header(memoryview(png_of_zeros(50, 50, bits=16))).pixel_bytes == 6


def test_jpeg_of_endless_scans_is_refused(photo):
    """A scan of a few bytes costs libjpeg a pass over the whole image."""
    jpeg = encoded(photo, "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    assert decoder_of(jpeg[:-2] + jpeg[last:-2] * 50 + jpeg[-2:]) is Decoder.DALI
    with pytest.raises(UnreadableFileError, match="progressive JPEG of more than 100 scans"):
        decoder_of(jpeg[:-2] + jpeg[last:-2] * 100 + jpeg[-2:])


def test_deep_jpeg2000_is_kept_from_dali(photo):
    """It crashes on some damaged ones."""
    assert decoder_of(RARE["sixteen_bits.jp2"][0](photo)) is Decoder.PILLOW


def test_png_chunk_that_is_longer_than_the_file_is_refused(photo):
    """DALI takes memory for what it claims."""
    png = encoded(photo, "PNG")
    place = png.index(b"IDAT") - 4
    with pytest.raises(UnreadableFileError, match="header is broken"):
        decoder_of(png[:place] + struct.pack(">I", 2**31) + png[place + 4 :])


@pytest.mark.parametrize("frame", [b"", _frame(0xC0), _frame(0xC2)], ids=["before", "baseline", "progressive"])
def test_walk_through_a_jpeg_is_bounded(frame):
    for filler in (b"\0", b"\xff", b"\xff\0"):
        with contextlib.suppress(UnreadableFileError):
            read_header(memoryview(b"\xff\xd8" + frame + filler * MAX_PARTS))
    with pytest.raises(UnreadableFileError, match="header is broken"):
        read_header(memoryview(b"\xff\xd8" + frame + b"\xff\xfe\0\2" * MAX_PARTS + _frame(0xC0) + b"\xff\xd9"))


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\0\0\0\0", b"\0\0\0\0tEXt\0\0\0\0"),
        (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x08" + bytes(9), b"XMP \0\0\0\0"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x08free"),
    ],
    ids=["PNG", "WebP", "JPEG 2000"],
)
def test_walk_through_the_parts_of_a_file_is_bounded(start, part):
    with pytest.raises(UnreadableFileError, match="header is broken"):
        read_header(memoryview(start + part * (MAX_PARTS + 1)))
