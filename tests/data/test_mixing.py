"""Mixup and CutMix against their definitions: partners, weights, rectangles and labels."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import beta

from kd_pipeline.data.mixing import MixSettings, at_size, beta_quantiles, mix_images, mix_labels, plan_mixing
from kd_pipeline.data.plan import uniforms
from tests.on_gpu import DEVICE, OnGpu

PARTNER, WEIGHT, TOP, LEFT, BOTTOM, RIGHT = range(6)
ONE = 2**24
SIZE = 32
BOTH, MIXUP, CUTMIX = MixSettings(mixup=0.2, cutmix=1.0), MixSettings(mixup=0.2), MixSettings(cutmix=1.0)


def plan(settings, num_rows, *, valid=None, size=(SIZE, SIZE), **options):
    """The columns for samples 0 to `num_rows - 1`."""
    draws = uniforms(np.arange(num_rows), seed=4, epoch=1, count=settings.num_draws).astype(np.float64)
    return plan_mixing(settings, draws, np.ones(num_rows, dtype=bool) if valid is None else valid, size=size, **options)


def area(columns):
    """Fraction of the image that the partner's rectangle covers."""
    return (columns[:, BOTTOM] - columns[:, TOP]) * (columns[:, RIGHT] - columns[:, LEFT]) / SIZE**2


def ks_distance(values, distribution):
    """Kolmogorov-Smirnov distance between the values and a distribution function."""
    expected = distribution(np.sort(values))
    places = np.arange(len(values) + 1) / len(values)
    return max(np.abs(expected - places[1:]).max(), np.abs(expected - places[:-1]).max())


# Settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixup": -0.1}, "mixup.*greater than or equal to 0"),
        ({"cutmix": -1}, "cutmix.*greater than or equal to 0"),
        ({}, "mix needs mixup or cutmix above 0"),
        ({"mixup": 0.2, "probability": 1.1}, "probability.*less than or equal to 1"),
        ({"switch": -0.1}, "switch.*greater than or equal to 0"),
        ({"label_smoothing": 1.0}, "label_smoothing.*less than 1"),
        ({"mixup": 0.2, "prob": 0.5}, "prob.*not permitted"),
    ],
)
def test_wrong_settings_are_refused(values, words):
    with pytest.raises(ValidationError, match="(?s)" + words):
        MixSettings(**values)


# Weights and rectangles


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 1.5, 4.0, 50.0])
def test_beta_quantiles_match_scipy(alpha):
    probabilities = np.concatenate([np.linspace(0, 1, 10_001), [1e-6, 1 - 1e-6]])
    found = beta_quantiles(alpha, probabilities)
    assert (np.diff(found[:-2]) >= 0).all() and found[0] == 0 and found[10_000] == 1
    np.testing.assert_allclose(found, beta.ppf(probabilities, alpha, alpha), atol=2e-4)
    inside = (found > 1e-12) & (found < 1 - 1e-12)
    np.testing.assert_allclose(beta.cdf(found, alpha, alpha)[inside], probabilities[inside], atol=1e-4)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
def test_mixup_weights_follow_beta(alpha):
    """Bound: 1 % of samples are further away than 1.63 / sqrt(20000) = 0.0115."""
    columns = plan(MixSettings(mixup=alpha), 20_000)
    assert ks_distance(columns[:, WEIGHT] / ONE, lambda x: beta.cdf(x, alpha, alpha)) < 0.0115
    assert (area(columns) == 0).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_cutmix_areas_follow_beta(alpha):
    """For rectangles that are not clipped at the border, up to rounding to whole pixels."""
    size = 10_000
    columns = plan(MixSettings(cutmix=alpha), 20_000, size=(size, size))
    height, width = columns[:, BOTTOM] - columns[:, TOP], columns[:, RIGHT] - columns[:, LEFT]
    inside_y, inside_x = ((columns[:, first] > 0) & (columns[:, last] < size) for first, last in ((2, 4), (3, 5)))
    both = inside_y & inside_x
    assert both.sum() > 1000 and (height[both] == width[both]).all()
    draws = uniforms(np.arange(20_000), seed=4, epoch=1, count=40).astype(np.float64)
    wanted = size * np.sqrt(1 - beta_quantiles(alpha, draws[:, 37]))
    assert np.abs(height[inside_y] - wanted[inside_y]).max() <= 1 and (height <= wanted + 1).all()
    assert np.abs(width[inside_x] - wanted[inside_x]).max() <= 1 and (width <= wanted + 1).all()
    assert ks_distance((wanted / size) ** 2, lambda x: beta.cdf(x, alpha, alpha)) < 0.0115
    assert (columns[:, WEIGHT] == ONE).all()


