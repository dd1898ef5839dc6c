"""The mask of an image is the file of the same name in a folder with the same tree."""

from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import FolderMasks, ImageFolder
from tests.data.sources.helpers import error_of, make_files


def masks(root: Path, **settings: object) -> FolderMasks:
    return FolderMasks(root=str(root / "masks"), num_classes=19, **settings)


def pairs(root: Path, images: str = "images", **settings: object) -> list[tuple[str, str]]:
    source = ImageFolder(root / images, masks=masks(root, **settings))
    return [
        (Path(source.name(i)).relative_to(root).as_posix(), Path(source.masks.name(i)).relative_to(root).as_posix())
        for i in range(len(source))
    ]


def test_flat_folders(tmp_path):
    make_files(tmp_path, "images/b.jpg", "images/a.JPG", "masks/a.png", "masks/b.npy", "masks/unused.png")
    assert pairs(tmp_path) == [("images/a.JPG", "masks/a.png"), ("images/b.jpg", "masks/b.npy")]


def test_cityscapes(tmp_path):
    for city in ("aachen", "bochum"):
        name = f"{city}/{city}_000000_000019"
        make_files(tmp_path, f"images/{name}_leftImg8bit.png", f"masks/{name}_gtFine_labelIds.png")
        make_files(tmp_path, f"masks/{name}_gtFine_color.png", f"masks/{name}_gtFine_polygons.json")
    found = pairs(tmp_path, replace={"_leftImg8bit": "_gtFine_labelIds"})
    assert found[1][1] == "masks/bochum/bochum_000000_000019_gtFine_labelIds.png" and len(found) == 2


def test_endings_in_any_case_and_dots_in_names(tmp_path):
    make_files(tmp_path, "images/v1.2/a.b.jpg", "masks/v1.2/a.b.PNG", "masks/v1.2/a.png")
    assert pairs(tmp_path) == [("images/v1.2/a.b.jpg", "masks/v1.2/a.b.PNG")]


def test_folders_are_no_classes(tmp_path):
    make_files(tmp_path, "images/cat/1.jpg", "images/2.jpg", "masks/cat/1.png", "masks/2.png")
    source = ImageFolder(tmp_path / "images", masks=masks(tmp_path))
    assert (source.labels, source.classes, source.num_classes) == (None, None, 19) and len(source) == 2


def test_missing_masks_are_named(tmp_path):
    make_files(tmp_path, *(f"images/{number}.jpg" for number in range(12)), "masks/x_0.png")
    message = error_of(ImageFolder, tmp_path / "images", masks=masks(tmp_path))
    assert "no masks for 12 of 12 images: 0, 1, 10" in message and ".png and .npy" in message
    assert "the masks are such as x_0.png" in message


def test_two_masks_are_named(tmp_path):
    make_files(tmp_path, "images/1.jpg", "images/2.jpg", "masks/1.png", "masks/1.npy", "masks/2.png")
    message = error_of(ImageFolder, tmp_path / "images", masks=masks(tmp_path))
    assert "more than one mask for 1 of 2 images: 1" in message


def test_a_folder_without_masks(tmp_path):
    make_files(tmp_path, "images/1.jpg", "masks/1.jpg")
    message = error_of(ImageFolder, tmp_path / "images", masks=masks(tmp_path))
    assert "no masks (.png and .npy) in or below this folder" in message and "1.jpg" in message
    missing = FolderMasks(root=str(tmp_path / "nowhere"), num_classes=19)
    assert "nowhere" in error_of(ImageFolder, tmp_path / "images", masks=missing)


@pytest.mark.parametrize("change", ["image", "mask", "name"])
def test_fingerprint(tmp_path, change):
    make_files(tmp_path, "images/1.jpg", "images/2.jpg", "masks/1.png", "masks/2.png", "masks/2_.png")
    before = ImageFolder(tmp_path / "images", masks=masks(tmp_path))
    assert before.fingerprint == ImageFolder(tmp_path / "images", masks=masks(tmp_path)).fingerprint
    assert before.fingerprint != ImageFolder(tmp_path / "images", labeled=False).fingerprint
    if change == "name":
        (tmp_path / "masks/2.png").rename(tmp_path / "masks/2.npy")
    else:
        (tmp_path / ("images/2.jpg" if change == "image" else "masks/2.png")).write_text("other")
    assert before.fingerprint != ImageFolder(tmp_path / "images", masks=masks(tmp_path)).fingerprint


def test_paths_are_read_by_position(tmp_path):
    make_files(tmp_path, "images/1.jpg", "images/2.jpg", "masks/1.png", "masks/2.png")
    source = ImageFolder(tmp_path / "images", masks=masks(tmp_path))
    first, second = source.masks.read(np.array([1, 0]))
    assert "masks/2.png: it is of a kind" in str(first) and "masks/1.png: it is of a kind" in str(second)
