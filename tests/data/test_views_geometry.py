"""What each view shows and draws: windows, flips and warps that views share, and colors that they need not share."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.auto_augment import OPS, RandAugment, TrivialAugment
from kd_pipeline.data.mixing import MixSettings, at_size, plan_mixing
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView, FollowingView, TrainView, Views, ViewSettings
from kd_pipeline.errors import ConfigError
from tests.streams import TRAIN
from tests.views import PIXELS, views_of

HEIGHT, WIDTH = 150, 210
FIRST_OP = 40
"""The uniform number of the first op of RandAugment."""


def coordinates(num_images: int) -> NDArray[np.uint8]:
    """Images whose pixels say where they are: row, column, and 255 to tell them from what fills a warped image."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([np.stack([y, x, np.full_like(y, 255)], axis=-1).astype(np.uint8)] * num_images)


def pieces(num_images: int, photos: tuple[NDArray[np.uint8], ...]) -> NDArray[np.uint8]:
    """Different parts of the photographs, `[N, 150, 210, 3]`."""
    starts = [(3 * number % 200, 7 * number % 300) for number in range(num_images)]
    return np.stack([photos[n % 2][y : y + HEIGHT, x : x + WIDTH] for n, (y, x) in enumerate(starts)])


def resampled(images: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """`[N, C, h, w]` at another size: where each pixel's center was, linearly."""
    for axis, length in ((2, size[0]), (3, size[1])):
        old = images.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), old - 2)
        share = np.expand_dims(at - low, [each for each in (0, 1, 2, 3) if each != axis])
        images = np.take(images, low, axis) * (1 - share) + np.take(images, low + 1, axis) * share
    return images.astype(np.float32)


def transform(policy: RandAugment | TrivialAugment | None = None, **changes: Any) -> TrainTransform:
    return TrainTransform(**{"size": 48, "area": (0.2, 1.0), "auto_augment": policy, **PIXELS, **changes})


WARPS = [RandAugment(num_ops=1, magnitude=10), TrivialAugment()]


def worst_distance(views: Views, epoch: int, num_images: int) -> dict[str, float]:
    """How far apart a view and `images` are at the same place of the window, in pixels of the larger step.

    For each op that moves pixels, and for none; over all that lies two pixels within the image in both.
    """
    draws, found = views_of(views, coordinates(num_images), epoch=epoch)
    worst: dict[str, float] = {}
    ops = np.floor(draws[IMAGES][0][:, FIRST_OP] * len(OPS)).astype(int)
    ours = found["teacher"]
    theirs = resampled(found[IMAGES].astype(np.float32), ours.shape[2:])
    # Source pixels per pixel of the coarser view, at most those of the whole image.
    step = max(HEIGHT / min(ours.shape[2], 48), WIDTH / min(ours.shape[3], 48))
    for op in range(OPS.index("rotate") + 1):
        rows = ops == op
        inside = (ours[rows, 2] == 255) & (theirs[rows, 2] == 255)
        inside[:, :2] = inside[:, -2:] = inside[:, :, :2] = inside[:, :, -2:] = False
        distance = np.abs(ours[rows, :2] - theirs[rows, :2]).max(axis=1)
        worst[OPS[op]] = float((distance * inside).max(initial=0) / step)
        assert inside.mean(axis=(1, 2)).max(initial=1) > 0.3
    return worst


@pytest.mark.parametrize("policy", WARPS, ids=["randaugment", "trivialaugment"])
@pytest.mark.parametrize("size", [72, 32, (40, 96)])
def test_following_view_has_the_window_to_a_pixel(policy, size):
    views = Views.of(transform(policy), {"teacher": FollowingView(follow=IMAGES, size=size)})
    worst = worst_distance(views, 0, 300)
    assert set(worst) == {"identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"}
    assert max(worst.values()) < 0.5, worst


