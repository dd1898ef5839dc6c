"""Every op against torchvision's on photographs, and the distribution of ops and strengths."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from pydantic import ValidationError
from timm.data import auto_augment
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from kd_pipeline.data.auto_augment import OPS, AutoAugment, RandAugment, TrivialAugment, op_arguments
from kd_pipeline.data.plan import uniforms
from kd_pipeline.data.transforms import TrainTransform
from tests.views import PIXELS, render

SIZE = 128
RAND, TRIVIAL = RandAugment(), TrivialAugment()
SIGNED = OPS[1:10]
"""Ops with a direction."""
WEAK, STRONG = 0.42, 1.0


@pytest.fixture(scope="module")
def pieces(photos):
    """20 crops of the photographs, `[20, 128, 128, 3]`."""
    return np.stack([photos[n % 2][12 * n : 12 * n + SIZE, 20 * n : 20 * n + SIZE] for n in range(20)])


def apply(images, ops, strength, sign, policy=RAND, size=(SIZE, SIZE)):
    """One op on each image, by name."""
    op = np.array([OPS.index(name) for name in ops], dtype=np.float64)
    full = np.ones(len(op))
    arguments = op_arguments(op, strength * full, sign * full, policy.ranges(size), size)
    arrays = images, op.astype(np.float32), arguments.astype(np.float32)
    pipeline = Pipeline(batch_size=len(op), num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        nodes = fn.external_source(lambda: arrays, num_outputs=3, layout=["HWC", "", ""])
        pipeline.set_outputs(AutoAugment(RandAugment(num_ops=1), size).apply(*nodes))
    return pipeline.run()[0].as_array().astype(int)


def torchvision_op(images, name, strength, sign, policy, size=(SIZE, SIZE)):
    """The op of that name as torchvision's `RandAugment` and `TrivialAugmentWide` call it."""
    ranges, tensor = policy.ranges(size), torch.from_numpy(images).permute(0, 3, 1, 2)
    signed, factor = strength * sign, 1 + ranges.enhance * strength * sign
    slope = math.degrees(math.atan(ranges.shear * signed))
    shift_y, shift_x = (int(limit * signed) for limit in ranges.translate)
    warp = {"interpolation": InterpolationMode.BILINEAR, "fill": [128.0] * 3}
    still = {"angle": 0.0, "scale": 1.0, **warp}
    match name:
        case "identity":
            changed = tensor
        case "shear_x":
            changed = functional.affine(tensor, translate=[0, 0], shear=[slope, 0.0], center=[0, 0], **still)
        case "shear_y":
            changed = functional.affine(tensor, translate=[0, 0], shear=[0.0, slope], center=[0, 0], **still)
        case "translate_x":
            changed = functional.affine(tensor, translate=[shift_x, 0], shear=[0.0, 0.0], **still)
        case "translate_y":
            changed = functional.affine(tensor, translate=[0, shift_y], shear=[0.0, 0.0], **still)
        case "rotate":
            changed = functional.rotate(tensor, ranges.rotate * signed, **warp)
        case "brightness":
            changed = functional.adjust_brightness(tensor, factor)
        case "color":
            changed = functional.adjust_saturation(tensor, factor)
        case "contrast":
            changed = functional.adjust_contrast(tensor, factor)
        case "sharpness":
            changed = functional.adjust_sharpness(tensor, factor)
        case "posterize":
            changed = functional.posterize(tensor, 8 - round(ranges.posterize * strength))
        case "solarize":
            changed = functional.solarize(tensor, 255 * (1 - strength))
        case "autocontrast":
            changed = functional.autocontrast(tensor)
        case "equalize":
            changed = functional.equalize(tensor)
    return changed.permute(0, 2, 3, 1).numpy().astype(int)


# Settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "randaugment", "num_ops": 0}, "num_ops.*greater than or equal to 1"),
        ({"kind": "randaugment", "magnitude": 11}, "magnitude.*less than or equal to 10"),
        ({"kind": "randaugment", "magnitude": -1}, "magnitude.*greater than or equal to 0"),
        ({"kind": "randaugment", "magnitude_std": -1}, "magnitude_std.*greater than or equal to 0"),
        ({"kind": "trivialaugment", "magnitude": 9}, "magnitude.*not permitted"),
        ({"kind": "autoaugment"}, "autoaugment.*'randaugment', 'trivialaugment'"),
    ],
)
def test_wrong_settings_are_refused(values, words):
    with pytest.raises(ValidationError, match="(?s)" + words):
        TrainTransform(size=32, auto_augment=values)


def test_settings_json_round_trip():
    for policy in (RAND, TRIVIAL, RandAugment(num_ops=3, magnitude=5)):
        transform = TrainTransform(size=32, auto_augment=policy)
        assert TrainTransform.model_validate_json(transform.model_dump_json()) == transform


def test_randaugment_is_torchvisions_and_not_timms():
    """The same ops and ranges, but for the length of a translation; timm's list and its posterize are others."""
    ours, theirs = RAND.ranges((SIZE, SIZE)), transforms.RandAugment()._augmentation_space(31, (SIZE, SIZE))
    assert [name.lower().replace("_", "") for name in OPS] == [name.lower() for name in theirs]
    assert ours.shear == pytest.approx(float(theirs["ShearX"][0][-1]))
    assert ours.rotate == float(theirs["Rotate"][0][-1]) and ours.enhance == pytest.approx(
        float(theirs["Color"][0][-1])
    )
    assert (
        ours.translate == pytest.approx((0.45 * SIZE, 0.45 * SIZE))
        and float(theirs["TranslateX"][0][-1] / SIZE) > 0.453
    )
    assert 8 - round(ours.posterize * 0.9) == int(theirs["Posterize"][0][27]) == 4
    assert auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"](9, {}) == (1,)
    assert {"Invert", "SolarizeAdd"} < set(auto_augment._RAND_INCREASING_TRANSFORMS)


# The ops

ROUNDING = {"brightness": 1, "color": 3, "contrast": 2, "autocontrast": 1}
"""Levels of 255 by which an op may differ from torchvision's, which truncates; the other ops must be equal."""
CASES = [(RAND, WEAK, 1), (RAND, WEAK, -1), (RAND, STRONG, 1), (RAND, STRONG, -1), (TRIVIAL, STRONG, -1)]


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("sharpness", "equalize", *OPS[1:6])])
@pytest.mark.parametrize(("policy", "strength", "sign"), CASES)
def test_color_ops_match_torchvision(pieces, name, policy, strength, sign):
    difference = np.abs(
        apply(pieces, [name] * 20, strength, sign, policy) - torchvision_op(pieces, name, strength, sign, policy)
    )
    assert difference.max() <= ROUNDING.get(name, 0)


@pytest.mark.parametrize("name", OPS[1:6])
@pytest.mark.parametrize(("policy", "strength", "sign"), CASES)
def test_warps_match_torchvision_inside_the_image(pieces, name, policy, strength, sign):
    """At the edge, DALI and torchvision blend the last pixels into the gray differently."""
    check_warp(pieces, name, policy, strength, sign)


@pytest.mark.parametrize("name", OPS[1:6])
@pytest.mark.parametrize("size", [(80, 128), (128, 80)])
def test_warps_of_rectangles_match_torchvision(pieces, name, size):
    check_warp(np.ascontiguousarray(pieces[:, : size[0], : size[1]]), name, *CASES[0], size)


