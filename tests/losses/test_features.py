from functools import partial
from math import log, sqrt

import pytest
import torch

from kd_pipeline import losses
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses import (
    am_radio,
    attention_transfer,
    channel_wise,
    feature_cosine,
    feature_mse,
    feature_smooth_l1,
)
from kd_pipeline.losses.features import sample_cosine
from tests.losses.reference import softmax, two_models, two_models_torch


def mse_formula(student, teacher):
    return sum(((s - t) ** 2).sum() / s.size for s, t in zip(student, teacher, strict=True)) / len(student)


def smooth_l1_formula(student, teacher, beta=1.0):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        distances = abs((s - t).flatten())
        total += sum(d * d / (2 * beta) if d < beta else d - beta / 2 for d in distances) / len(distances)
    return total / len(student)


def cosine_of_vectors(s, t):
    return sum(s * t) / sqrt(sum(s * s)) / sqrt(sum(t * t))


def cosine_formula(student, teacher):
    """For maps."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        positions = [(y, x) for y in range(s.shape[1]) for x in range(s.shape[2])]
        total += sum(1 - cosine_of_vectors(s[:, y, x], t[:, y, x]) for y, x in positions) / len(positions)
    return total / len(student)


def attention_formula(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for features in (s, t):
            energy = sum(channel * channel for channel in features) / len(features)
            maps.append(energy / sqrt((energy * energy).sum()))
        total += ((maps[0] - maps[1]) ** 2).sum() / maps[0].size
    return total / len(student)


def channel_formula(student, teacher, temperature):
    num_samples, num_channels = student.shape[:2]
    total = 0.0
    for sample in range(num_samples):
        for channel in range(num_channels):
            q = softmax(list(student[sample, channel].flatten() / temperature))
            p = softmax(list(teacher[sample, channel].flatten() / temperature))
            total += sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 / num_channels * total / num_samples


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 2)], ids=["embeddings", "tokens", "maps"])
def test_feature_mse_formula(assert_matches, shape):
    student, teacher = two_models(shape)
    assert_matches(partial(feature_mse, teacher=torch.tensor(teacher)), partial(mse_formula, teacher=teacher), student)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 2, 2), (3, 2, 1, 4)])
def test_feature_cosine_formula(assert_matches, shape):
    student, teacher = two_models(shape)
    loss = partial(feature_cosine, teacher=torch.tensor(teacher))
    assert_matches(loss, partial(cosine_formula, teacher=teacher), student)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 2)], ids=["embeddings", "tokens", "maps"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_feature_smooth_l1_formula(assert_matches, shape, beta):
    student, teacher = two_models(shape)
    loss = partial(feature_smooth_l1, teacher=torch.tensor(teacher), beta=beta)
    assert_matches(loss, partial(smooth_l1_formula, teacher=teacher, beta=beta), student)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 2, 2)])
def test_am_radio_formula(assert_matches, shape):
    student, teacher = two_models(shape)

    def formula(student):
        return 0.9 * cosine_formula(student, teacher) + 0.1 * smooth_l1_formula(student, teacher)

    assert_matches(partial(am_radio, teacher=torch.tensor(teacher)), formula, student)


def test_am_radio_as_in_the_paper():
    """Its equation, of tokens, with torch's functions."""
    student, teacher = two_models_torch((2, 5, 4))
    cosine = 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean()
    expected = 0.9 * cosine + 0.1 * torch.nn.functional.smooth_l1_loss(student, teacher)
    torch.testing.assert_close(am_radio(student, teacher), expected)


def test_am_radio_layouts():
    student, teacher = two_models_torch((2, 3, 2, 4))
    tokens = (side.flatten(2).transpose(1, 2) for side in (student, teacher))
    torch.testing.assert_close(am_radio(*tokens), am_radio(student, teacher))


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, feature_smooth_l1, am_radio])
def test_masked_positions_are_left_out(loss):
    """A sample's mean is over its own positions, and a sample without any is no sample."""
    student, teacher = two_models_torch((3, 6, 4))
    mask = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    expected = (loss(student[:1, mask[0]], teacher[:1, mask[0]]) + loss(student[2:, mask[2]], teacher[2:, mask[2]])) / 2
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    student.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        found = loss(student, teacher, mask=mask)
        found.backward()
    torch.testing.assert_close(found, expected)
    assert student.grad[mask].abs().sum() > 0
    assert (student.grad[~mask] == 0).all()
    maps = (side.transpose(1, 2).unflatten(2, (2, 3)) for side in (student, teacher))
    torch.testing.assert_close(loss(*maps, mask=mask.unflatten(1, (2, 3))), expected)