@pytest.mark.slow
@pytest.mark.parametrize("policy", WARPS, ids=["randaugment", "trivialaugment"])
def test_views_agree_on_windows_in_ten_thousand_images(policy):
    views = Views.of(transform(policy), {"teacher": FollowingView(follow=IMAGES, size=(64, 88))})
    for epoch in range(3):
        assert max(worst_distance(views, epoch, 3400).values()) < 0.5


def test_view_of_a_center_crop_has_its_window():
    views = Views.of(EvalTransform(size=48, **PIXELS), {"teacher": FollowingView(follow=IMAGES, size=96)})
    _, found = views_of(views, coordinates(1))
    difference = np.abs(resampled(found[IMAGES], (96, 96)) - found["teacher"])[:, :, 2:-2, 2:-2]
    assert difference.max() < 1  # of the source's pixels, of which the view has one in three


def test_copies_have_windows_of_their_own():
    settings = {"local": TrainView(size=24, area=(0.05, 0.2), count=4), "large": FollowingView(follow="local", size=48)}
    _, found = views_of(Views.of(transform(), settings), coordinates(20))
    local, large = found["local"], found["large"]
    assert local.shape == (20, 4, 3, 24, 24) and large.shape == (20, 4, 3, 48, 48)
    corners = local[:, :, :2, 0, 0].reshape(20, 4, 2)
    assert all(len(np.unique(corner, axis=0)) == 4 for corner in corners)
    half = large.reshape(20, 4, 3, 24, 2, 24, 2).mean(axis=(4, 6))
    assert np.abs(half - local)[..., 2:-2, 2:-2].max() < 1.5


def test_a_count_of_one_keeps_its_dimension():
    _, found = views_of(Views.of(transform(), {"local": TrainView(size=24, count=1)}), coordinates(2))
    assert found["local"].shape == (2, 1, 3, 24, 24)


# Draws


def test_draws_depend_on_the_name_alone():
    """Not on the other views, nor on their order."""
    index = np.arange(50)
    local, other = TrainView(size=24, count=3, hue=0.1), TrainView(size=32, blur=0.5)
    many = Views.of(transform(), {"other": other, "local": local}).draw(index, seed=3, epoch=1)
    alone = Views.of(transform(hue=0.2), {"local": local}).draw(index, seed=3, epoch=1)
    renamed = Views.of(transform(), {"renamed": local}).draw(index, seed=3, epoch=1)
    for copy in range(3):
        np.testing.assert_array_equal(many["local"][copy], alone["local"][copy])
        assert (many["local"][copy] != renamed["renamed"][copy]).mean() > 0.99
    each = [*many["local"], many[IMAGES][0], many["other"][0]]
    for number, draws in enumerate(each):
        for later in each[number + 1 :]:
            assert (draws[:, :20] != later[:, :20]).mean() > 0.99


def test_draws_of_images_are_those_without_views():
    index, repeat = np.arange(30), np.arange(30) % 2
    settings = {"teacher": FollowingView(follow=IMAGES, size=72), "local": TrainView(size=24, count=2)}
    for number in (0, 40):
        alone, many = (
            Views.of(TRAIN, each).draw(index, seed=9, epoch=2, repeat=repeat, at_least=number)[IMAGES][0]
            for each in ({}, settings)
        )
        np.testing.assert_array_equal(alone, many)


def test_copies_and_repeats_are_different_draws():
    views = Views.of(transform(), {"local": TrainView(size=24, count=2)})
    first, second = (views.draw(np.arange(40), seed=1, epoch=0, repeat=np.full(40, n))["local"] for n in (0, 1))
    each = [*first, *second]
    assert all((a != b).mean() > 0.99 for n, a in enumerate(each) for b in each[n + 1 :])


# Colors and erasing

COLORED = {"brightness": 0.5, "hue": 0.2, "grayscale": 0.3, "blur": 0.5}