def check_warp(pieces, name, policy, strength, sign, size=(SIZE, SIZE)):
    ours = apply(pieces, [name] * 20, strength, sign, policy, size)
    difference = np.abs(ours - torchvision_op(pieces, name, strength, sign, policy, size))
    assert (difference > 2).mean() < 0.02 and np.median(difference) == 0 and difference.mean() < 0.5
    ends = apply(np.zeros_like(pieces), [name] * 20, strength, sign, policy, size)
    inside = np.ones((20, *size, 3), dtype=bool)
    for moves in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)):
        inside &= np.roll(ends, moves, axis=(1, 2)) == 0
    inside[:, [0, -1]], inside[:, :, [0, -1]] = False, False
    assert difference[inside].max() <= 2 and inside.mean() > 0.1


@pytest.mark.parametrize(("policy", "strength", "sign"), CASES)
def test_sharpness_matches_torchvision_inside(pieces, policy, strength, sign):
    ours = apply(pieces, ["sharpness"] * 20, strength, sign, policy)
    difference = np.abs(ours - torchvision_op(pieces, "sharpness", strength, sign, policy))
    assert difference[:, 1:-1, 1:-1].max() <= 1


def test_equalize_matches_opencv(pieces):
    """In the mean over photographs 4 levels of 255 away from torchvision's, which is Pillow's."""
    expected = np.empty(pieces.shape, dtype=int)
    for row, channel in product(range(20), range(3)):
        levels = pieces[row, :, :, channel]
        counts = np.bincount(levels.ravel(), minlength=256)
        above_first = np.cumsum(counts) - counts[levels.min()]
        expected[row, :, :, channel] = np.round(above_first * (255 / above_first[-1]))[levels]
    ours = apply(pieces, ["equalize"] * 20, 0.0, 1)
    assert np.abs(ours - expected).max() <= 1
    assert np.abs(ours - torchvision_op(pieces, "equalize", 0.0, 1, RAND)).mean() < 5


@pytest.mark.parametrize("name", OPS)
def test_ops_change_images_at_full_strength(pieces, name):
    dull = pieces // 2 + 20
    changed = (apply(dull, [name] * 20, STRONG, -1) != dull).any(axis=(1, 2, 3))
    assert changed.all() == (name != "identity") and changed.any() == changed.all()


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("solarize", "autocontrast", "equalize")])
def test_ops_without_strength_change_nothing(pieces, name):
    np.testing.assert_array_equal(apply(pieces, [name] * 20, 0.0, 1), pieces)


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast"])
def test_uniform_image_stays_uniform(name):
    plain = np.full((20, SIZE, SIZE, 3), (10, 128, 250), dtype=np.uint8)
    changed = apply(plain, [name] * 20, STRONG, 1)
    assert (np.ptp(changed, axis=(1, 2)) == 0).all()
    if name == "autocontrast":
        np.testing.assert_array_equal(changed, plain)


def test_each_image_gets_its_own_op(pieces):
    ops = [OPS[row % len(OPS)] for row in range(20)]
    together = apply(pieces, ops, WEAK, 1)
    for row, name in enumerate(ops):
        np.testing.assert_array_equal(together[row], apply(pieces[row : row + 1], [name], WEAK, 1)[0])


# Distributions


def chosen(policy, num_images=20_000):
    """Ops and arguments of many images, `[N]` and `[N, 9]` for each of the policy's ops."""
    op = AutoAugment(policy, (SIZE, SIZE))
    draws = uniforms(np.arange(num_images), seed=3, epoch=0, count=op.num_draws).astype(np.float64)
    return op.parameters(draws)


@pytest.mark.parametrize("policy", [RAND, RandAugment(num_ops=3), TRIVIAL])
def test_ops_are_uniform_and_independent(policy):
    parameters = chosen(policy)
    assert len(parameters) == 2 * policy.num_ops
    for op, numbers in zip(parameters[::2], parameters[1::2], strict=True):
        counts = Counter(op.tolist())
        assert sorted(counts) == list(range(len(OPS))) and numbers.shape == (20_000, 9)
        assert max(abs(count - 20_000 / 14) for count in counts.values()) < 4.5 * math.sqrt(20_000 / 14)
    if policy.num_ops > 1:
        assert abs(np.corrcoef(parameters[0], parameters[2])[0, 1]) < 0.03


