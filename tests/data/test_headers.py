"""Headers of image files: which decoder they need, and what is refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.data.file_kinds import FileKinds, read_file
from kd_pipeline.data.headers import Decoder, UnreadableFileError, read_header
from kd_pipeline.data.pillow import decode_with_pillow
from tests.corpus import ODD, Odd, encoded, photo_of
from tests.rare_files import RARE, UNSUPPORTED, deep_jpeg2000, tiff, without_last_scans


@pytest.fixture(scope="module")
def photo(photos):
    return photo_of(photos)


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
        pixels = decode_with_pillow(data, header, orientation="upright", max_pixels=photo[..., 0].size)
        shown = np.asarray(Image.fromarray(odd.shows(photo)).convert("RGB")).astype(float)
        assert np.abs(pixels - shown).mean() < 2
        with pytest.raises(UnreadableFileError, match="190x150 pixels, more than max_pixels=28499"):
            decode_with_pillow(data, header, orientation="upright", max_pixels=photo[..., 0].size - 1)


def test_twelve_bits_are_scaled():
    """In a TIFF and a JPEG 2000; Pillow's `convert` clips at 255."""
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    packed = np.empty((64, 32, 3), np.uint8)
    even, odd = levels[:, ::2], levels[:, 1::2]
    packed[..., 0], packed[..., 1], packed[..., 2] = even >> 4, (even & 15) << 4 | odd >> 8, odd & 255
    for data in (deep_jpeg2000(levels, 12), tiff(packed, 1, bits=12, size=(64, 64))):
        pixels = decode_with_pillow(data, read_header(memoryview(data)), orientation="upright", max_pixels=4096)
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


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_file(os.fsencode(tmp_path / "file")).tobytes() == b"content"
    os.mkfifo(tmp_path / "pipe")
    for path, reason in {tmp_path / "pipe": "a pipe", Path("/dev/zero"): "a device", tmp_path: "a directory"}.items():
        with pytest.raises(UnreadableFileError, match=reason):
            read_file(os.fsencode(path))
    with pytest.raises(UnreadableFileError, match="No such file"):
        read_file(os.fsencode(tmp_path / "missing"))


def test_special_files_are_looked_for_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    kinds = FileKinds(orientation="upright", max_pixels=1, num_threads=1)
    names = [tmp_path / "file", tmp_path / "pipe", tmp_path / "missing"] * 300
    paths = np.array([os.fsencode(name) for name in names]).view(np.uint8).reshape(900, -1)
    index = np.arange(900)
    kept = kinds.without_special(index, paths)
    assert (kept[1::3] == 0).all() and (kept[::3] == paths[::3]).all() and (kept[2::3] == paths[2::3]).all()
    looked_at: list[bytes] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (looked_at.append(path), stat(path, **options))[1])
    assert (kinds.without_special(index, paths) == kept).all()
    assert {os.path.basename(path) for path in looked_at} == {b"pipe"}