@pytest.mark.parametrize("loss", [attention_transfer, channel_wise])
def test_masked_positions_have_no_part_in_the_map(loss):
    """As if the map had the other positions only."""
    student, teacher = two_models_torch((2, 3, 2, 4))
    mask = torch.tensor([True, False, True, True]).expand(2, 2, 4)
    expected = loss(student[..., [0, 2, 3]], teacher[..., [0, 2, 3]])
    student[..., 1], teacher[..., 1] = float("nan"), float("inf")
    torch.testing.assert_close(loss(student, teacher, mask=mask), expected)


def test_mask_is_that_of_the_pooled_map():
    student, teacher = two_models_torch((2, 3, 4, 4))
    small = torch.nn.functional.avg_pool2d(teacher, 2)
    mask = torch.tensor([[[1, 0], [0, 1]]] * 2).bool()
    pooled = torch.nn.functional.avg_pool2d(student, 2)
    torch.testing.assert_close(feature_mse(student, small, mask=mask), feature_mse(pooled, small, mask=mask))


def test_sample_cosine():
    student, teacher = two_models_torch((3, 2, 4))
    found = sample_cosine(student, teacher)
    for row in range(3):
        expected = 1 - feature_cosine(student[row : row + 1], teacher[row : row + 1])
        torch.testing.assert_close(found[row], expected)


def test_feature_cosine_layouts():
    student, teacher = two_models_torch((2, 3, 2, 4))
    tokens = (side.flatten(2).transpose(1, 2) for side in (student, teacher))
    torch.testing.assert_close(feature_cosine(*tokens), feature_cosine(student, teacher))


def test_feature_cosine_of_embeddings():
    student, teacher = two_models_torch((4, 6))
    assert feature_cosine(student, teacher) == losses.cosine(student, teacher)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 2, 2), (3, 2, 1, 4)])
def test_attention_transfer_formula(assert_matches, shape):
    student, teacher = two_models(shape)
    loss = partial(attention_transfer, teacher=torch.tensor(teacher))
    assert_matches(loss, partial(attention_formula, teacher=teacher), student)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 2, 2), (3, 2, 1, 4)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_wise_formula(assert_matches, shape, temperature):
    student, teacher = two_models(shape)
    loss = partial(channel_wise, teacher=torch.tensor(teacher), temperature=temperature)
    assert_matches(loss, partial(channel_formula, teacher=teacher, temperature=temperature), student)


def test_channel_wise_over_channels_is_channel_wise_with_both_axes_swapped(assert_matches):
    student, teacher = two_models((2, 3, 2, 4))
    loss = partial(channel_wise, teacher=torch.tensor(teacher), temperature=3.0, over="channels")

    def formula(maps):
        swapped = (side.reshape(2, 3, 8).swapaxes(1, 2)[..., None] for side in (maps, teacher))
        return channel_formula(*swapped, temperature=3.0)

    assert_matches(loss, formula, student)
    with pytest.raises(ConfigError, match="'positions' or 'channels', got 'pixels'"):
        channel_wise(torch.tensor(student), torch.tensor(teacher), over="pixels")


def test_attention_invariances():
    student, teacher = two_models_torch((2, 3, 2, 4))
    expected = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer(-7 * student, teacher), expected)
    torch.testing.assert_close(attention_transfer(student.flip(1), teacher), expected)
    torch.testing.assert_close(attention_transfer(student.repeat(1, 5, 1, 1), teacher), expected)
    assert abs(attention_transfer(student.flip(3), teacher) / expected - 1) > 0.01


def test_attention_is_normalized_per_sample():
    student, teacher = two_models_torch((2, 3, 2, 4))
    scale = torch.tensor([1.0, 1000.0], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(attention_transfer(student * scale, teacher), attention_transfer(student, teacher))


def test_attention_of_zeros():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    value = attention_transfer(student, torch.ones(2, 3, 2, 2))
    value.backward()
    assert value == 0.25
    assert (student.grad == 0).all()


def test_channel_wise_ignores_channel_mean():
    student, teacher = two_models_torch((2, 3, 2, 4))
    shift = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(channel_wise(student + shift, teacher), channel_wise(student, teacher))
    assert channel_wise(teacher, teacher) == 0


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, attention_transfer])
@pytest.mark.parametrize("factors", [(2, 2), (3, 1), (1, 4)])
def test_larger_map_is_pooled(loss, factors):
    student, teacher = two_models_torch((2, 3, 6, 4))
    small = torch.nn.functional.avg_pool2d(teacher, factors)
    pooled = torch.nn.functional.avg_pool2d(student, factors)
    torch.testing.assert_close(loss(student, small), loss(pooled, small))
    torch.testing.assert_close(loss(small, student), loss(small, pooled))


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, attention_transfer])
def test_pooling_in_float32(loss):
    student, teacher = (side.half() for side in two_models_torch((2, 3, 6, 6)))
    assert loss(student[..., ::3, ::3], teacher) == loss(student[..., ::3, ::3].float(), teacher.float())


