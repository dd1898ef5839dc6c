"""Ops of the user's own in the graph: where they stand, what they draw, and what is said about mistakes."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from kd_pipeline import FollowingView, ImageFolder, KDDataLoader, MixSettings, TrainTransform, TrainView
from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.plan import uniforms
from kd_pipeline.data.sources.masks.settings import FolderMasks
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError, StateError
from tests.mask_files import save_pair, some_masks
from tests.views import PIXELS

MODULE = "tests.own_ops"
SHIFT: dict[str, Any] = {"factory": f"{MODULE}:shift", "num_draws": 1}
EVERYTHING: dict[str, Any] = {
    **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.3, "blur": 0.5, "erase": 0.5},
    "auto_augment": {"kind": "randaugment"},
}
PRESET = ("auto_augment", "affine", "color", "blur", "erase")


def transform_of(order=None, **settings):
    return TrainTransform.model_validate({"size": 32, **PIXELS, "order": order, **settings})


def views_of(source, transform, epoch=1, **options):
    """The views of one epoch of all samples, by name, in the dataset's order."""
    options = {"batch_size": 16, "seed": 3, "shuffle": False, "device": "cpu", "plugins": [MODULE]} | options
    with KDDataLoader(source, transform, **options) as loader:
        loader.set_epoch(epoch)
        batches = [{IMAGES: batch.images, **batch.views} for batch in loader]
        return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in batches[0]}


def images_of(source, transform, **options):
    return views_of(source, transform, **options)[IMAGES]


def test_default_order_is_that_of_the_preset(photo_folder):
    assert transform_of(PRESET).order is None
    before = images_of(photo_folder, transform_of(PRESET, **EVERYTHING))
    np.testing.assert_array_equal(images_of(photo_folder, transform_of(**EVERYTHING)), before)
    names = [type(op).__name__ for op in transform_of(PRESET[::-1], **EVERYTHING).ops]
    assert names == ["RandomErasing", "GaussianBlur", "ColorJitter", "AutoAugment", "Normalize"]


def test_ops_are_applied_in_the_given_order(photo_folder):
    """What is erased first gets the color of a brighter mean, and what is erased last the mean itself."""
    settings = dict(erase=1.0, brightness=0.9, mean=(0.5, 0.5, 0.5))
    last = images_of(photo_folder, transform_of(("color", "erase"), **settings))
    first = images_of(photo_folder, transform_of(("erase", "color"), **settings))
    gray = 128 - 127.5
    is_erased = (last == gray).all(axis=1)
    assert is_erased.any(axis=(1, 2)).all()
    assert not (first == gray).all(axis=1)[is_erased].all()
    kept = ~np.broadcast_to(is_erased[:, None], last.shape)
    np.testing.assert_array_equal(first[kept], last[kept])


def test_own_op_gets_images_and_planned_numbers(photo_folder):
    plain = images_of(photo_folder, transform_of())
    changed = images_of(photo_folder, transform_of((SHIFT,)))
    (draws,) = Views.of(transform_of((SHIFT,))).draw(np.arange(37), seed=3, epoch=1)[IMAGES]
    amounts = draws[:, -1].astype(np.float32)
    assert len(np.unique(amounts)) == 37 and amounts.min() >= 0 and amounts.max() < 1
    wanted = np.clip(np.rint(plain + amounts[:, None, None, None] * np.float32(60)), 0, 255)
    assert np.abs(changed - wanted).max() <= 1 and (changed != plain).any(axis=(1, 2, 3)).all()
    named = uniforms(np.arange(37), seed=3, epoch=1, count=2, view=f"images\nop {MODULE}:shift")
    np.testing.assert_array_equal(amounts, named[:, 1])


def test_numbers_do_not_depend_on_other_ops_or_mixing(photo_folder):
    """Each own op draws alone what it draws among others, and preset ops draw what they draw without it."""
    blank = {"factory": f"{MODULE}:shift", "num_draws": 1, "name": "second", "kwargs": {"most": 0}}
    alone = images_of(photo_folder, transform_of((SHIFT,)))
    for order in ((blank, SHIFT), (SHIFT, blank)):
        np.testing.assert_array_equal(images_of(photo_folder, transform_of(order)), alone)
    plain = images_of(photo_folder, transform_of(**EVERYTHING))
    for place in range(5):
        order = (*PRESET[:place], blank, *PRESET[place:])
        np.testing.assert_array_equal(images_of(photo_folder, transform_of(order, **EVERYTHING)), plain)
    mix = MixSettings(mixup=0.8)
    source = {"mix": mix, "batch_size": 12, "last_batch": "drop"}
    mixed = [images_of(photo_folder, transform_of(order), **source) for order in (None, (blank,))]
    np.testing.assert_array_equal(*mixed)