def test_rectangles_of_other_than_square_images():
    """In 40 x 90 pixels: the rectangle has their aspect ratio, stays inside, and labels are its share of the pixels."""
    size = (40, 90)
    columns = plan(MixSettings(cutmix=1.0), 2000, size=size)
    height, width = columns[:, BOTTOM] - columns[:, TOP], columns[:, RIGHT] - columns[:, LEFT]
    assert (columns[:, [TOP, LEFT]] >= 0).all() and columns[:, BOTTOM].max() == 40 and columns[:, RIGHT].max() == 90
    inside = (columns[:, TOP] > 0) & (columns[:, LEFT] > 0) & (columns[:, BOTTOM] < 40) & (columns[:, RIGHT] < 90)
    assert inside.sum() > 100 and np.abs(height[inside] * 90 / 40 - width[inside]).max() < 90 / 40 + 1
    mixing, classes = torch.from_numpy(columns), torch.arange(2000) % 2
    weights = mix_labels(classes, mixing, num_classes=2, label_smoothing=0.0, size=size)
    mixed = mix_images(classes.double()[:, None, None, None].expand(2000, 1, 40, 90), mixing)
    torch.testing.assert_close(weights[:, 1], mixed.mean(dim=(1, 2, 3)).float())


def test_rectangle_centers_are_uniform():
    columns = plan(CUTMIX, 20_000)
    some = columns[area(columns) > 0]
    for first, last in ((TOP, BOTTOM), (LEFT, RIGHT)):
        assert (some[:, first] >= 0).all() and (some[:, last] <= SIZE).all() and (some[:, first] < some[:, last]).all()
        assert some[:, first].min() == 0 and some[:, last].max() == SIZE
        assert abs((some[:, first] + some[:, last]).mean() / 2 - SIZE / 2) < 0.5
    assert abs(np.corrcoef(some[:, TOP] + some[:, BOTTOM], some[:, LEFT] + some[:, RIGHT])[0, 1]) < 0.03


@pytest.mark.parametrize(("probability", "switch"), [(1.0, 0.5), (0.6, 0.2), (0.3, 1.0), (0.0, 0.5)])
def test_probability_and_switch(probability, switch):
    columns = plan(MixSettings(mixup=1.0, cutmix=1.0, probability=probability, switch=switch), 20_000)
    is_mixed, is_summed = columns[:, PARTNER] != np.arange(20_000), columns[:, WEIGHT] < ONE
    assert abs(is_mixed.mean() - probability) < 0.02
    assert abs(is_summed.mean() - probability * (1 - switch)) < 0.02
    assert (area(columns)[is_summed | ~is_mixed] == 0).all()


@pytest.mark.parametrize("switch", [0.0, 0.5, 1.0])
def test_switch_is_ignored_for_a_single_kind(switch):
    assert (area(plan(MixSettings(mixup=0.2, switch=switch), 1000)) == 0).all()
    assert (plan(MixSettings(cutmix=1.0, switch=switch), 1000)[:, WEIGHT] == ONE).all()


# Partners


def test_partners_are_neighbors():
    for settings in (BOTH, MIXUP, CUTMIX):
        assert plan(settings, 8)[:, PARTNER].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_partners_are_repeats_apart():
    assert plan(BOTH, 12, repeats=3)[:, PARTNER].tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    samples = np.repeat(np.arange(40), 4)
    assert (samples[plan(BOTH, 160, repeats=4)[:, PARTNER]] != samples).all()


@pytest.mark.parametrize(("num_rows", "repeats", "alone"), [(1, 1, [0]), (5, 1, [4]), (8, 3, [6, 7]), (10, 3, [7, 8])])
def test_row_without_partner_is_not_mixed(num_rows, repeats, alone):
    columns = plan(BOTH, num_rows, repeats=repeats)
    assert [row for row in range(num_rows) if columns[row, PARTNER] == row] == alone
    assert (columns[alone, WEIGHT] == ONE).all() and (area(columns)[alone] == 0).all()


def test_invalid_rows_are_not_mixed():
    valid = np.array([True, False, False, True, True, True, False, False])
    columns = plan(BOTH, 8, valid=valid)
    assert columns[:, PARTNER].tolist() == [0, 1, 2, 3, 5, 4, 6, 7]
    alone = [0, 1, 2, 3, 6, 7]
    assert (columns[alone, WEIGHT] == ONE).all() and (area(columns)[alone] == 0).all()


def test_pair_does_not_depend_on_other_rows():
    together = plan(BOTH, 40)
    draws = uniforms(np.arange(40), seed=4, epoch=1, count=BOTH.num_draws).astype(np.float64)
    for first in range(0, 40, 2):
        alone = plan_mixing(BOTH, draws[first : first + 2], np.ones(2, dtype=bool), size=(SIZE, SIZE))
        np.testing.assert_array_equal(alone[:, 1:], together[first : first + 2, 1:])


