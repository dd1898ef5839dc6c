"""Encoding of teacher outputs: what is replayed is what was recorded, within the stated bounds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kd_pipeline import losses
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.recorded.encoding import MAX_SCALE, decode, encode
from kd_pipeline.teachers.recorded.manifest import RecordedOutput, RecordingManifest, TeacherInfo

NUM_CLASSES = 12
SHAPES = {"pooled": (24,), "spatial": (17, 24), "map": (24, 4, 5)}


def of(**outputs: RecordedOutput) -> RecordingManifest:
    facts = TeacherInfo(fingerprint="f", backend="pytorch", precision="fp32", classes=None)
    return RecordingManifest(teacher=facts, outputs=outputs, stream={}, num_rows=1, part_rows=1)


def manifest(top_k: int | None, dtype: Any = "float32", num_classes: int = NUM_CLASSES) -> RecordingManifest:
    return of(logits=RecordedOutput(shape=(num_classes,), top_k=top_k, dtype=dtype))


def through_files(outputs: dict[str, Tensor], kept: RecordingManifest) -> dict[str, Tensor]:
    """Outputs after encoding, the dtype of the files, and decoding."""
    columns = encode(outputs, kept)
    for name, each in columns.items():
        assert each.shape[1:] == kept.columns[name].shape, name
    stored = {name: torch.from_numpy(each.numpy().astype(kept.columns[name].dtype)) for name, each in columns.items()}
    found = decode(stored, kept.outputs)
    assert all(found[name].shape[1:] == each.shape for name, each in kept.outputs.items())
    assert all(each.dtype == torch.float32 for each in found.values())
    return found


def through(logits_NK: Tensor, kept: RecordingManifest) -> Tensor:
    return through_files({"logits": logits_NK}, kept)["logits"]


def features(name: str, num_images: int = 6) -> Tensor:
    """Rows of very different sizes, as those of tokens are."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(num_images, *SHAPES[name], generator=generator)
    sizes = torch.randn(num_images, *SHAPES[name], generator=generator).mul(4).exp()
    dim = 1 if found.ndim == 4 else -1
    return found * sizes.select(dim, 0).unsqueeze(dim)


def rows(output: Tensor) -> Tensor:
    """The vectors, tokens or positions of an output, `[..., D]`."""
    return output.movedim(1, -1) if output.ndim == 4 else output


# Top-k logits


@pytest.fixture(scope="module")
def logits_NK() -> Tensor:
    return 4 * torch.randn(50, NUM_CLASSES, generator=torch.Generator().manual_seed(0))


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
    with pytest.raises(TeacherError, match=r"logits goes up to 7e\+04, and float16 to 65504.*--dtype float32"):
        encode({"logits": torch.full((2, NUM_CLASSES), 7e4)}, manifest(None, "float16"))
    assert (
        not encode({"logits": torch.full((2, NUM_CLASSES), torch.nan)}, manifest(None, "float16"))["logits.values"]
        .isfinite()
        .any()
    )


# Features