def colored(photos: Any, settings: Mapping[str, FollowingView], **changes: Any) -> dict[str, NDArray[Any]]:
    views = Views.of(transform(**{**COLORED, "erase": 0.6, **changes}), settings)
    return views_of(views, pieces(40, photos))[1]


def test_shared_colors_are_the_same(photos):
    found = colored(photos, {"same": FollowingView(follow=IMAGES, size=48)})
    np.testing.assert_array_equal(found["same"], found[IMAGES])


def test_without_colors_a_view_is_the_plain_window(photos):
    found = colored(photos, {"plain": FollowingView(follow=IMAGES, size=48, color="none", erase="none")})
    _, plain = views_of(Views.of(transform()), pieces(40, photos))
    np.testing.assert_array_equal(found["plain"], plain[IMAGES])
    assert (found[IMAGES] != plain[IMAGES]).any(axis=(1, 2, 3)).mean() > 0.9


def test_own_colors_and_erasing_are_drawn_again(photos):
    """Each alone: with own colors the erased rectangle stays, and with own erasing the colors outside do."""
    found = colored(
        photos,
        {
            "colors": FollowingView(follow=IMAGES, size=48, color="own"),
            "erased": FollowingView(follow=IMAGES, size=48, erase="own"),
        },
        erase=1.0,
    )
    fill = np.round(255 * np.array(PIXELS["mean"]))[:, None, None]
    where = {name: (view == fill).all(axis=1) for name, view in found.items()}
    assert (where["colors"] & where[IMAGES]).sum() > 0.95 * where[IMAGES].sum()
    assert (found["colors"] != found[IMAGES]).any(axis=(1, 2, 3)).mean() > 0.9
    both = where["erased"] | where[IMAGES]
    assert (found["erased"] == found[IMAGES]).all(axis=1)[~both].all()
    overlap = (where["erased"] & where[IMAGES]).sum(axis=(1, 2)) / where[IMAGES].sum(axis=(1, 2))
    assert overlap.mean() < 0.6


@pytest.mark.parametrize("color", ["own", "none"])
def test_ops_that_move_pixels_stay_with_other_colors(color):
    """Of RandAugment: the warps are those of `images`, the others are drawn again, all alike, or left out."""
    views = Views.of(transform(RandAugment(num_ops=2)), {"teacher": FollowingView(follow=IMAGES, size=48, color=color)})
    draws = views.draw(np.arange(20_000), seed=2, epoch=0)
    (theirs,), (ours,) = draws[IMAGES], draws["teacher"]
    last_warp = OPS.index("rotate")
    for slot in (FIRST_OP, FIRST_OP + 4):
        before, after = (np.floor(each[:, slot] * len(OPS)) for each in (theirs, ours))
        is_warp = (before >= 1) & (before <= last_warp)
        np.testing.assert_array_equal(ours[is_warp, slot : slot + 4], theirs[is_warp, slot : slot + 4])
        changed = after[~is_warp]
        if color == "none":
            assert (changed == 0).all()
        else:
            counts = np.bincount(changed.astype(int), minlength=len(OPS))
            assert (counts[1 : last_warp + 1] == 0).all()
            expected = len(changed) / 9
            assert (np.abs(np.delete(counts, range(1, last_warp + 1)) / expected - 1) < 0.15).all()
            assert abs(np.corrcoef(before[~is_warp], changed)[0, 1]) < 0.03


def test_blur_is_that_of_the_same_picture(photos):
    """Twice the standard deviation at twice the size."""
    views = Views.of(
        transform(blur=1.0, blur_sigma=(2.0, 2.0), flip=0.0), {"teacher": FollowingView(follow=IMAGES, size=96)}
    )
    _, found = views_of(views, pieces(20, photos))
    half = found["teacher"].reshape(20, 3, 48, 2, 48, 2).mean(axis=(3, 5))
    assert np.abs(half - found[IMAGES])[..., 4:-4, 4:-4].mean() < 1.5


# Formats