# Pixels and labels


@pytest.fixture(scope="module")
def views(photos):
    """64 normalized crops of the photographs, `[64, 3, 32, 32]`."""
    pieces = np.stack([photos[n % 2][5 * n : 5 * n + SIZE, 9 * n : 9 * n + SIZE] for n in range(64)])
    return torch.from_numpy(pieces).permute(0, 3, 1, 2).contiguous() / 128 - 1


@pytest.mark.parametrize("settings", [BOTH, MIXUP, CUTMIX, BOTH.model_copy(update={"probability": 0.5})])
def test_mixed_pixels(views, settings):
    columns = plan(settings, 64)
    expected = views.double().numpy().copy()
    for row, (partner, weight, top, left, bottom, right) in enumerate(columns):
        share = weight / ONE
        expected[row] = share * views[row].double().numpy() + (1 - share) * views[partner].double().numpy()
        expected[row, :, top:bottom, left:right] = views[partner, :, top:bottom, left:right]
    before = views.clone()
    mixed = mix_images(views, torch.from_numpy(columns))
    np.testing.assert_allclose(mixed.double().numpy(), expected, atol=1e-6)
    assert mixed.dtype == views.dtype and mixed.is_contiguous() and torch.equal(views, before)
    assert mixed.untyped_storage().data_ptr() != views.untyped_storage().data_ptr()


def test_unmixed_rows_and_rectangles_are_exact(views):
    columns = plan(MixSettings(cutmix=1.0, probability=0.5), 64)
    mixed = mix_images(views, torch.from_numpy(columns))
    for row, (partner, _, top, left, bottom, right) in enumerate(columns):
        expected = views[row].clone()
        expected[:, top:bottom, left:right] = views[partner, :, top:bottom, left:right]
        assert torch.equal(mixed[row], expected)


def test_float16_is_mixed_in_float16(views):
    columns = torch.from_numpy(plan(BOTH, 64))
    half = mix_images(views.half(), columns)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), mix_images(views, columns), rtol=0, atol=3e-3)


@pytest.mark.parametrize("settings", [BOTH, MIXUP, CUTMIX])
def test_labels_are_class_fractions_of_the_pixels(settings):
    """With images of a single value, the mean of the mixed pixels is the fraction."""
    columns = torch.from_numpy(plan(settings, 64))
    labels = torch.arange(64) % 2
    images = labels.double()[:, None, None, None].expand(64, 3, SIZE, SIZE).contiguous()
    weights = mix_labels(labels, columns, num_classes=2, label_smoothing=0.0, size=(SIZE, SIZE))
    assert weights.dtype == torch.float32 and weights.shape == (64, 2)
    shares = mix_images(images, columns).mean(dim=(1, 2, 3))
    torch.testing.assert_close(weights[:, 1].double(), shares, rtol=0, atol=1e-6)
    assert ((weights > 0.01) & (weights < 0.99)).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_labels_sum_to_one_and_are_smoothed(smoothing):
    settings = BOTH.model_copy(update={"probability": 0.5, "label_smoothing": smoothing})
    columns = torch.from_numpy(plan(settings, 64))
    labels = torch.arange(64) % 7
    weights = mix_labels(labels, columns, num_classes=7, label_smoothing=smoothing, size=(SIZE, SIZE))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(64), rtol=0, atol=1e-6)
    plain = mix_labels(labels, columns, num_classes=7, label_smoothing=0.0, size=(SIZE, SIZE))
    torch.testing.assert_close(weights, plain * (1 - smoothing) + smoothing / 7, rtol=0, atol=1e-6)
    alone = columns[:, PARTNER] == torch.arange(64)
    assert 20 < alone.sum() < 45
    hard = torch.nn.functional.one_hot(labels, 7).float()[alone]
    assert torch.equal(plain[alone], hard)


def test_partners_of_one_class_keep_its_label():
    columns = torch.from_numpy(plan(BOTH, 64))
    weights = mix_labels(torch.full((64,), 3), columns, num_classes=5, label_smoothing=0.0, size=(SIZE, SIZE))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0, 0, 1, 0]).expand(64, 5), rtol=0, atol=1e-6)


def test_host_never_waits_for_a_gpu():
    with OnGpu() as gpu:
        images, labels, mixing = map(gpu.tensor, (torch.rand(8, 3, 16, 16), torch.arange(8), torch.ones(8, 6).long()))
        smaller = at_size(mixing, (16, 16), (8, 12))
        mixed = [mix_images(images, mixing), mix_images(images[:, :, :8, :12], smaller)]
        mixed.append(mix_labels(labels, mixing, num_classes=9, label_smoothing=0.1, size=(16, 16)))
    assert all(tensor.device == DEVICE for tensor in mixed) and not gpu.copies
