"""Each op, run by DALI on photographs, against its formula or its counterpart in torchvision."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms.v2 import functional as functional_v2

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline.data.ops import ColorJitter, GaussianBlur, Normalize, RandomErasing
from kd_pipeline.data.plan import uniforms
from kd_pipeline.data.transforms import EvalTransform, TrainTransform, TransformSettings
from tests.views import PIXELS, render

POSITION, FLIP, AREA, RATIO = slice(0, 2), 2, slice(3, 13), slice(13, 23)
"""Slots of a view's uniform numbers."""
EVERYTHING = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.3, blur=0.5, erase=0.5)


@pytest.fixture(scope="module")
def pieces(photos):
    """40 crops of the photographs, `[40, 60, 80, 3]`."""
    rng = np.random.default_rng(4)
    corners = zip(rng.integers(0, 427 - 60, 40), rng.integers(0, 640 - 80, 40), strict=True)
    return np.stack([photos[n % 2][y : y + 60, x : x + 80] for n, (y, x) in enumerate(corners)])


@pytest.fixture(scope="module")
def lossless(photos):
    """The photographs at half and a third of their size, with no trace of JPEG: every second or third pixel.

    Smooth pixels, as JPEG leaves them, hide what distinguishes two ways to resize.
    """
    return [np.ascontiguousarray(photo[::step, ::step]) for step in (2, 3) for photo in photos]