def test_format_is_that_of_the_transform_unless_said():
    base = transform(interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), dtype="float16")
    views = Views.of(
        base,
        {
            "teacher": FollowingView(follow=IMAGES, size=72),
            "local": TrainView(size=24),
            "whole": EvalView(size=24, dtype="float32", mean=(0, 0, 0)),
            "other": FollowingView(follow="whole", size=32, std=(1, 1, 1), interpolation="bilinear"),
        },
    )
    for name in ("teacher", "local"):
        view = views[name]
        assert (view.normalize.mean, view.normalize.dtype) == (base.mean, "float16")
        assert view.crop.interpolation == "bicubic"
    whole, other = views["whole"], views["other"]
    assert (whole.normalize.mean, whole.normalize.std, whole.normalize.dtype) == ((0, 0, 0), base.std, "float32")
    assert (other.normalize.mean, other.normalize.std, other.crop.interpolation) == ((0, 0, 0), (1, 1, 1), "bilinear")
    _, found = views_of(views, coordinates(2))
    assert {name: view.dtype.name for name, view in found.items()} == {
        IMAGES: "float16", "teacher": "float16", "local": "float16", "whole": "float32", "other": "float32"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({IMAGES: TrainView(size=24)}, "'images' cannot be the name of a view; images is that of the transform"),
        ({"": TrainView(size=24)}, "'' cannot be the name of a view"),
        ({"a\nb": TrainView(size=24)}, r"'a\\nb' cannot be the name of a view"),
        (
            {"teacher": FollowingView(follow="imags", size=72)},
            "views.teacher.follow is 'imags', .* did you mean 'images'.*; these are images",
        ),
        (
            {"a": FollowingView(follow=IMAGES, size=72), "b": FollowingView(follow="a", size=72)},
            "views.b.follow is 'a', and a view follows images or one with a preset",
        ),
        (
            {"local": TrainView(size=24, orientation="stored")},
            "views.local.orientation is stored and that of transform upright, but each image is decoded once",
        ),
    ],
)
def test_impossible_views_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Views.of(transform(), settings)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"size": 24}, "a view needs `follow`, the name of another view, or `preset`"),
        ({"preset": "evil", "size": 24}, "preset"),
        ({"follow": "images"}, "size"),
        ({"follow": "images", "size": 24, "area": [0.1, 0.2]}, "area"),
        ({"preset": "train", "size": 24, "count": 0}, "count"),
    ],
)
def test_messages_of_bad_settings_name_the_key(value, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ViewSettings).validate_python(value)


def test_kinds_of_views_are_told_apart():
    adapter = TypeAdapter(ViewSettings)
    for value, kind in (
        ({"follow": "images", "size": 24}, FollowingView),
        ({"preset": "train", "size": 24, "count": 6}, TrainView),
        ({"preset": "eval", "size": 24}, EvalView),
    ):
        view = adapter.validate_python(value)
        assert type(view) is kind and adapter.validate_python(view) is view


# Mixing


def test_mixed_rectangles_are_the_same_at_another_size():
    settings = MixSettings(cutmix=1.0)
    draws = np.random.default_rng(0).random((200, settings.num_draws))
    plan = plan_mixing(settings, draws, np.ones(200, bool), size=(48, 64))
    mixing = torch.from_numpy(plan)
    assert at_size(mixing, (48, 64), (48, 64)) is mixing
    other = at_size(mixing, (48, 64), (72, 40))
    assert torch.equal(other[:, :2], mixing[:, :2])
    exact = mixing[:, 2:] * torch.tensor([72 / 48, 40 / 64] * 2)
    assert (other[:, 2:] - exact).abs().max() <= 0.5 and (other[:, 2:] >= 0).all()
    assert (other[:, [4, 5]] <= torch.tensor([72, 40])).all()
    twice = at_size(mixing, (48, 64), (96, 128))
    assert torch.equal(twice[:, 2:], 2 * mixing[:, 2:])
