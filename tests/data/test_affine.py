"""Random affine maps and random interpolation, against torchvision's, and with masks and views."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.affine import AffineSettings
from kd_pipeline.data.mask_reader import render_masks
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView, FollowingView, Views
from tests.views import PIXELS, views_of

SIZE = (96, 128)
WHOLE = {"area": (1.0, 1.0), "ratio": (SIZE[1] / SIZE[0],) * 2, "flip": 0.0, **PIXELS}
"""The window is the whole image at its own size, so what differs is what moved."""
MAPS = {
    "rotate": {"rotate": 40.0},
    "translate": {"translate": 0.2},
    "scale": {"scale": (0.7, 1.6)},
    "shear": {"shear": 25.0},
    "all": {"rotate": 20.0, "translate": 0.1, "scale": (0.8, 1.2), "shear": 10.0},
}


@pytest.fixture(scope="module")
def pieces(photos):
    """16 crops of the photographs, `[16, 96, 128, 3]`."""
    return np.stack([photos[n % 2][12 * n : 12 * n + SIZE[0], 20 * n : 20 * n + SIZE[1]] for n in range(16)])


def transform(**changes):
    return TrainTransform(**{"size": SIZE, **WHOLE, **changes})


def moved_by_torchvision(image, numbers, affine, fill):
    """An image `[H, W, 3]` as torchvision moves it, given the op's six numbers."""
    signed = 2 * numbers - 1
    low, high = affine.scale
    moved = functional.affine(
        torch.from_numpy(image).permute(2, 0, 1).float(),
        angle=affine.rotate * signed[1],
        translate=[affine.translate * signed[3] * SIZE[1], affine.translate * signed[2] * SIZE[0]],
        scale=low + (high - low) * numbers[4],
        shear=[affine.shear * signed[5], 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[float(fill)] * 3,
    )
    return moved.numpy()


@pytest.mark.parametrize("name", MAPS)
def test_matches_torchvision_inside_the_image(pieces, name):
    """At the edge, DALI and torchvision blend the last pixels into the gray differently."""
    affine = AffineSettings(**MAPS[name])
    draws, images = views_of(Views.of(transform(affine=affine)), pieces)
    for image, numbers, ours in zip(pieces, draws[IMAGES][0][:, -6:], images[IMAGES], strict=True):
        theirs = moved_by_torchvision(image, numbers, affine, 128)
        is_inside = moved_by_torchvision(np.full_like(image, 255), numbers, affine, 0)[0] > 254.9
        is_inside[[0, -1]], is_inside[:, [0, -1]] = False, False
        assert is_inside.mean() > 0.2
        assert np.abs(ours - theirs)[:, is_inside].max() < 3
        assert np.abs(ours - theirs).mean() < 2


def test_share_of_images_is_moved_and_others_stay(pieces):
    many = np.concatenate([pieces] * 8)
    _, still = views_of(Views.of(transform()), many)
    draws, moved = views_of(Views.of(transform(affine={"rotate": 30, "probability": 0.3})), many)
    changed = (moved[IMAGES] != still[IMAGES]).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, draws[IMAGES][0][:, -6] < 0.3)
    assert 0.15 < changed.mean() < 0.45


@pytest.mark.parametrize("changes", [{"affine": {"rotate": 30}}, {"interpolation": "random"}])
def test_other_ops_draw_the_same(pieces, changes):
    others = {"brightness": 0.4, "blur": 0.5, "erase": 0.5, "auto_augment": {"kind": "randaugment"}}
    plain = Views.of(transform(**others)).draw(np.arange(20), seed=3, epoch=1)[IMAGES][0]
    with_own = Views.of(transform(**others, **changes)).draw(np.arange(20), seed=3, epoch=1)[IMAGES][0]
    np.testing.assert_array_equal(with_own[:, : plain.shape[1]], plain)
    assert with_own.shape[1] == plain.shape[1] + (6 if "affine" in changes else 1)


def test_numbers_of_both_do_not_overlap():
    both = transform(
        affine={"rotate": 30}, interpolation="random", order=[{"factory": "mine:op", "num_draws": 2}, "affine"]
    )
    view = Views.of(both).images
    affine = next(op for op in view.ops if hasattr(op, "at_scale"))
    (own,) = view.own_ops
    assert (view.crop.column, affine.columns, own.columns) == (-10, slice(-9, -3), slice(-3, None))