@pytest.mark.parametrize("name", SHAPES)
def test_int8_error_is_within_bound_of_each_row(name: str) -> None:
    output = features(name)
    found = through_files({name: output}, of(**{name: RecordedOutput(shape=SHAPES[name], dtype="int8")}))[name]
    error, largest = rows(found - output).abs(), rows(output).abs().amax(-1, keepdim=True)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert error.max() > 0
    # The largest number of each row is kept to rounding.
    torch.testing.assert_close(rows(found).abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_int8_is_the_same_alone_and_in_a_batch(name: str) -> None:
    output, kept = features(name), of(**{name: RecordedOutput(shape=SHAPES[name], dtype="int8")})
    alone = [through_files({name: row[None]}, kept)[name] for row in output]
    assert torch.equal(torch.cat(alone), through_files({name: output}, kept)[name])


def test_int8_is_exact_for_what_int8_can_hold() -> None:
    steps = torch.arange(-127, 128, dtype=torch.float32)[None]
    kept = of(pooled=RecordedOutput(shape=(255,), dtype="int8"))
    for scale in (1.0, 2.0**-20, 2.0**40):
        assert torch.equal(through_files({"pooled": steps * scale}, kept)["pooled"], steps * scale)


def test_int8_keeps_zeros_and_the_smallest_numbers() -> None:
    kept = of(pooled=RecordedOutput(shape=(24,), dtype="int8"))
    output = torch.stack([torch.zeros(24), torch.full((24,), 1e-39), torch.full((24,), -1e-30)])
    found = through_files({"pooled": output}, kept)["pooled"]
    assert not found[:2].any()
    torch.testing.assert_close(found[2], output[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.5 * 127 * MAX_SCALE])
def test_int8_refuses_what_has_no_scale(value: float) -> None:
    output = features("spatial")
    output[1, 2, 3] = value
    kept = of(spatial=RecordedOutput(shape=SHAPES["spatial"], dtype="int8"))
    with pytest.raises(TeacherError, match=r"spatial has numbers that are not finite or above .*--dtype float32"):
        encode({"spatial": output}, kept)


@pytest.mark.parametrize("name", SHAPES)
def test_float16_is_within_its_rounding(name: str) -> None:
    output = features(name).clamp(-6e4, 6e4)
    found = through_files({name: output}, of(**{name: RecordedOutput(shape=SHAPES[name], dtype="float16")}))[name]
    torch.testing.assert_close(found, output, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("name", SHAPES)
def test_float32_features_are_exact(name: str) -> None:
    output = features(name)
    output.flatten()[0] = torch.nan
    found = through_files({name: output}, of(**{name: RecordedOutput(shape=SHAPES[name])}))[name]
    torch.testing.assert_close(found, output, rtol=0, atol=0, equal_nan=True)


def test_outputs_of_several_teachers_are_stored_each_in_its_own_way() -> None:
    kept = of(
        **{
            "a.logits": RecordedOutput(shape=(NUM_CLASSES,), top_k=3),
            "b.logits": RecordedOutput(shape=(5,), dtype="float16"),
            "a.spatial": RecordedOutput(shape=SHAPES["spatial"], dtype="int8", num_prefix_tokens=1),
        }
    )
    generator = torch.Generator().manual_seed(0)
    outputs = {name: torch.randn(4, *stored.shape, generator=generator) for name, stored in kept.outputs.items()}
    found = through_files({**outputs, "left out": torch.zeros(4)}, kept)
    assert found.keys() == outputs.keys()
    assert torch.equal(found["a.logits"].topk(3).values, outputs["a.logits"].topk(3).values)
    assert torch.equal(found["b.logits"], outputs["b.logits"].half().float())
    torch.testing.assert_close(found["a.spatial"], outputs["a.spatial"], rtol=0, atol=0.02)


# The grid


def test_map_is_averaged_over_areas() -> None:
    output = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    kept = of(map=RecordedOutput(shape=(5, 3, 3), teacher_grid=(6, 6)))
    torch.testing.assert_close(through_files({"map": output}, kept)["map"], avg_pool2d(output, 2))


def test_map_with_channels_last_is_stored_with_channels_first() -> None:
    output = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    for side, wanted in ((3, avg_pool2d(output, 2)), (6, output)):
        kept = of(map=RecordedOutput(shape=(5, side, side), teacher_grid=(6, 6)))
        torch.testing.assert_close(through_files({"map": output.permute(0, 2, 3, 1)}, kept)["map"], wanted)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_tokens_lose_their_prefix_and_become_a_map(num_prefix_tokens: int) -> None:
    patches = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.full((3, num_prefix_tokens, 5), 1e9), patches.flatten(2).mT], 1)
    for side, wanted in ((3, avg_pool2d(patches, 2)), (6, patches)):
        kept = of(spatial=RecordedOutput(shape=(5, side, side), teacher_grid=(6, 6)))
        torch.testing.assert_close(through_files({"spatial": tokens}, kept)["spatial"], wanted)
