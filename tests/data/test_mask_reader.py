"""Masks show the same part of a file as their images, to a pixel, whatever is done to these."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import max_pool2d

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.auto_augment import OPS, RandAugment, TrivialAugment
from kd_pipeline.data.sources import (
    ArrayMasks,
    Arrays,
    FileList,
    FolderMasks,
    ImageFolder,
    ListMasks,
    Source,
    Tar,
    TarMasks,
)
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import FollowingView, TrainView
from kd_pipeline.loader.loader import KDDataLoader
from tests.mask_files import png_of
from tests.tar_files import write_tar

SIDE = 180
"""The largest of the images; a mask has the number of each pixel, which an image has as colors."""
IGNORED = 2**15 - 1
BLUE = 40
"""Of all images, so what a warp brings in from outside, which is gray, differs."""
SEED = 3
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
WARPS = {OPS.index(name) for name in ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")}
TRANSFORMS = {
    "smaller": TrainTransform(size=64, **PLAIN),
    "larger": TrainTransform(size=160, area=(0.05, 0.3), **PLAIN),
    "rectangle": TrainTransform(size=(96, 144), area=(0.05, 1), ratio=(0.3, 3), **PLAIN),
    "bicubic": TrainTransform(size=96, interpolation="bicubic", area=(0.05, 1), flip=1.0, **PLAIN),
    "center": EvalTransform(size=64, **PLAIN),
    "larger center": EvalTransform(size=(200, 150), **PLAIN),
    "one warp": TrainTransform(size=96, auto_augment=TrivialAugment(), **PLAIN),
    "two warps": TrainTransform(size=(80, 112), auto_augment=RandAugment(magnitude=10), area=(0.3, 1), **PLAIN),
}


def save_coordinates(root: Path, num: int) -> ImageFolder:
    """Images whose red and green are the coordinates x and y of each pixel, and masks with y * SIDE + x."""
    rng = np.random.default_rng(num)
    for number in range(num):
        height, width = rng.integers(90, SIDE, 2)
        y, x = np.mgrid[:height, :width]
        for folder in ("images", "masks"):
            (root / folder).mkdir(exist_ok=True)
        image = np.stack([x, y, np.full_like(x, BLUE)], axis=2).astype(np.uint8)
        Image.fromarray(image).save(root / f"images/{number:04}.png", compress_level=1)
        (root / f"masks/{number:04}.png").write_bytes(png_of(y * SIDE + x, "I;16"))
    return ImageFolder(root / "images", masks=masks_in(root))


def masks_in(root: Path) -> FolderMasks:
    return FolderMasks(root=str(root / "masks"), num_classes=SIDE**2, ignore_index=IGNORED)


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return save_coordinates(tmp_path_factory.mktemp("coordinates"), 40)


def open_loader(source: Any, transform: Any, **options: Any) -> KDDataLoader:
    return KDDataLoader(source, transform, **{"batch_size": 16, "seed": SEED, "device": "cpu", **options})


def only_warps(loader: KDDataLoader, batch: KDBatch, epoch: int) -> NDArray[np.bool_]:
    """The rows in which no op changes colors, so coordinates can be told."""
    view = loader.views.images
    parameters = list(view.parameters(loader.views.draw(batch.index.numpy(), seed=SEED, epoch=epoch)["images"][0]))
    kept = np.ones(len(batch), np.bool_)
    for op in parameters[:-1:2]:  # the last one is the flip
        kept &= np.isin(op, list(WARPS))
    return kept


def deviation(batch: KDBatch, rows: NDArray[np.bool_], num_warps: int = 1) -> tuple[float, float]:
    """The largest distance of masks from their images, and the mean difference, in pixels of the files along an axis.

    A mask has a class where the image is not filled, and none where it is, but for a pixel at the border for each warp,
    which mixes it with the fill.
    """
    masks, images = batch.masks.numpy()[rows], (255 * batch.images).numpy()[rows]
    is_inside, is_image = masks != IGNORED, np.abs(images[:, 2] - BLUE) < 0.7
    for ours, theirs in ((is_inside, is_image), (~is_inside, ~is_image)):
        near = max_pool2d(torch.from_numpy(theirs).float(), 2 * num_warps + 1, stride=1, padding=num_warps).numpy() > 0
        assert not (ours & ~near).any()
    found = np.stack(np.divmod(masks, SIDE), axis=1)
    difference = (found - images[:, 1::-1]).transpose(1, 0, 2, 3)[:, is_inside & is_image]
    return float(np.abs(difference).max()), float(difference.mean())


def check_agreement(source: Source, transform: Any, num_views: int) -> None:
    """Compare so many views of three epochs."""
    largest, means, num = 0.0, [], 0
    with open_loader(source, transform) as loader:
        for epoch in range(3):
            for batch in loader:
                rows, num_warps = np.ones(len(batch), np.bool_), 1
                if (policy := getattr(transform, "auto_augment", None)) is not None:
                    rows, num_warps = only_warps(loader, batch, epoch), policy.num_ops
                if rows.any():
                    found, mean = deviation(batch, rows, num_warps)
                    largest, num = max(largest, found), num + int(rows.sum())
                    means.append(mean)
    assert num >= num_views
    assert largest <= 1.01
    assert abs(np.mean(means)) < 0.1  # not half a pixel to one side


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_masks_agree_with_their_images(coordinates, transform):
    check_agreement(coordinates, transform, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "repeats"), [("smaller", 84), ("one warp", 200)])
def test_masks_agree_in_ten_thousand_views(tmp_path, coordinates, name, repeats):
    """Of the warps somewhat less than half show coordinates."""
    pairs = [f"{coordinates.name(index)},{coordinates.masks.name(index)}" for index in range(len(coordinates))]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask", *repeats * pairs]))
    rules = ListMasks(num_classes=SIDE**2, ignore_index=IGNORED)
    check_agreement(FileList(tmp_path / "list.csv", masks=rules), TRANSFORMS[name], 10_000)


def test_colors_blur_and_erasing_leave_masks_alone(coordinates):
    plain, colored = (
        TrainTransform(size=64, **more)
        for more in ({}, {"brightness": 0.5, "hue": 0.2, "grayscale": 0.5, "blur": 1.0, "erase": 1.0})
    )
    with open_loader(coordinates, plain) as first, open_loader(coordinates, colored) as second:
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours.masks, theirs.masks) and not torch.equal(ours.images, theirs.images)


def test_masks_are_classes_of_each_pixel(coordinates):
    with open_loader(coordinates, TRANSFORMS["rectangle"]) as loader:
        batch = next(iter(loader))
    assert batch.masks.dtype == torch.int64 and batch.masks.shape == (16, 96, 144)
    assert batch.labels is None


def test_views_have_no_effect_on_masks(coordinates):
    views = {"teacher": FollowingView(follow="images", size=96), "local": TrainView(size=32, count=2)}
    transform = TRANSFORMS["smaller"]
    with open_loader(coordinates, transform) as first, open_loader(coordinates, transform, views=views) as second:
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours.masks, theirs.masks) and torch.equal(ours.images, theirs.images)


def test_every_way_to_store_gives_the_same(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 50, 60, 3), dtype=np.uint8)
    masks = rng.integers(0, 9, (12, 50, 60), dtype=np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    files = {}
    for number in range(12):
        Image.fromarray(images[number]).save(tmp_path / f"images/{number:02}.png")
        np.save(tmp_path / f"masks/{number:02}.npy", masks[number])
        files[f"{number:02}.png"] = (tmp_path / f"images/{number:02}.png").read_bytes()
        files[f"{number:02}.seg.png"] = png_of(masks[number], "P")
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "masks.npy", masks)
    rules = {"num_classes": 9}
    sources = [
        ImageFolder(tmp_path / "images", masks=FolderMasks(root=str(tmp_path / "masks"), **rules)),
        Arrays(tmp_path / "images.npy", masks=ArrayMasks(path=tmp_path / "masks.npy", **rules)),
        Tar(write_tar(tmp_path / "a.tar", files), masks=TarMasks(extension="seg.png", **rules)),
    ]
    found = []
    for source in sources:
        with open_loader(source, TrainTransform(size=32, auto_augment=TrivialAugment()), batch_size=4) as loader:
            found.append([(batch.images, batch.masks) for _ in range(2) for batch in loader])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("orientation", ["upright", "stored"])
def test_a_mask_is_as_the_image_is_decoded(tmp_path, orientation):
    """An image on its side has an upright mask, or one as it is stored."""
    source = save_coordinates(tmp_path, 1)
    (mask,) = source.masks.read(np.zeros(1, np.int64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    with Image.open(tmp_path / "images/0000.png") as image:
        image.rotate(90, expand=True).save(tmp_path / "images/0000.png", exif=exif)
    if orientation == "stored":
        np.save(tmp_path / "masks/0000.npy", np.rot90(mask))
        (tmp_path / "masks/0000.png").unlink()
    source = ImageFolder(tmp_path / "images", masks=masks_in(tmp_path))
    with open_loader(source, EvalTransform(size=64, orientation=orientation, **PLAIN), batch_size=1) as loader:
        assert deviation(next(iter(loader)), np.ones(1, np.bool_))[0] <= 1.01
