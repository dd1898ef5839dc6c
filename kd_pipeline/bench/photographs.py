"""A folder of photographs for benchmarks, made from the two that scikit-learn has."""

import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.optional import require
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import DataError

__all__ = ["link_again", "link_images", "link_photographs", "make_photographs", "photographs", "read_jpeg"]

_NUM_CLASSES = 10
_WIDTHS, _HEIGHTS = (400, 600), (325, 425)
"""Smallest and largest. The mean is 500x375, the most common size in ImageNet."""
_QUALITY = 90
_JPEG = b"\xff\xd8"
"""How a JPEG file starts."""


def photographs(root: Path | None, report: Callable[[str], object]) -> Path:
    """Return `root`; None is `data/photographs`, which is created if it does not exist."""
    if root is not None:
        return root
    root = Path("data/photographs")
    report(f"photographs: {root}, created if it does not exist")
    return make_photographs(root)


def link_photographs(root: Path, folder: Path, *, num_images: int) -> Path:
    """`link_images`, of JPEG files only.

    Raises:
        DataError: a file is not JPEG.
    """
    other = link_images(root, folder, num_images=num_images)
    if other is not None:
        raise DataError(f"{other}: only JPEG files can be compared, as torchvision's decode_jpeg reads no others")
    return folder


def link_images(
    root: Path, folder: Path, *, num_images: int, report: Callable[[str], object] = lambda line: None
) -> Path | None:
    """Make `folder` with links to so many images of `root`, or all, evenly spaced, each of which is read once.

    Those that Pillow cannot decode are left out, as they would stop the loaders of torchvision, and are reported.

    Returns:
        The first file that is not JPEG; None if all are.
    """
    source = ImageFolder(root)
    chosen = np.linspace(0, len(source) - 1, min(len(source), num_images)).astype(int).tolist()
    paths = [Path(source.name(index)) for index in chosen]
    with ThreadPoolExecutor(num_cores()) as pool:
        are_jpeg = [*pool.map(_is_jpeg, paths)]
    if bad := [path for path, is_jpeg in zip(paths, are_jpeg, strict=True) if is_jpeg is None]:
        report(f"left out {len(bad)} of {len(paths)} images, which cannot be decoded, such as {bad[0]}")
    other = None
    for index, path, is_jpeg in zip(chosen, paths, are_jpeg, strict=True):
        if is_jpeg is None:
            continue
        other = other or (None if is_jpeg else path)
        # Of a kind that torchvision lists; PIL and DALI go by the content.
        link = folder / str(path.parent.name) / f"{index:09}{'.jpg' if is_jpeg else '.png'}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return other


def link_again(folder: Path, *, num_files: int) -> None:
    """Add links to the files of `link_images`, equally many to each, until `folder` has `num_files` or more."""
    links = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(1, -(-num_files // len(links))):
        for link in links:
            link.with_name(f"{link.stem}_{number:03}{link.suffix}").symlink_to(link.readlink())


def _is_jpeg(path: Path) -> bool | None:
    """By the content; None for what Pillow cannot decode."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (1, 1))  # JPEG in an eighth of the size, which finds damage as well
            image.load()
    except Exception:  # Pillow's plugins raise all kinds of errors on damaged files
        return None
    return data.startswith(_JPEG)


def read_jpeg(path: Path) -> None:
    """Read a file into the page cache.

    Raises:
        DataError: its name is not that of a JPEG file.
    """
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        raise DataError(f"{path}: only JPEG files can be compared, as torchvision's decode_jpeg reads no others")
    path.read_bytes()


def make_photographs(root: Path, *, num_files: int = 2000, seed: int = 0) -> Path:
    """Write random crops of two photographs as JPEG files of varied sizes, in ten class folders; return `root`.

    An existing `root` is not changed. A new one is moved into place when all files are written, so it is complete even
    after a crash, or if several processes create it at once.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    if root.exists():
        return root
    require("sklearn", extra="bench")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        made = Path(unfinished) / root.name
        _write_crops(made, num_files, np.random.default_rng(seed))
        try:
            made.rename(root)
        except OSError:
            if not root.exists():
                raise
            # Another process created it first, with the same files.
    return root


def _write_crops(folder: Path, num_files: int, rng: np.random.Generator) -> None:
    datasets = require("sklearn.datasets", extra="bench")
    photographs = datasets.load_sample_images().images
    with ThreadPoolExecutor(num_cores()) as pool:  # Pillow releases the GIL while it encodes
        saved = []
        for number in range(num_files):
            photograph = photographs[number % len(photographs)]
            width, height = rng.integers(*_WIDTHS, endpoint=True), rng.integers(*_HEIGHTS, endpoint=True)
            top = rng.integers(photograph.shape[0] - height, endpoint=True)
            left = rng.integers(photograph.shape[1] - width, endpoint=True)
            path = folder / f"class {number // 2 % _NUM_CLASSES}" / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop = Image.fromarray(photograph[top : top + height, left : left + width])
            saved.append(pool.submit(crop.save, path, quality=_QUALITY))
        for each in saved:
            each.result()