@pytest.mark.parametrize(("magnitude", "std"), [(9.0, 0.5), (5.0, 1.0), (5.0, 0.0), (10.0, 2.0)])
def test_randaugment_strength_is_a_clipped_normal(magnitude, std):
    draws = uniforms(np.arange(20_000), seed=3, epoch=0, count=2).astype(np.float64)
    strengths = 10 * RandAugment(magnitude=magnitude, magnitude_std=std).strengths(draws)
    assert strengths.min() >= 0 and strengths.max() <= 10
    free = strengths < 10
    below = [np.mean(strengths < magnitude + sigmas * std) for sigmas in (-2, -1, 0)]
    if std:
        np.testing.assert_allclose(below, [0.0228, 0.1587, 0.5], atol=0.01)
        assert abs((~free).mean() - 0.5 * math.erfc((10 - magnitude) / std / math.sqrt(2))) < 0.01
    else:
        assert (strengths == magnitude).all()


def test_trivialaugment_has_31_uniform_strengths():
    draws = uniforms(np.arange(31_000), seed=3, epoch=0, count=2).astype(np.float64)
    counts = Counter(np.round(30 * TRIVIAL.strengths(draws), 6).tolist())
    assert sorted(counts) == list(range(31)) and max(abs(count - 1000) for count in counts.values()) < 150


@pytest.mark.parametrize("policy", [RAND, TRIVIAL])
def test_signs_are_uniform(policy):
    op, numbers = chosen(policy)[:2]
    moved = numbers[op == OPS.index("translate_x"), 2]
    brightened = numbers[op == OPS.index("brightness"), 0]
    for share in ((moved > 0).mean() / (moved != 0).mean(), (brightened > 1).mean() / (brightened != 1).mean()):
        assert abs(share - 0.5) < 0.05


# In a transform


def test_off_by_default():
    assert len(TrainTransform(size=32).ops) == 1 and TrainTransform(size=32).num_draws == 23
    assert TrainTransform(size=32, hue=0.1).num_draws == 35


def test_parameters_of_other_ops_do_not_change():
    settings = {"size": 32, "hue": 0.1, "blur": 0.5, "erase": 0.5}
    alone, together = TrainTransform(**settings), TrainTransform(**settings, auto_augment=RAND)
    draws = [uniforms(np.arange(50), seed=5, epoch=2, count=each.num_draws).astype(float) for each in (alone, together)]
    assert isinstance(together.ops[0], AutoAugment) and together.ops[1:] == alone.ops
    for op in (alone.crop, *alone.ops):
        for ours, theirs in zip(op.parameters(draws[0]), op.parameters(draws[1]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("policy", [RAND, TRIVIAL])
def test_view_does_not_depend_on_batch(pieces, policy):
    transform = TrainTransform(size=48, auto_augment=policy, **PIXELS)
    draws = uniforms(np.arange(20), seed=1, epoch=0, count=transform.num_draws)
    together = render(transform, pieces, draws)
    assert (together != render(TrainTransform(size=48, **PIXELS), pieces, draws)).any(axis=(1, 2, 3)).mean() > 0.7
    for row in range(0, 20, 3):
        np.testing.assert_array_equal(render(transform, pieces[row : row + 1], draws[row : row + 1])[0], together[row])
    backwards = render(transform, np.ascontiguousarray(pieces[::-1]), draws[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


def test_num_draws_is_exact(pieces):
    transform = TrainTransform(size=48, auto_augment=RAND, **PIXELS)
    draws = uniforms(np.arange(20), seed=1, epoch=0, count=transform.num_draws)
    first = render(transform, pieces, draws)
    assert transform.num_draws == 48
    for slot in range(40, 48):
        other = draws.copy()
        other[:, slot] = (other[:, slot] + 0.5) % 1
        assert (render(transform, pieces, other) != first).any(), slot