def run_dali(define, *arrays, layout=""):
    """Run the graph that `define` makes of the arrays; return a list of samples for each output."""
    pipeline = Pipeline(batch_size=len(arrays[0]), num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        nodes = fn.external_source(
            lambda: arrays,
            num_outputs=len(arrays),
            ndim=[array.ndim - 1 for array in arrays],
            layout=[layout, *[""] * (len(arrays) - 1)],
        )
        pipeline.set_outputs(*define(*nodes))
    return [[np.array(sample) for sample in output] for output in pipeline.run()]


def apply(op, images, *parameters):
    """Apply an op to uint8 images `[N, H, W, 3]`, each with its parameters."""
    arrays = [np.array(parameter) for parameter in parameters]
    arrays = [array if array.dtype == np.int32 else array.astype(np.float32) for array in arrays]
    (out,) = run_dali(lambda *nodes: [op.apply(*nodes)], images, *arrays, layout="HWC")
    return np.stack(out)


def windows(crop, height, width, draws):
    """`[N, 4]`: top, left, height and width of the windows in images of one size, in whole pixels."""
    sizes = np.tile(np.float64([height, width]), (len(draws), 1))
    corner, extent = crop.windows(sizes, *crop.parameters(draws))
    assert (corner == np.floor(corner)).all() and (extent == np.floor(extent)).all()
    assert (extent >= 1).all() and (corner >= 0).all() and (corner + extent <= [height, width]).all()
    return np.concatenate([corner, extent], axis=1)


def torchvision_window(height, width, draws, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """`RandomResizedCrop.get_params` with given random numbers; the last ones are the first try."""
    for area_draw, ratio_draw in zip(draws[AREA][::-1], draws[RATIO][::-1], strict=True):
        target = height * width * (area[0] + float(area_draw) * (area[1] - area[0]))
        shape = ratio[0] * (ratio[1] / ratio[0]) ** float(ratio_draw)
        crop_height, crop_width = round(math.sqrt(target / shape)), round(math.sqrt(target * shape))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            break
    else:
        crop_height = max(min(height, round(width / ratio[0])), 1)
        crop_width = max(min(width, round(height * ratio[1])), 1)
    free = np.array([height - crop_height, width - crop_width])
    return [*np.floor(draws[POSITION] * (free + 1)), crop_height, crop_width]


def kolmogorov_smirnov(ours, theirs):
    """Largest distance between the distribution functions of two samples."""
    places = np.union1d(ours, theirs)
    below = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(below[0] - below[1]).max()


def as_torch(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def as_numpy(image):
    return image.permute(1, 2, 0).numpy()


# Settings


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", 0, "greater than 0 .*input_value=0"),
        ("size", 2**40, "less than or equal to 8192"),
        ("size", 22.5, "integer.*input_value=22.5"),
        ("interpolation", "nearest", "bilinear.*input_value='nearest'"),
        ("dtype", "bfloat16", "float32.*input_value='bfloat16'"),
        ("std", (0.2, 0.0, 0.2), r"std\.1\n.*greater than 0 .*input_value=0.0"),
        ("std", (-0.2, 0.2, 0.2), r"std\.0\n.*greater than 0 .*input_value=-0.2"),
        ("mean", (0.5, 0.5), r"input_value=\(0.5, 0.5\)"),
        ("mean", (0.5, float("inf"), 0.5), "finite number.*input_value=inf"),
        ("area", (0.5, 0.1), r"area\n.*must be .* got \[0.5, 0.1\]"),
        ("area", (0.0, 1.0), r"area\n.*must be .* got \[0.0, 1.0\]"),
        ("area", (0.5, 1.5), r"area\.1\n.*less than or equal to 1 .*input_value=1.5"),
        ("ratio", (2.0, 1.0), r"ratio\n.*must be .* got \[2.0, 1.0\]"),
        ("ratio", (0.0, 2.0), r"ratio\n.*must be .* got \[0.0, 2.0\]"),
        ("flip", 1.5, r"less than or equal to 1 .*input_value=1.5"),
        ("brightness", -0.1, "greater than or equal to 0 .*input_value=-0.1"),
        ("contrast", -0.1, "greater than or equal to 0 .*input_value=-0.1"),
        ("saturation", -0.1, "greater than or equal to 0 .*input_value=-0.1"),
        ("hue", -0.1, "greater than or equal to 0 .*input_value=-0.1"),
        ("hue", 0.6, r"less than or equal to 0.5 .*input_value=0.6"),
        ("grayscale", -1.0, "greater than or equal to 0 .*input_value=-1.0"),
        ("blur", 2.0, r"less than or equal to 1 .*input_value=2.0"),
        ("blur_sigma", (2.0, 0.1), r"blur_sigma\n.*must be .* got \[2.0, 0.1\]"),
        ("blur_sigma", (0.0, 2.0), r"blur_sigma\n.*must be .* got \[0.0, 2.0\]"),
        ("erase", -0.5, "greater than or equal to 0 .*input_value=-0.5"),
        ("erase_area", (0.5, 0.1), r"erase_area\n.*must be .* got \[0.5, 0.1\]"),
        ("erase_area", (0.02, 2.0), r"erase_area\.1\n.*less than or equal to 1 .*input_value=2.0"),
        ("erase_ratio", (3.3, 0.3), r"erase_ratio\n.*must be .* got \[3.3, 0.3\]"),
        ("rotate", 10, "not permitted .*input_value=10"),
    ],
)
def test_wrong_train_settings_are_refused(field, value, words):
    with pytest.raises(ValidationError, match=words) as caught:
        TrainTransform(**{"size": 32, field: value})
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", -1, "greater than 0 .*input_value=-1"),
        ("size", (32, 0), r"size.*\.1\n.*greater than 0 .*input_value=0"),
        ("size", (32, 48, 64), "size"),
        ("resize", 0, "greater than 0 .*input_value=0"),
        ("resize", 31, "resize must be at least size, got resize 31 for size 32"),
        ("std", (0.0, 1.0, 1.0), r"std\.0\n.*greater than 0 .*input_value=0.0"),
        ("flip", 0.5, "not permitted .*input_value=0.5"),
    ],
)
def test_wrong_eval_settings_are_refused(field, value, words):
    with pytest.raises(ValidationError, match=words) as caught:
        EvalTransform(**{"size": 32, field: value})
    assert field in str(caught.value)


def test_preset_selects_the_settings():
    adapter = TypeAdapter(TransformSettings)
    assert adapter.validate_python({"preset": "train", "size": 32}) == TrainTransform(size=32)
    assert adapter.validate_python({"preset": "eval", "size": 32}) == EvalTransform(size=32)
    with pytest.raises(ValidationError, match="preset"):
        adapter.validate_python({"preset": "validation", "size": 32})


@pytest.mark.parametrize("transform", [TrainTransform(size=32, **EVERYTHING), EvalTransform(size=32, resize=40)])
def test_settings_json_round_trip(transform):
    assert type(transform).model_validate_json(transform.model_dump_json()) == transform


def test_default_resize():
    assert EvalTransform(size=224).crop.shorter == 256
    assert EvalTransform(size=32).crop.shorter == 37
    assert EvalTransform(size=32, resize=36).crop.shorter == 36