def test_two_ops_of_one_function_draw_different_numbers(photo_folder):
    second = {**SHIFT, "name": "second"}
    first, other = (images_of(photo_folder, transform_of((op,))) for op in (SHIFT, second))
    assert (first != other).any(axis=(1, 2, 3)).sum() > 30  # some windows are white already


def test_probability_is_the_share_of_images(photo_folder):
    plain = images_of(photo_folder, transform_of())
    op = {"factory": f"{MODULE}:whiten", "probability": 0.4}
    white = images_of(photo_folder, transform_of((op,)))
    is_white = (white == 255).all(axis=(1, 2, 3))
    assert 5 < is_white.sum() < 26
    np.testing.assert_array_equal(white[~is_white], plain[~is_white])
    never = {**SHIFT, "probability": 0.0}
    np.testing.assert_array_equal(images_of(photo_folder, transform_of((never,))), plain)
    always, nearly = ({**SHIFT, "probability": probability} for probability in (1.0, 1 - 2**-30))
    pair = [images_of(photo_folder, transform_of((op,))) for op in (always, nearly)]
    np.testing.assert_array_equal(*pair)  # the numbers of the function stay the same


@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_images_depend_on_neither_batch_nor_resumption(photo_folder, photos, tmp_path, stores):
    order = ("color", {**SHIFT, "probability": 0.5}, {"factory": f"{MODULE}:mirror", "num_draws": 1})
    source: Any = photo_folder
    if stores == "pixels":
        source = tmp_path / "pixels.npy"
        np.save(source, np.stack([photos[n % 2][n : n + 64, n : n + 80] for n in range(37)]))
    transform = transform_of(order, brightness=0.4)
    together = images_of(source, transform, batch_size=37)
    np.testing.assert_array_equal(images_of(source, transform, batch_size=3), together)
    options: dict[str, Any] = dict(batch_size=8, seed=3, shuffle=False, device="cpu", plugins=[MODULE])
    with KDDataLoader(source, transform, **options) as loader:
        loader.set_epoch(1)
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
    with KDDataLoader(source, transform, **options) as loader:
        loader.load_state_dict(state)
        np.testing.assert_array_equal(next(iter(loader)).images, together[8:16])
    other = transform_of((*order[:2], {**order[2], "name": "renamed"}), brightness=0.4)
    with (
        KDDataLoader(source, other, **options) as loader,
        pytest.raises(StateError, match=r"transform\.order: .*→.*renamed"),
    ):
        loader.load_state_dict(state)


def test_following_view_has_the_same_ops_and_numbers(photo_folder):
    """Of the same windows at the same size, so equal ops give equal pixels."""
    white = {"factory": f"{MODULE}:whiten", "probability": 0.5}
    views = {
        name: FollowingView(follow="images", size=32, color=color, erase=erase)  # type: ignore[arg-type]
        for name, color, erase in [("shared", "shared", "shared"), ("own", "own", "own"), ("none", "none", "own")]
    }
    for settings in ({}, {"erase": 0.5, "brightness": 0.4}):
        order = (*(["color", "erase"] if settings else []), white)
        found = views_of(photo_folder, transform_of(order, **settings), views=views)
        np.testing.assert_array_equal(found["shared"], found[IMAGES])
        is_white = {name: (images == 255).all(axis=(1, 2, 3)) for name, images in found.items()}
        assert (is_white["own"] != is_white[IMAGES]).any() and 8 < is_white["own"].sum() < 29
        assert is_white["none"].sum() < 8 < is_white[IMAGES].sum()
        if not settings:
            np.testing.assert_array_equal(found["none"], images_of(photo_folder, transform_of()))


def test_op_that_moves_pixels_is_always_followed(photo_folder):
    mirror = {"factory": f"{MODULE}:mirror", "num_draws": 1, "changes": "positions"}
    for color in ("own", "none"):
        views = {"teacher": FollowingView(follow="images", size=32, color=color)}  # type: ignore[arg-type]
        found = views_of(photo_folder, transform_of((mirror, SHIFT)), views=views, mix=None)
        alone = views_of(photo_folder, transform_of((mirror,)))[IMAGES]
        if color == "none":
            np.testing.assert_array_equal(found["teacher"], alone)
        else:
            assert (found["teacher"] != found[IMAGES]).any(axis=(1, 2, 3)).sum() > 30
            shift = (found["teacher"] - alone).reshape(37, -1)
            assert np.median(np.ptp(shift, axis=1)) < 40  # one amount for all pixels, but where it is clipped