def test_view_that_follows_moves_the_same(pieces):
    """At half of the size, the moved image is the moved image at half of its size."""
    views = Views.of(
        transform(affine=MAPS["all"]), {"small": FollowingView(follow=IMAGES, size=(SIZE[0] // 2, SIZE[1] // 2))}
    )
    _, images = views_of(views, pieces)
    large = torch.from_numpy(images[IMAGES])
    halved = functional.resize(large, [SIZE[0] // 2, SIZE[1] // 2], antialias=True).numpy()
    assert np.abs(halved - images["small"]).mean() < 4
    _, still = views_of(Views.of(transform()), pieces)
    assert np.abs(halved - still[IMAGES][:, :, ::2, ::2]).mean() > 15


def test_masks_move_with_their_images(pieces):
    """An image that is its own mask: bright where the class is 1."""
    masks = (np.arange(SIZE[0])[:, None] // 24 + np.arange(SIZE[1]) // 32) % 2
    masks = np.stack([masks.astype(np.uint8)] * len(pieces))
    views = Views.of(transform(affine=MAPS["all"], area=(0.5, 0.9), flip=0.5, interpolation="random"))
    draws, images = views_of(views, np.repeat(masks[..., None] * np.uint8(200), 3, axis=-1))
    rendered = render_masks(list(masks), views.images, views.crops(draws)[0], views.parameters(draws), ignore_index=255)
    brightness = images[IMAGES].mean(axis=1)
    for value, (low, high) in {0: (-1, 20), 1: (180, 220), 255: (118, 138)}.items():
        there = rendered == value
        is_clear = (brightness > low) & (brightness < high)
        assert there.any() and is_clear[there].mean() > 0.85, value
    assert set(np.unique(rendered)) == {0, 1, 255}


def test_map_that_moves_nothing_is_refused():
    with pytest.raises(ValidationError, match="moves nothing; set rotate, translate, scale or shear"):
        AffineSettings(probability=0.5)
    with pytest.raises(ValidationError, match="0 < low <= high"):
        AffineSettings(scale=(1.2, 0.8))


def test_interpolation_is_one_of_two_for_each_image(pieces):
    many = np.concatenate([pieces] * 4)
    rendered = {
        name: views_of(Views.of(TrainTransform(size=40, interpolation=name, **PIXELS)), many)
        for name in ("bilinear", "bicubic", "random")
    }
    draws, found = rendered["random"]
    is_bicubic = draws[IMAGES][0][:, -1] >= 0.5
    for name, rows in {"bilinear": ~is_bicubic, "bicubic": is_bicubic}.items():
        np.testing.assert_array_equal(found[IMAGES][rows], rendered[name][1][IMAGES][rows])
    assert 0.3 < is_bicubic.mean() < 0.7
    assert (rendered["bilinear"][1][IMAGES] != rendered["bicubic"][1][IMAGES]).any(axis=(1, 2, 3)).all()


def test_views_of_a_random_interpolation(pieces):
    """One that follows has the same for each image, or its own; one for evaluation is bilinear."""
    views = Views.of(
        TrainTransform(size=40, interpolation="random", **PIXELS),
        {
            "same": FollowingView(follow=IMAGES, size=40),
            "own": FollowingView(follow=IMAGES, size=40, interpolation="bicubic"),
            "center": EvalView(size=40),
        },
    )
    draws, images = views_of(views, pieces)
    np.testing.assert_array_equal(images["same"], images[IMAGES])
    is_equal = (images["own"] == images[IMAGES]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(is_equal, draws[IMAGES][0][:, -1] >= 0.5)
    assert not is_equal.all()
    _, center = views_of(Views.of(EvalTransform(size=40, **PIXELS)), pieces)
    np.testing.assert_array_equal(images["center"], center[IMAGES])


def test_angles_are_uniform():
    op = next(op for op in transform(affine={"rotate": 30}).ops if hasattr(op, "at_scale"))
    (matrix,) = op.parameters(np.random.default_rng(0).random((4000, 6)))
    angles = np.degrees(np.arctan2(matrix[:, 3], matrix[:, 0]))
    assert math.isclose(angles.mean(), 0, abs_tol=1.5) and -30 <= angles.min() < -29 and 29 < angles.max() <= 30