def test_ops_without_effect_are_left_out():
    for plain in (TrainTransform(size=32), EvalTransform(size=32)):
        assert [type(op) for op in plain.ops] == [Normalize]
    for name, strength in EVERYTHING.items():
        assert len(TrainTransform(size=32, **{name: strength}).ops) == 2


# Where the crop is


SHAPES = [(375, 500), (97, 131), (224, 224), (32, 32), (8, 8), (3, 3), (1, 1), (4, 3)]
PANORAMAS = [(1000, 100), (100, 1000), (3000, 1), (1, 3000)]


@pytest.mark.parametrize(("height", "width"), SHAPES + PANORAMAS)
def test_crop_is_first_fitting_try_or_largest(height, width):
    draws = uniforms(np.arange(1000), seed=6, epoch=0, count=23).astype(np.float64)
    expected = [torchvision_window(height, width, row) for row in draws]
    np.testing.assert_array_equal(windows(TrainTransform(size=32).crop, height, width, draws), expected)


@pytest.mark.parametrize("area", [(1.0, 1.0), (0.25, 0.25), (0.01, 0.01)])
@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.5, 0.6), (0.1, 10.0)])
def test_crop_follows_settings(area, ratio):
    draws = uniforms(np.arange(200), seed=7, epoch=0, count=23).astype(np.float64)
    crop = TrainTransform(size=32, area=area, ratio=ratio).crop
    for height, width in [(100, 100), (60, 90), (33, 20)]:
        expected = [torchvision_window(height, width, row, area, ratio) for row in draws]
        np.testing.assert_array_equal(windows(crop, height, width, draws), expected)


def test_crop_is_at_least_one_pixel():
    draws = uniforms(np.arange(50), seed=7, epoch=0, count=23)
    crop = TrainTransform(size=32, area=(1e-6, 1e-6)).crop
    assert (windows(crop, 60, 90, draws)[:, 2:] == 1).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (8, 8), (1000, 100), (100, 1000)])
def test_crop_distribution_matches_torchvision(height, width):
    """Bound: 5 % of pairs of samples from one distribution are further apart than 1.36 * sqrt(2 / 4000) = 0.030."""
    draws = uniforms(np.arange(4000), seed=1, epoch=0, count=23)
    top, left, crop_height, crop_width = windows(TrainTransform(size=32).crop, height, width, draws).T
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [
            transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(len(draws))
        ]
    their_top, their_left, their_height, their_width = np.array(theirs, dtype=np.float64).T
    pairs = {
        "area": (crop_height * crop_width, their_height * their_width),
        "ratio": (crop_width / crop_height, their_width / their_height),
    }
    if 3 / 4 <= width / height <= 4 / 3:  # in longer images torchvision takes the middle where no try fits
        pairs |= {"top": (top, their_top), "left": (left, their_left)}
    distances = {name: kolmogorov_smirnov(*pair) for name, pair in pairs.items()}
    assert max(distances.values()) < 0.030, distances


def test_crop_of_a_panorama_is_anywhere():
    draws = uniforms(np.arange(2000), seed=1, epoch=0, count=23)
    _, left, _, width = windows(TrainTransform(size=32).crop, 10, 1000, draws).T
    assert left.min() < 20 and (left + width).max() > 980 and abs((left + width / 2).mean() - 500) < 30


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_train_view_matches_torchvision_resized_crop(lossless, tmp_path, interpolation):
    """NumPy's cut and torchvision's antialiased resize in float32: 0.7 of 255 levels, except near the border.

    Where the filter reaches beyond the window, which is two of the larger pixels, DALI repeats the last pixels and
    torchvision leaves them out.
    """
    shapes = [(213, 320), (133, 200), (61, 97), (97, 61), (200, 20)]
    images = [lossless[n % 2][:height, :width] for n, (height, width) in enumerate(shapes)]
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    transform = TrainTransform(size=48, interpolation=interpolation, flip=0.0, **PIXELS)
    mode = InterpolationMode(interpolation)
    for epoch in range(4):
        draws = uniforms(np.arange(len(images)), seed=8, epoch=epoch, count=transform.num_draws)
        for image, view, row in zip(images, render(transform, paths, draws), draws, strict=True):
            top, left, height, width = (int(number) for number in torchvision_window(*image.shape[:2], row))
            cut = as_torch(image[top : top + height, left : left + width]).float()
            expected = functional.resize(cut, [48, 48], mode, antialias=True).clamp(0, 255).numpy()
            difference = np.abs(view - expected)
            y, x = (math.ceil(2 * max(1, 48 / extent)) for extent in (height, width))
            assert difference[:, y : 48 - y, x : 48 - x].max(initial=0) < 0.7 and difference.mean() < 0.5


