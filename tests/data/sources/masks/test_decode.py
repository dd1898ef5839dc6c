"""Values come out of mask files as they were saved, and files that are none are refused before they take memory."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.masks.decode import decode_mask
from tests.mask_files import png_of

VALUES = np.random.default_rng(0).integers(0, 256, size=(13, 17), dtype=np.uint8)
MAX_PIXELS = 10_000


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    return decode_mask(np.frombuffer(content, np.uint8), max_pixels=max_pixels)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def gray_png(values: np.ndarray, bits: int) -> bytes:
    """A gray PNG of less than 8 bits, which Pillow does not write."""
    height, width = values.shape
    per_byte = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -width % per_byte))).reshape(height, -1, per_byte)
    rows = (padded << np.arange(8 - bits, -1, -bits)).sum(axis=2).astype(np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )


def reason_of(content: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(UnreadableFileError) as info:
        decode(content, max_pixels)
    return str(info.value)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_png_keeps_its_values(mode):
    found = decode(png_of(VALUES, mode))
    assert found.dtype == np.uint8 and np.array_equal(found, VALUES)


def test_colors_of_a_palette_do_not_count():
    few = VALUES % 5
    first, second = (Image.fromarray(few).convert("P") for _ in range(2))
    second.putpalette([200, 100, 7] * 256)
    for image in (first, second):
        image.putdata(few.ravel().tolist())
        file = io.BytesIO()
        image.save(file, "PNG", bits=4)  # Pillow packs the indices
        assert np.array_equal(decode(file.getvalue()), few)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_of_few_bits_is_not_stretched(bits):
    few = VALUES >> (8 - bits)
    assert np.array_equal(decode(gray_png(few, bits)), few)


def test_one_bit_is_zero_and_one():
    found = decode(png_of(VALUES > 99, "1"))
    assert found.dtype == np.uint8 and np.array_equal(found, VALUES > 99)


def test_sixteen_bits_are_kept():
    deep = VALUES.astype(np.uint16) * 257
    found = decode(png_of(deep, "I;16"))
    assert found.dtype == np.uint16 and np.array_equal(found, deep)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", "i8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_integers_are_read(dtype, order):
    values = np.array(VALUES % 100, dtype=dtype, order=order)
    assert np.array_equal(decode(npy(values)), values)


def test_a_mask_of_colors_says_how_to_save_classes():
    assert "RGB" in (reason := reason_of(png_of(VALUES, "RGB"))) and "Image.fromarray" in reason
    assert "transparency" in reason_of(png_of(VALUES, "RGBA")) and "transparency" in reason_of(png_of(VALUES, "LA"))


def test_other_kinds_are_refused():
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, "JPEG")
    assert "a JPEG, which changes values" in reason_of(file.getvalue())
    assert "b'GIF89a" in reason_of(b"GIF89a\0\0...")
    assert reason_of(b"") == "it is empty"
    assert "broken header" in reason_of(b"\x89PNG\r\n\x1a\n....")


def test_arrays_of_other_shapes_are_refused():
    assert "float64 [13, 17]" in reason_of(npy(VALUES.astype(float)))
    assert "uint8 [13, 17, 3]" in reason_of(npy(np.stack([VALUES] * 3, axis=2)))
    assert "contains Python objects" in reason_of(npy(np.array([[{}]], dtype=object)))


def test_damaged_files_are_refused():
    content = png_of(VALUES)
    assert "header is broken" in reason_of(content[: len(content) // 2])
    spoilt = content[:45] + bytes(8) + content[53:]
    assert "17x13 PNG that does not decode" in reason_of(spoilt)
    assert "cut off" in reason_of(npy(VALUES)[:-1])
    assert "header is damaged" in reason_of(b"\x93NUMPY\x01\x00\xff\xff{")


def test_size_is_limited_before_memory_is_taken():
    huge = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    assert "more than max_pixels=10000" in reason_of(bomb)
    assert "more than max_pixels=100" in reason_of(png_of(VALUES), max_pixels=100)
    large = npy(VALUES).replace(b"(13, 17)", b"(1300000, 1700000)")
    assert "more than max_pixels" in reason_of(large)


def test_a_second_header_is_refused():
    content = gray_png(np.zeros((4, 4), np.uint8), 8)
    other = struct.pack(">IIBBBBB", 90, 90, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + other + struct.pack(">I", zlib.crc32(b"IHDR" + other))
    assert "does not decode" in reason_of(content[:33] + chunk + content[33:])
