"""The grid of a batch shows the pixels that the models see, labels and teacher predictions."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.report.grid import save_grid

TRANSFORM = EvalTransform(size=8)


def batch_of(colors: torch.Tensor, *, labels: list[int] | None, choices: list[int] | None) -> KDBatch:
    """One image of one color, from 0 to 1, for each row of `colors` `[N, 3]`."""
    mean, std = torch.tensor(TRANSFORM.mean), torch.tensor(TRANSFORM.std)
    images = ((colors - mean) / std)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    num_images = len(colors)
    teacher = {} if choices is None else {"logits": torch.nn.functional.one_hot(torch.tensor(choices), 10) * 9.0}
    return KDBatch(
        images=images,
        labels=None if labels is None else torch.tensor(labels),
        index=torch.arange(num_images),
        valid=torch.ones(num_images, dtype=torch.bool),
        teacher=teacher,
    )


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count_of(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(pixels - np.array(color)).max(axis=2) <= 2).sum())


def test_normalization_is_undone(tmp_path: Path) -> None:
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.4, 0.8]])
    path = save_grid(batch_of(colors, labels=None, choices=None), tmp_path / "grid.png", transform=TRANSFORM)
    pixels = pixels_of(path)
    assert count_of(pixels, (255, 0, 0)) >= 100 * 100
    assert count_of(pixels, (51, 102, 204)) >= 100 * 100


def test_agreement_is_green_disagreement_red(tmp_path: Path) -> None:
    gray = torch.full((1, 3), 0.5)
    agreeing = pixels_of(
        save_grid(batch_of(gray, labels=[3], choices=[3]), tmp_path / "agreeing.png", transform=TRANSFORM)
    )
    differing = pixels_of(
        save_grid(batch_of(gray, labels=[3], choices=[5]), tmp_path / "differing.png", transform=TRANSFORM)
    )
    green, red = (0, 110, 40), (190, 20, 20)
    assert count_of(agreeing, green) > 0 and count_of(agreeing, red) == 0
    assert count_of(differing, red) > 0 and count_of(differing, green) == 0


def test_class_names_replace_numbers(tmp_path: Path) -> None:
    batch = batch_of(torch.full((1, 3), 0.5), labels=[1], choices=[1])
    named = pixels_of(save_grid(batch, tmp_path / "a.png", transform=TRANSFORM, classes=["cat", "dog"] + ["x"] * 8))
    numbered = pixels_of(save_grid(batch, tmp_path / "b.png", transform=TRANSFORM))
    assert (named != numbered).any()


def test_unknown_class_is_shown_by_its_number(tmp_path: Path) -> None:
    batch = batch_of(torch.full((1, 3), 0.5), labels=None, choices=[9])
    named = pixels_of(save_grid(batch, tmp_path / "a.png", transform=TRANSFORM, classes=["cat", "dog"]))
    numbered = pixels_of(save_grid(batch, tmp_path / "b.png", transform=TRANSFORM))
    assert (named == numbered).all()


def test_large_batch_shows_its_first_images(tmp_path: Path) -> None:
    batch = batch_of(torch.rand(50, 3), labels=[0] * 50, choices=None)
    small = pixels_of(save_grid(batch, tmp_path / "small.png", transform=TRANSFORM, num_images=2))
    large = pixels_of(save_grid(batch, tmp_path / "large.png", transform=TRANSFORM, num_images=50))
    assert small.shape[0] < large.shape[0]


def test_grid_takes_the_place_of_a_link_and_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe.png")
    batch = batch_of(torch.full((1, 3), 0.5), labels=None, choices=None)
    assert pixels_of(save_grid(batch, tmp_path / "link.png", transform=TRANSFORM)).size
    assert (tmp_path / "victim").read_text() == "kept" and not (tmp_path / "link.png").is_symlink()
    with pytest.raises(ConfigError, match=r"pipe\.png cannot be written: this is a pipe and no file"):
        save_grid(batch, tmp_path / "pipe.png", transform=TRANSFORM)
    with pytest.raises(ConfigError, match=r"victim/grid\.png cannot be written: "):
        save_grid(batch, tmp_path / "victim" / "grid.png", transform=TRANSFORM)