@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_crop_is_pixel_exact(tmp_path, stores):
    """Windows have the size of the view, so no resize hides which rows and columns they contain."""
    rows, columns = np.mgrid[:40, :50].astype(np.uint8)
    image = np.stack([rows, columns, rows + columns], axis=-1)
    Image.fromarray(image).save(tmp_path / "places.png")
    share = 20 * 20 / (40 * 50)
    transform = TrainTransform(size=20, area=(share, share), ratio=(1.0, 1.0), flip=0.0, **PIXELS)
    draws = uniforms(np.arange(100), seed=3, epoch=0, count=transform.num_draws)
    views = render(transform, [tmp_path / "places.png"] * 100 if stores == "files" else np.stack([image] * 100), draws)
    for view, (top, left) in zip(views, np.floor(draws[:, POSITION] * [21, 31]).astype(int), strict=True):
        np.testing.assert_array_equal(view.transpose(1, 2, 0), image[top : top + 20, left : left + 20])


# Ops are independent


@pytest.mark.parametrize("name", ["brightness", "blur", "erase", "flip"])
def test_ops_do_not_change_each_others_parameters(name):
    """The parameters of each op are the same alone and with all other ops."""
    index = np.arange(50)
    together = TrainTransform(size=32, **EVERYTHING)
    jitter = {key: value for key, value in EVERYTHING.items() if key not in ("blur", "erase")}
    own = {"brightness": jitter, "blur": {"blur": 0.5}, "erase": {"erase": 0.5}, "flip": {}}[name]
    alone = TrainTransform(size=32, **own)
    pairs = [(alone.crop, together.crop)]
    pairs += [(op, other) for op, other in product(alone.ops, together.ops) if type(op) is type(other)]
    assert len(pairs) == (2 if name == "flip" else 3)
    draws = [uniforms(index, seed=5, epoch=2, count=transform.num_draws) for transform in (alone, together)]
    for op, other in pairs:
        for ours, theirs in zip(op.parameters(draws[0]), other.parameters(draws[1]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_ops_leave_other_images_unchanged(pieces):
    plain = render(TrainTransform(size=32), pieces)
    changed = render(TrainTransform(size=32, erase=0.5), pieces) != plain
    erased = changed.any(axis=(1, 2, 3))
    assert 10 < erased.sum() < 30
    for rows, columns in (np.nonzero(view.any(axis=0)) for view in changed[erased]):
        # At least a fiftieth of the view, and hardly a third: the rest of it is untouched.
        assert 10 < (np.ptp(rows) + 1) * (np.ptp(columns) + 1) <= 32 * 32 / 3 + 32
    blurred = (render(TrainTransform(size=32, blur=0.5), pieces) != plain).any(axis=(1, 2, 3))
    assert 10 < blurred.sum() < 30 and (blurred != erased).any()
    weak = TrainTransform(size=32, brightness=1e-6, hue=1e-6)
    np.testing.assert_array_equal(render(weak, pieces), plain)


def test_num_draws_is_exact(pieces):
    transform = TrainTransform(size=32, **EVERYTHING)
    draws = uniforms(np.arange(len(pieces)), seed=0, epoch=0, count=transform.num_draws + 5)
    first = render(transform, pieces, draws[:, :-5])
    np.testing.assert_array_equal(render(transform, pieces, draws), first)
    # Of the tries, the first nearly always fits; in these pieces it is the last pair of numbers.
    for slot in [0, 1, FLIP, AREA.stop - 1, RATIO.stop - 1, *range(RATIO.stop, transform.num_draws)]:
        other = draws.copy()
        other[:, slot] = 1 - other[:, slot]
        assert (render(transform, pieces, other) != first).any(), slot


# Flip


def test_flip_is_exact(pieces):
    never, always = (render(TrainTransform(size=32, flip=probability), pieces) for probability in (0.0, 1.0))
    np.testing.assert_array_equal(always, never[..., ::-1])
    assert (always != never).any(axis=(1, 2, 3)).all()


def test_flip_follows_its_draw(pieces):
    transform = TrainTransform(size=32, flip=0.3)
    draws = uniforms(np.arange(len(pieces)), seed=0, epoch=0, count=transform.num_draws)
    never, some = render(TrainTransform(size=32, flip=0.0), pieces, draws), render(transform, pieces, draws)
    flipped = draws[:, FLIP] < 0.3
    assert 0 < flipped.sum() < len(pieces)
    np.testing.assert_array_equal(some, np.where(flipped[:, None, None, None], never[..., ::-1], never))


# Color

JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2)


def jittered(images, *, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    """As signed integers, for differences."""
    rows = [np.full(len(images), value) for value in (brightness, contrast, saturation, hue)]
    return apply(JITTER, images, *rows).astype(int)


def test_neutral_color_jitter_changes_nothing(pieces):
    assert np.abs(jittered(pieces) - pieces).max() == 0
    for hue in (360, -360):
        assert np.abs(jittered(pieces, hue=hue) - pieces).max() <= 1


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4, 2.0])
def test_brightness_and_saturation_match_torchvision(pieces, factor):
    """Rounded where torchvision cuts fractions off: at most 0.8 of 255 away in the mean, and 2 anywhere."""
    for name, theirs in [("brightness", functional.adjust_brightness), ("saturation", functional.adjust_saturation)]:
        expected = np.stack([as_numpy(theirs(as_torch(image), factor)) for image in pieces])
        difference = np.abs(jittered(pieces, **{name: factor}) - expected)
        assert difference.mean() < 0.8 and difference.max() <= 2, name


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_contrast_scales_around_mid_gray(pieces, factor):
    expected = np.clip((pieces - 128.0) * factor + 128, 0, 255)
    assert np.abs(jittered(pieces, contrast=factor) - expected).max() <= 0.51


