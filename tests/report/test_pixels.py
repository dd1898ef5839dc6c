"""Pictures of masks: the pixels of the file have the colors of the classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.pixels import predicted_classes
from kd_pipeline.report.grid import save_grid
from kd_pipeline.report.pixels import class_colors, save_mask

TRANSFORM = EvalTransform(size=112, resize=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
TOP, LEFT, NEXT = 16, 4, 116
"""The first tile, and how far the next one to the right is."""


def batch_of(num_images: int = 3, **changes: object) -> KDBatch:
    masks = torch.zeros(num_images, 112, 112).long()
    masks[:, :56], masks[:, 100:] = 2, 255
    logits = torch.zeros(num_images, 3, 7, 7)
    logits[:, 1] = 1
    fields = {
        "images": torch.zeros(num_images, 3, 112, 112),
        "index": torch.arange(num_images),
        "valid": torch.ones(num_images, dtype=torch.bool),
        "masks": masks,
        "teacher": {"logits": logits},
    }
    return KDBatch(fields | changes)


def pixel(path: Path, column: int, y: int) -> tuple[int, ...]:
    """In the middle of a tile of the first image."""
    with Image.open(path) as picture:
        return picture.getpixel((LEFT + column * NEXT + 50, TOP + y))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_colors_are_those_of_pascal_voc():
    assert class_colors(22)[[0, 1, 2, 15, 20, 21]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [128, 64, 128]
    ]  # fmt: skip
    assert len(np.unique(class_colors(256), axis=0)) == 256


def test_image_mask_and_predictions(tmp_path: Path):
    student = torch.zeros(3, 3, 112, 112)
    student[:, 2, 56:] = 1
    path = save_grid(batch_of(), tmp_path / "grid.png", transform=TRANSFORM, student=student)
    assert pixel(path, 0, 30) == (128, 128, 128)
    assert [pixel(path, 1, y) for y in (30, 80, 105)] == [(0, 128, 0), (0, 0, 0), (224, 224, 192)]
    assert [pixel(path, 2, y) for y in (30, 80)] == [(128, 0, 0)] * 2
    assert [pixel(path, 3, y) for y in (30, 80)] == [(0, 0, 0), (0, 128, 0)]


@pytest.mark.parametrize(
    "changes", [{"teacher": {}}, {"masks": None}, {"masks": torch.full((3, 112, 112), 255), "teacher": {}}]
)
def test_what_is_not_there_has_no_column(tmp_path: Path, changes: dict[str, object]):
    path = save_grid(batch_of(**changes), tmp_path / "grid.png", transform=None, classes=["a", "b", "c"])
    assert size_of(path)[0] < LEFT + 3 * NEXT


def test_rectangles_keep_their_form(tmp_path: Path):
    batch = batch_of(images=torch.zeros(3, 3, 50, 100), masks=torch.zeros(3, 50, 100).long())
    path = save_grid(batch, tmp_path / "grid.png", transform=None)
    assert 16 + 3 * 60 < size_of(path)[1] < 16 + 3 * 60 + 40


def test_logits_are_enlarged_before_the_choice():
    logits = torch.tensor([[[0.0, 0.6]], [[0.5, 0.5]]])[None]
    assert predicted_classes(logits, (1, 8)).tolist() == [[[1, 1, 1, 1, 1, 0, 0, 0]]]


def test_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_grid(batch_of(), tmp_path / "file" / "grid.png", transform=None)


@pytest.mark.parametrize("num_classes", [4, 256, 3000])
def test_mask_in_a_file_holds_the_classes(tmp_path: Path, num_classes: int):
    labels = torch.arange(num_classes - 4, num_classes).view(2, 2)
    with Image.open(save_mask(labels, tmp_path / "more" / "mask.png", num_classes=num_classes)) as picture:
        assert np.asarray(picture).tolist() == labels.tolist()
        if num_classes <= 256:
            assert picture.convert("RGB").getpixel((1, 1)) == tuple(class_colors(256)[num_classes - 1].tolist())
