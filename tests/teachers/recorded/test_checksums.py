"""Checksums of images."""

import numpy as np
import pytest
import torch

from kd_pipeline.teachers.recorded import checksums as module
from kd_pipeline.teachers.recorded.checksums import checksums
from tests.networks import random_images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checksum_independent_of_batch(dtype: torch.dtype) -> None:
    images = random_images(40).to(dtype)
    whole = checksums(images)
    assert len(set(whole.tolist())) == 40
    assert np.array_equal(whole, np.concatenate([checksums(images[:7]), checksums(images[7:])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gpu_checksums_equal_cpu_checksums(dtype: torch.dtype) -> None:
    """The GPU's algorithm, run on a CPU."""
    images = random_images(40).to(dtype)
    bits = images.flatten(1).view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert np.array_equal(module._sums_on_gpu(bits, module._factors(bits.shape[1])), checksums(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checksum_sees_any_changed_bit(dtype: torch.dtype) -> None:
    image = random_images(1).to(dtype)
    before = checksums(image)
    for place in range(0, image.numel(), 97):
        changed = image.clone()
        flat = changed.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten()
        flat[place] ^= 1
        assert checksums(flat.view(dtype).view_as(image)) != before


def test_checksum_sees_swapped_pixels() -> None:
    image = random_images(1)
    changed = image.flatten().clone()
    changed[[5, 900]] = changed[[900, 5]]
    assert checksums(changed.view_as(image)) != checksums(image)


def test_checksum_sees_flipped_signs() -> None:
    image = random_images(1)
    for places in ([5, 900], [0, 1, 2, 3], list(range(image.numel()))):
        changed = image.flatten().clone()
        changed[places] *= -1
        assert checksums(changed.view_as(image)) != checksums(image)


def test_checksum_is_stable_over_releases() -> None:
    """Later releases must be able to check earlier recordings."""
    ramp = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    assert checksums(ramp).tolist() == [4042165680, 3531456004]