def test_hue_rotates_like_torchvision():
    """By a third of a circle red becomes green, green blue and blue red, in DALI's YIQ circle as in HSV's."""
    primaries = np.array([[[[200, 50, 50], [50, 200, 50], [50, 50, 200]]]], dtype=np.uint8)
    assert jittered(primaries, hue=120).argmax(axis=-1).tolist() == [[[1, 2, 0]]]
    assert as_numpy(functional.adjust_hue(as_torch(primaries[0]), 1 / 3)).argmax(axis=-1).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("part", [-0.1, -0.05, 0.05, 0.1])
def test_hue_is_a_linear_map(pieces, part):
    """It goes in torchvision's direction, but is not its shift of HSV."""
    shifted = {
        sign: np.stack([as_numpy(functional.adjust_hue(as_torch(image), sign * part)) for image in pieces])
        for sign in (1, -1)
    }
    ours = jittered(pieces, hue=360 * part)
    difference, opposite = (np.abs(ours - shifted[sign]) for sign in (1, -1))
    assert 100 * abs(part) < difference.mean() < 200 * abs(part) and difference.max() < 100
    assert difference.mean() < 0.7 * opposite.mean()


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_contrast_differs_from_torchvision(pieces, factor):
    """The two scale around different grays."""
    expected = np.stack([as_numpy(functional.adjust_contrast(as_torch(image), factor)) for image in pieces]).astype(int)
    difference = np.abs(jittered(pieces, contrast=factor) - expected)
    assert 10 < difference.mean() < 25 and difference.max() < 60


def test_color_jitter_is_contrast_then_brightness(pieces):
    expected = np.clip(((pieces - 128.0) * 0.7 + 128) * 1.3, 0, 255)
    assert np.abs(jittered(pieces, brightness=1.3, contrast=0.7) - expected).max() <= 0.51


def test_grayscale_matches_pillow(pieces):
    """Up to one level of 255, as each channel is rounded by itself."""
    gray = jittered(pieces, saturation=0)
    assert np.ptp(gray, axis=-1).max() <= 1
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in pieces])
    assert np.abs(gray - expected[..., None].astype(int)).max() <= 2