def test_both_maps_are_pooled():
    student, teacher = two_models_torch((2, 3, 4, 4))
    tall, wide = student[..., :2], teacher[:, :, :2]
    pooled = torch.nn.functional.avg_pool2d(tall, (2, 1)), torch.nn.functional.avg_pool2d(wide, (1, 2))
    torch.testing.assert_close(feature_mse(tall, wide), feature_mse(*pooled))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, attention_transfer, channel_wise])
def test_memory_format(loss, memory_format):
    student, teacher = two_models_torch((2, 3, 4, 4))
    laid_out = student.to(memory_format=memory_format)
    torch.testing.assert_close(loss(laid_out, teacher), loss(student, teacher))


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, attention_transfer, channel_wise])
def test_invalid_maps_are_ignored(loss):
    student, teacher = two_models_torch((3, 3, 4, 4))
    expected = loss(student[:2], teacher[:2])
    student[2], teacher[2] = float("nan"), float("inf")
    student.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        value = loss(student, teacher, valid=torch.tensor([True, True, False]))
        value.backward()
    torch.testing.assert_close(value, expected)
    assert student.grad.isfinite().all()


MAP = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "words"),
    [
        (feature_mse, MAP, torch.zeros(2, 5, 4, 4), ["[2, 3, 4, 4]", "[2, 5, 4, 4]", "projector"]),
        (feature_mse, torch.zeros(2, 3), torch.zeros(2, 5), ["[2, 3]", "[2, 5]", "projector"]),
        (feature_mse, torch.zeros(2, 3, 6), torch.zeros(2, 4, 6), ["[2, 3, 6]", "[2, 4, 6]"]),
        (feature_mse, MAP, torch.zeros(2, 3), ["[2, 3, 4, 4]", "[2, 3] float32", "tokens"]),
        (feature_mse, MAP, torch.zeros(3, 3, 4, 4), ["[2, 3, 4, 4]", "[3, 3, 4, 4]", "same samples"]),
        (feature_mse, MAP, MAP.long(), ["float32", "int64"]),
        (feature_mse, torch.zeros(2), torch.zeros(2), ["[2] float32", "embeddings"]),
        (feature_mse, MAP, torch.zeros(2, 3, 3, 3), ["[2, 3, 4, 4]", "[2, 3, 3, 3]", "whole factor"]),
        (feature_cosine, MAP, torch.zeros(2, 5, 4, 4), ["[2, 3, 4, 4]", "[2, 5, 4, 4]", "projector"]),
        (attention_transfer, torch.zeros(2, 3), torch.zeros(2, 3), ["[2, 3] float32", "[N, C, H, W] maps"]),
        (attention_transfer, MAP, torch.zeros(2, 9, 1, 1), ["[2, 3, 1, 1]", "at least 2"]),
        (attention_transfer, MAP, torch.zeros(2, 9, 4, 5), ["[2, 3, 4, 4]", "[2, 9, 4, 5]", "whole factor"]),
        (channel_wise, MAP, torch.zeros(2, 5, 4, 4), ["[2, 3, 4, 4]", "[2, 5, 4, 4]", "projector"]),
        (channel_wise, MAP, torch.zeros(2, 3, 2, 2), ["[2, 3, 4, 4]", "[2, 3, 2, 2]", "same size"]),
        (channel_wise, torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), ["[2, 3, 1, 1]", "at least 2"]),
    ],
)
def test_invalid_features(loss, student, teacher, words):
    with pytest.raises(ConfigError) as caught:
        loss(student, teacher)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 4), torch.ones(2, 16).bool(), torch.ones(2, 2, 2).bool()])
def test_invalid_position_mask(mask):
    with pytest.raises(ConfigError, match=r"mask must be \[N, L\] bool .* got .* for \[2, 3, 4, 4\] float32"):
        am_radio(MAP, MAP, mask=mask)
    with pytest.raises(ConfigError, match="mask must be"):
        am_radio(MAP[..., 0, 0], MAP[..., 0, 0], mask=torch.ones(2).bool())


@pytest.mark.parametrize("loss", [feature_smooth_l1, am_radio])
@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf")])
def test_invalid_beta(loss, beta):
    with pytest.raises(ConfigError, match=f"beta must be a finite number above 0, got {beta}"):
        loss(MAP, MAP, beta=beta)


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, attention_transfer, channel_wise])
def test_invalid_mask(loss):
    with pytest.raises(ConfigError, match=r"valid must be \[2\] bool, .* got \[3\] bool"):
        loss(MAP, MAP, valid=torch.ones(3, dtype=torch.bool))
