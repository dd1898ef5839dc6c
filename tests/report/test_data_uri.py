"""Pictures within a page: small, complete, and of what is a picture only."""

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.errors import DataError
from kd_pipeline.report.data_uri import confusion_uri, picture_uri, thumbnail_uri
from tests.hostile.cases import SPECIAL


def image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_thumbnails_keep_their_shape() -> None:
    large = np.zeros((300, 600, 3), dtype=np.uint8)
    assert image(thumbnail_uri(large)).size == (160, 80)
    tiny = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert (np.asarray(image(thumbnail_uri(tiny))) == tiny).all()


def test_pictures_are_encoded_again_without_what_else_is_in_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (4000, 100), "red").save(tmp_path / "a.png", exif=b"secret", comment="secret")
    with (tmp_path / "a.png").open("ab") as file:
        file.write(b"<script>secret")
    uri = picture_uri(tmp_path / "a.png")
    assert image(uri).size == (1600, 40) and b"secret" not in base64.b64decode(uri.partition(",")[2])


def write_bomb(path: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(path)


@pytest.mark.parametrize(
    "write",
    [
        write_bomb,
        lambda path: path.write_bytes(b"<svg onload='alert(1)'/>"),
        lambda path: Image.new("RGB", (9, 9)).save(path, "GIF"),
        *(SPECIAL[name] for name in ("pipe", "endless device", "larger than memory")),
    ],
)
def test_what_is_no_picture_is_one_error(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png"):
        picture_uri(tmp_path / "a.png")
    assert os.path.lexists(tmp_path / "a.png")


@pytest.mark.parametrize("size", [30, 700, 1700])
def test_confusion_of_many_classes_is_a_square(size: int) -> None:
    counts = np.zeros((size, size), dtype=np.int64)
    counts[0] = 5
    picture = image(confusion_uri(counts))
    assert picture.size[0] == picture.size[1] and 600 <= picture.size[0] <= 1600
    assert picture.getpixel((picture.size[0] - 1, picture.size[0] - 1)) == (255, 255, 255)