def test_color_factors_are_uniform_and_not_negative():
    draws = uniforms(np.arange(20_000), seed=2, epoch=0, count=35)
    brightness, contrast, saturation, hue = ColorJitter(0.4, 0.2, 0.1, 0.05, 0.0).parameters(draws)
    for factor, strength in [(brightness - 1, 0.4), (contrast - 1, 0.2), (saturation - 1, 0.1), (hue, 18)]:
        assert abs(factor.mean()) < 0.02 * strength and -strength <= factor.min() < factor.max() <= strength
        assert abs(factor.std() - strength / math.sqrt(3)) < 0.02 * strength
    strong = ColorJitter(3.0, 3.0, 3.0, 0.5, 0.25).parameters(draws)
    assert min(factor.min() for factor in strong[:3]) == 0
    untouched = ColorJitter(0.0, 0.0, 0.0, 0.0, 0.25).parameters(draws)
    assert (untouched[0] == 1).all() and (untouched[3] == 0).all()
    assert set(untouched[2]) == {0, 1} and abs((untouched[2] == 0).mean() - 0.25) < 0.02


# Blur


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_matches_torchvision(pieces, sigma):
    blur = GaussianBlur(0.5, (sigma, sigma))
    draws = uniforms(np.arange(len(pieces)), seed=0, epoch=0, count=35)
    sigmas, sides = blur.parameters(draws)
    assert set(sides) == {1, 2 * math.ceil(3 * sigma) + 1} and np.allclose(sigmas, sigma)
    expected = pieces.copy()
    for row in np.nonzero(sides > 1)[0]:
        expected[row] = as_numpy(functional.gaussian_blur(as_torch(pieces[row]), int(sides[row]), sigma))
    difference = np.abs(apply(blur, pieces, sigmas, sides).astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.001 and (difference[sides == 1] == 0).all()


def test_blur_sigma_and_frequency():
    draws = uniforms(np.arange(20_000), seed=2, epoch=0, count=35)
    sigmas, sides = GaussianBlur(0.3, (0.5, 1.5)).parameters(draws)
    assert 0.5 <= sigmas.min() < 0.51 and 1.49 < sigmas.max() <= 1.5 and abs(sigmas.mean() - 1) < 0.01
    assert abs((sides > 1).mean() - 0.3) < 0.02


@pytest.mark.parametrize(("sigma", "window"), [(28, 169), (28.1, 169), (1000, 169)])
def test_blur_has_windows_that_a_gpu_takes(sigma, window):
    _, sides = GaussianBlur(1.0, (sigma, sigma)).parameters(uniforms(np.arange(4), seed=0, epoch=0, count=35))
    assert set(sides) == {window} and 3 * window < 510


@pytest.mark.parametrize("size", [1, 2, 8])
def test_blur_may_be_wider_than_the_view(pieces, size):
    views = render(TrainTransform(size=size, blur=1.0, blur_sigma=(10.0, 10.0), **PIXELS), pieces)
    assert views.shape == (40, 3, size, size) and (np.ptp(views, axis=(2, 3)) < 20).all()


# Erasing


def test_erasing_is_pixel_exact():
    image = np.full((3, 40, 50, 3), 255, dtype=np.uint8)
    erasing = RandomErasing(0.5, (0.02, 0.33), (0.3, 3.3), (40, 50), (0.0, 0.0, 0.0))
    erased = apply(erasing, image, [[0, 0], [5, 12], [7, 9]], [[40, 50], [30, 8], [0, 0]]) == 0
    expected = np.zeros_like(erased)
    expected[0] = True
    expected[1, 5:35, 12:20] = True
    np.testing.assert_array_equal(erased, expected)


def test_erased_pixels_are_zero_after_normalizing(pieces):
    """To half a level of 255, which is what uint8 can hold."""
    transform = TrainTransform(size=32, erase=1.0, erase_area=(1.0, 1.0), erase_ratio=(1.0, 1.0))
    views = render(transform, pieces) * np.reshape(IMAGENET_STD, (3, 1, 1)) * 255
    assert np.abs(views).max() <= 0.501


def test_erased_area_ratio_and_position():
    draws = uniforms(np.arange(20_000), seed=2, epoch=0, count=35)
    corner, extent = RandomErasing(0.4, (0.05, 0.2), (0.5, 2.0), (100, 100), IMAGENET_MEAN).parameters(draws)
    hit = extent.all(axis=1)
    assert abs(hit.mean() - 0.4) < 0.02 and (extent[~hit] == 0).all()
    corner, extent = corner[hit], extent[hit]
    assert (corner >= 0).all() and (extent >= 1).all() and (corner + extent <= 100).all()
    assert (corner == np.floor(corner)).all() and (extent == np.round(extent)).all()
    area, log_ratio = extent.prod(axis=1) / 100**2, np.log(extent[:, 1] / extent[:, 0])
    assert 0.045 < area.min() < area.max() < 0.21 and abs(area.mean() - 0.125) < 0.003
    assert np.abs(log_ratio).max() < 0.75 and abs(log_ratio.mean()) < 0.02
    for position in (corner / (100 - extent)).T:
        assert position.min() == 0 and position.max() == 1 and abs(position.mean() - 0.5) < 0.02


@pytest.mark.parametrize("size", [1, 2, 3])
def test_erasing_from_tiny_views(pieces, size):
    assert render(TrainTransform(size=size, erase=1.0), pieces).shape == (40, 3, size, size)


def test_rectangle_is_erased_within_a_rectangle():
    draws = uniforms(np.arange(5000), seed=2, epoch=0, count=35)
    corner, extent = RandomErasing(1.0, (0.05, 0.2), (0.5, 2.0), (60, 150), IMAGENET_MEAN).parameters(draws)
    assert (corner >= 0).all() and (corner + extent).max(axis=0).tolist() == [60, 150]
    area = extent.prod(axis=1) / (60 * 150)
    assert 0.045 < area.min() < area.max() < 0.21 and abs(area.mean() - 0.125) < 0.003


# Normalize


@pytest.mark.parametrize("preset", [TrainTransform, EvalTransform])
def test_normalize(pieces, preset):
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.4, 0.8)
    pixels = render(preset(size=24, **PIXELS), pieces)
    views = render(preset(size=24, mean=mean, std=std), pieces)
    assert views.dtype == np.float32 and views.shape == (40, 3, 24, 24)
    expected = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(views, expected, atol=2e-6)