def test_view_of_its_own_has_its_own_order_and_numbers(photo_folder):
    own = TrainView.model_validate({"size": 32, "order": [SHIFT], "count": 2})
    found = views_of(photo_folder, transform_of((SHIFT,)), views={"local": own})
    copies = found["local"]
    assert copies.shape == (37, 2, 3, 32, 32)
    draws = Views.of(transform_of((SHIFT,)), {"local": own}).draw(np.arange(37), seed=3, epoch=1)
    amounts = np.stack([draws[IMAGES][0][:, -1], *(numbers[:, -1] for numbers in draws["local"])])
    assert len(np.unique(amounts)) == amounts.size


def test_op_may_depend_on_the_size(photo_folder):
    """Zooming twice at 64 and 32 pixels shows the same quarter."""
    views = {"small": FollowingView(follow="images", size=32)}
    transform = transform_of(({"factory": f"{MODULE}:zoom", "changes": "positions"},), size=64)
    found = views_of(photo_folder, transform, views=views)
    halved = found[IMAGES].reshape(37, 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert np.abs(halved - found["small"]).mean() < 6


def test_op_that_moves_pixels_is_refused_with_masks(tmp_path):
    for number, mask in enumerate(some_masks(4)):
        save_pair(tmp_path / "images", tmp_path / "masks", f"{number}", mask)
    source = ImageFolder(tmp_path / "images", classes=list("abcd"), masks=FolderMasks(root=tmp_path / "masks"))
    options = {"batch_size": 2, "device": "cpu", "plugins": [MODULE]}
    KDDataLoader(source, transform_of((SHIFT,)), **options).close()
    moving = transform_of(({"factory": f"{MODULE}:zoom", "changes": "positions"},))
    with pytest.raises(ConfigError, match=r"tests\.own_ops:zoom changes positions, and masks would not follow"):
        KDDataLoader(source, moving, **options)


def test_module_has_to_be_allowed(photo_folder):
    with pytest.raises(ConfigError, match=r"transform\.order: tests\.own_ops:shift .*--plugin tests\.own_ops"):
        KDDataLoader(photo_folder, transform_of((SHIFT,)), batch_size=4, device="cpu")
    local = TrainView.model_validate({"size": 16, "order": [{"factory": f"{MODULE}:none"}]})
    with pytest.raises(ConfigError, match=r"no function called 'none'; correct views\.local\.order"):
        KDDataLoader(photo_folder, transform_of(), views={"local": local}, batch_size=4, device="cpu", plugins=[MODULE])


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ({"factory": "shrunk"}, r"shrunk returned images \[8, 8, 3\] of uint8 for images \[32, 32, 3\] of uint8; keep"),
        ({"factory": "as_float"}, r"as_float returned images \[32, 32, 3\] of float for"),
        ({"factory": "noisy"}, r"noisy returned other pixels when it was run again .* \(num_draws\)"),
        ({"factory": "even_window"}, r"even_window fails on images .*: .*window should have odd length, got: 4"),
        ({"factory": "jittered"}, r"jittered fails on images .*\"Jitter\" not registered for cpu"),
        ({"factory": "two"}, r"two returned a tuple; return the DALI node"),
        ({"factory": "broken"}, r"broken failed \(KeyError: 'palette'\)"),
        ({"factory": "shift"}, r"shift failed \(TypeError: .*amount.*0 of random numbers \(num_draws\)"),
        ({**SHIFT, "kwargs": {"least": 3}}, r"shift failed \(TypeError: .*least.*kwargs \{'least': 3\}"),
    ],
)  # fmt: skip
def test_mistake_of_an_op_names_its_factory(photo_folder, op, words):
    op = {**op, "factory": f"{MODULE}:{op['factory'].rpartition(':')[2]}"}
    with pytest.raises(ConfigError, match=f"the op {MODULE}:{words}"):
        KDDataLoader(photo_folder, transform_of((op,)), batch_size=4, device="cpu", plugins=[MODULE])


def test_op_is_tried_at_the_size_of_each_view(photo_folder):
    order = ({"factory": f"{MODULE}:fixed_crop"},)
    images_of(photo_folder, transform_of(order))
    views = {"small": FollowingView(follow="images", size=24)}
    with pytest.raises(ConfigError, match=r"fixed_crop fails on images \[24, 24, 3\]"):
        images_of(photo_folder, transform_of(order), views=views)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"order": ["color", "color"]}, "order has color twice"),
        ({"order": [SHIFT, SHIFT]}, "tests.own_ops:shift twice.*different names"),
        ({"order": ["color"], "blur": 0.5, "erase": 0.5}, "order leaves out blur, erase"),
        ({"order": ["flip"]}, "'auto_augment', 'affine', 'color', 'blur' or 'erase'"),
        ({"order": [{"factory": "shift"}]}, "pattern"),
        ({"order": [{**SHIFT, "num_draws": 65}]}, "less than or equal to 64"),
    ],
)  # fmt: skip
def test_wrong_order_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        transform_of(**settings)
