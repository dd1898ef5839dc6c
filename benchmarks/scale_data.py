"""Data sets of any size that take hardly any space: lists, folders and shards of a few images over and over."""

import errno
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import ConfigError, DataError

__all__ = ["SHARD_SAMPLES", "link_folder", "link_shards", "write_images", "write_list"]

_NUM_FILES = 250
"""Image files that everything refers to."""
_NUM_CLASSES = 10
_FILE_SIZE = (64, 48)
"""Width and height of the images, small because reading them is not what is measured."""
_FOLDER_FILES = 10_000
"""Images in a class folder; more files in one folder are slow to make."""
SHARD_SAMPLES = 10_000
"""Samples of a shard, as many as WebDataset's usual gigabyte has."""


def write_images(folder: Path, root: Path) -> list[Path]:
    """Write small copies of images in `root` into class folders in `folder`.

    Raises:
        DataError: there are no images, or one cannot be read.
    """
    source, paths = ImageFolder(root, labeled=False), []
    for number in range(_NUM_FILES):
        original = source.name(number * len(source) // _NUM_FILES)
        path = folder / f"class {number % _NUM_CLASSES}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Image.open(original) as image:
                image.convert("RGB").resize(_FILE_SIZE).save(path)
        except OSError as exc:
            raise DataError(f"{original}: Pillow cannot read it ({exc}); give another root") from exc
        paths.append(path)
    return paths


def write_list(path: Path, images: Sequence[Path], num_entries: int) -> None:
    """Write a CSV list with paths and class names of `images`, again and again."""
    lines = [f"{image.relative_to(path.parent)},{image.parent.name}\n" for image in images]
    block = "".join(lines)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_entries // len(lines)):
            file.write(block)
        file.writelines(lines[: num_entries % len(lines)])


def link_folder(folder: Path, images: Sequence[Path], num_files: int) -> None:
    """Make class folders with so many hard links to `images`.

    Raises:
        ConfigError: the file system allows fewer links to a file.
    """
    for start in range(0, num_files, _FOLDER_FILES):
        own = folder / f"class {start // _FOLDER_FILES:05}"
        own.mkdir(parents=True)
        for number in range(start, min(start + _FOLDER_FILES, num_files)):
            _link(images[number % len(images)], own / f"{number:09}.jpg")


def link_shards(folder: Path, images: Sequence[Path], num_samples: int) -> Path:
    """Make one tar shard, labels included, and hard links to it; return their pattern.

    Raises:
        ConfigError: `num_samples` is no multiple of `SHARD_SAMPLES`, or the file system allows fewer links to a file.
    """
    num_shards, rest = divmod(num_samples, SHARD_SAMPLES)
    if rest or not num_shards:
        raise ConfigError(f"shards: {num_samples} samples do not fill shards of {SHARD_SAMPLES}; give a multiple")
    folder.mkdir()
    first = folder / "000000.tar"
    with tarfile.open(first, "w") as shard:
        for number in range(SHARD_SAMPLES):
            image = images[number % len(images)]
            shard.add(image, f"{number:06}.jpg")
            label = folder / "label"
            label.write_text(image.parent.name)
            shard.add(label, f"{number:06}.cls")
    label.unlink()
    for number in range(1, num_shards):
        _link(first, folder / f"{number:06}.tar")
    return folder / "*.tar"


def _link(target: Path, path: Path) -> None:
    try:
        os.link(target, path)
    except OSError as exc:
        if exc.errno != errno.EMLINK:
            raise
        raise ConfigError(f"{path}: no more links to a file on this file system; measure fewer samples") from exc