@pytest.mark.parametrize("preset", [TrainTransform, EvalTransform])
def test_float16_views_are_rounded_float32_views(pieces, preset):
    half, single = (render(preset(size=24, dtype=dtype), pieces) for dtype in ("float16", "float32"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, single, rtol=2**-10, atol=2**-14)


# Rectangles


def test_square_may_be_one_number_or_two():
    assert TrainTransform(size=(32, 32)) == TrainTransform(size=32)
    assert EvalTransform(size=(32, 32)).model_dump() == EvalTransform(size=32).model_dump()


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (1, 9)])
def test_rectangle_is_height_and_width(pieces, size):
    everything = TrainTransform(size=size, **EVERYTHING, auto_augment={"kind": "randaugment"})
    for transform in (everything, TrainTransform(size=size), EvalTransform(size=size)):
        assert transform.image_shape == (3, *size) and render(transform, pieces).shape == (40, 3, *size)


@pytest.mark.parametrize("size", [(24, 40), (57, 31)])
def test_window_is_stretched_to_a_rectangle_as_by_torchvision(pieces, size):
    whole = TrainTransform(size=size, area=(1.0, 1.0), ratio=(80 / 60, 80 / 60), flip=0.0, **PIXELS)
    images = torch.from_numpy(pieces).permute(0, 3, 1, 2).float()
    expected = functional.resize(images, [*size], antialias=True).numpy()
    difference = np.abs(render(whole, pieces) - expected)
    assert difference[:, :, 3:-3, 3:-3].max() < 0.7 and difference.mean() < 0.5  # the border as for squares


@pytest.mark.parametrize(("size", "resize"), [((96, 160), 110), ((160, 96), 105), ((31, 97), 50)])
def test_eval_rectangle_is_the_center_of_a_covering_resize(varied, size, resize):
    """The image is resized to cover the rectangle of that shorter side, as in timm, and cropped."""
    views = render(EvalTransform(size=size, resize=resize, **PIXELS), varied)
    for path, view in zip(varied, views, strict=True):
        with Image.open(path) as image:
            pixels = as_torch(np.asarray(image)).float()
        height, width = (round(resize * side / min(size)) for side in size)
        if pixels.shape[1] * width <= height * pixels.shape[2]:
            resized = [height, int(height * pixels.shape[2] / pixels.shape[1])]
        else:
            resized = [int(width * pixels.shape[1] / pixels.shape[2]), width]
        resized = [max(*pair) for pair in zip(resized, (height, width), strict=True)]
        expected = functional.center_crop(functional.resize(pixels, resized, antialias=True), [*size]).numpy()
        assert np.abs(view - expected).max() < 0.7


