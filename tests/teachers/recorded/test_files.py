"""Encoding of teacher outputs, and checksums of images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline import losses
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.recorded import files
from kd_pipeline.teachers.recorded.files import checksums, decode, encode
from kd_pipeline.teachers.recorded.manifest import RecordingManifest, TeacherInfo
from tests.networks import random_images

NUM_CLASSES = 12


# Top-k logits


def manifest(top_k: int | None, dtype: Any = "float32", num_classes: int = NUM_CLASSES) -> RecordingManifest:
    facts = TeacherInfo(fingerprint="f", backend="pytorch", precision="fp32", classes=None)
    return RecordingManifest(
        teacher=facts, outputs={"logits": (num_classes,)}, top_k=top_k, dtype=dtype, stream={}, num_rows=1, epochs=1
    )


@pytest.fixture(scope="module")
def logits_NK() -> Tensor:
    return 4 * torch.randn(50, NUM_CLASSES, generator=torch.Generator().manual_seed(0))


def through(logits_NK: Tensor, kept: RecordingManifest) -> Tensor:
    """The logits after encoding and decoding."""
    columns = encode({"logits": logits_NK}, kept)
    stored = {
        name: torch.from_numpy(columns[name].numpy().astype(column.dtype))
        for name, column in kept.columns.items()
        if name in columns
    }
    return decode(stored, kept)["logits"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-3)])
@pytest.mark.parametrize("top_k", [1, 4, NUM_CLASSES - 1])
def test_kept_classes_keep_their_probabilities(logits_NK: Tensor, top_k: int, dtype: str, tolerance: float) -> None:
    found_NK = through(logits_NK, manifest(top_k, dtype))
    wanted, classes = logits_NK.softmax(1).topk(top_k)
    torch.testing.assert_close(found_NK.softmax(1).gather(1, classes), wanted, atol=tolerance, rtol=0)
    assert torch.equal(found_NK.topk(top_k).indices, classes) or dtype == "float16"
    torch.testing.assert_close(found_NK.gather(1, classes), logits_NK.gather(1, classes), atol=tolerance, rtol=1e-3)


def test_other_classes_share_the_rest(logits_NK: Tensor) -> None:
    found_NK = through(logits_NK, manifest(4)).softmax(1)
    others = found_NK.scatter(1, logits_NK.topk(4).indices, torch.nan)
    for row, wanted in zip(others, logits_NK.softmax(1), strict=True):
        rest = row[~row.isnan()]
        assert len(rest) == NUM_CLASSES - 4 and len(rest.unique()) == 1
        assert float(rest.sum()) == pytest.approx(1 - float(wanted.topk(4).values.sum()), abs=1e-6)


def test_losses_work_on_top_k(logits_NK: Tensor) -> None:
    student_NK = torch.randn(50, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    found_NK = through(logits_NK, manifest(NUM_CLASSES - 2))
    for loss in (losses.soft_target, losses.dkd, losses.dist):
        given = {"labels": torch.zeros(50, dtype=torch.int64)} if loss is losses.dkd else {}
        ours = loss(student_NK, found_NK, *given.values())
        theirs = loss(student_NK, logits_NK, *given.values())
        assert float(ours) == pytest.approx(float(theirs), rel=0.05)


def test_full_float32_is_exact(logits_NK: Tensor) -> None:
    assert torch.equal(through(logits_NK, manifest(None)), logits_NK)


def test_class_dtype_depends_on_number_of_classes() -> None:
    wide_NK = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    kept = manifest(3, num_classes=40_000)
    assert kept.columns["logits.classes"].dtype == np.dtype("<i4")
    assert manifest(3).columns["logits.classes"].dtype == np.dtype("<i2")
    assert torch.equal(through(wide_NK, kept).topk(3).indices, wide_NK.topk(3).indices)


def test_float16_overflow_is_refused(logits_NK: Tensor) -> None:
    with pytest.raises(TeacherError, match=r"logits\.values goes up to 7e\+04, and float16 to 65504.*--dtype float32"):
        encode({"logits": torch.full((2, NUM_CLASSES), 7e4)}, manifest(None, "float16"))
    assert (
        not encode({"logits": torch.full((2, NUM_CLASSES), torch.nan)}, manifest(None, "float16"))["logits.values"]
        .isfinite()
        .any()
    )


# Checksums


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
    assert np.array_equal(files._sums_on_gpu(bits, files._factors(bits.shape[1])), checksums(images))


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