def test_resize_must_cover_a_rectangle():
    with pytest.raises(ValidationError, match="got resize 23 for size 24"):
        EvalTransform(size=(40, 24), resize=23)


# Evaluation


def torchvision_view(image, size, resize, interpolation, functional=functional):
    """`[3, size, size]` of a PIL image or a tensor, in levels of 255."""
    mode = InterpolationMode(interpolation)
    view = functional.center_crop(functional.resize(image, [resize], mode, antialias=True), [size])
    if isinstance(view, Image.Image):
        return np.asarray(view).transpose(2, 0, 1).astype(np.float64)
    return view.clamp(0, 255).double().numpy()


@pytest.fixture(scope="module")
def varied(photos, lossless, tmp_path_factory):
    """The photographs and 16 pieces of them with sides from 33 to 400 pixels, JPEG; four lossless ones, PNG."""
    folder = tmp_path_factory.mktemp("varied")
    rng = np.random.default_rng(12)
    paths = []
    for number in range(18):
        height, width = (427, 640) if number < 2 else rng.integers(33, 400, 2) // 2 * 2 + rng.integers(0, 2, 2)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(photos[number % 2][-height:, -width:]).save(paths[-1])
    for number, photo in enumerate(lossless):
        paths.append(folder / f"{number}.png")
        Image.fromarray(photo).save(paths[-1])
    return paths


SIZES = pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 36), (97, 113), (160, 182)])


@SIZES
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_matches_torchvision(varied, size, resize, interpolation):
    """In floating point, which is what torchvision computes for float tensors and, without v2, for uint8 tensors.

    Half a level of 255 is the rounding to uint8; bicubic adds up to 0.13.
    """
    views = render(EvalTransform(size=size, resize=resize, interpolation=interpolation, **PIXELS), varied)
    for path, view in zip(varied, views, strict=True):
        with Image.open(path) as image:
            pixels = as_torch(np.asarray(image))
        difference = np.abs(view - torchvision_view(pixels.float(), size, resize, interpolation))
        assert difference.max() < 0.65 and difference.mean() < 0.26
        difference = np.abs(view - torchvision_view(pixels, size, resize, interpolation))
        assert difference.max() < 1.01 and difference.mean() < 0.1


@SIZES
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_against_8_bit_resizes(varied, size, resize, interpolation):
    """Pillow, and torchvision's v2 on uint8 tensors, round and clip to 8 bits between the two passes of a resize.

    With bicubic, which overshoots at sharp edges, that costs up to 13 levels on lossless photographs, in less than 1 %
    of the values; ours is nearer to the resize in floating point there.
    """
    views = render(EvalTransform(size=size, resize=resize, interpolation=interpolation, **PIXELS), varied)
    largest = 0.0
    for path, view in zip(varied, views, strict=True):
        with Image.open(path) as image:
            pixels = as_torch(np.asarray(image))
            pillow = torchvision_view(image, size, resize, interpolation)
        exact = torchvision_view(pixels.float(), size, resize, interpolation)
        for eight_bit in (pillow, torchvision_view(pixels, size, resize, interpolation, functional=functional_v2)):
            difference = np.abs(view - eight_bit)
            largest = max(largest, difference.max())
            assert difference.mean() < 0.25
            if interpolation == "bilinear":
                assert difference.max() < 1.01
            else:
                is_far = difference > 1.01
                assert difference.max() < 16 and is_far.mean() < 0.01
                assert (np.abs(view - exact) < np.abs(eight_bit - exact))[is_far].all()
    assert interpolation == "bilinear" or largest > 1.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_border(varied, interpolation):
    """A crop of the full height or width shows the border, where DALI repeats the last pixels."""
    views = render(EvalTransform(size=64, resize=64, interpolation=interpolation, **PIXELS), varied)
    for path, view in zip(varied, views, strict=True):
        with Image.open(path) as image:
            exact = torchvision_view(as_torch(np.asarray(image)).float(), 64, 64, interpolation)
        difference = np.abs(view - exact)
        assert difference[:, 3:-3, 3:-3].max() < 0.7 and difference.max() < 40
