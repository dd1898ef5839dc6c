"""The parity check passes only finite outputs of the right shape that are close to float32."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.parity import (
    CalibrationSet,
    ParityReference,
    check_parity,
    generate_calibration_set,
    make_reference,
    summary,
)
from kd_pipeline.teachers.tensorrt.manifest import OutputParity, Parity, Precision
from kd_pipeline.teachers.tensorrt.parity import load_reference, parity_path
from tests.networks import IMAGE_SHAPE, ConvNet, random_images
from tests.teachers.tensorrt.special_files import SPECIAL_FILES

IMAGES = CalibrationSet(random_images(64), "the test")
NET = ConvNet().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference() -> ParityReference:
    return make_reference(NET, IMAGES)


check = partial(check_parity, batch_sizes=(64,), precision="fp16")


def off_by(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The network, with `change` applied to its outputs."""

    def teacher(images: Tensor) -> dict[str, Tensor]:
        outputs = {name: output.clone() for name, output in NET(images).items()}
        change(outputs)
        return outputs

    return teacher


def test_teacher_agrees_with_itself(reference: ParityReference) -> None:
    parities = check(reference, NET, batch_sizes=(1, 7, 64, 100))
    assert parities.keys() == {"logits", "features"}
    for parity in parities.values():
        assert (parity.cosine, parity.norm_ratio) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-6))
    logits, features = parities["logits"], parities["features"]
    assert (logits.top1_agreement, logits.kl) == (1, pytest.approx(0, abs=1e-9))
    assert (features.position_cosine, features.pooled_cosine) == (pytest.approx(1), pytest.approx(1))
    assert (features.top1_agreement, logits.position_cosine) == (None, None)


def test_metrics_match_definitions(reference: ParityReference) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = {
        "logits": reference.outputs["logits"] + 0.01 * torch.randn(64, 10, generator=generator),
        "features": 1.02 * reference.outputs["features"] + 0.01 * torch.randn(64, 32, 8, 8, generator=generator),
    }
    parities = check(reference, lambda images: outputs, precision="int8")
    wanted, found = reference.outputs["logits"].double(), outputs["logits"].double()
    logits = parities["logits"]
    assert logits.cosine == pytest.approx(torch.cosine_similarity(wanted, found).min().item(), rel=1e-12)
    target, log_input = (wanted / 4).softmax(1), (found / 4).log_softmax(1)
    assert logits.kl == pytest.approx((target * (target.log() - log_input)).sum(1).mean().item(), rel=1e-6)
    assert 0 < logits.kl < 1e-3

    wanted, found = reference.outputs["features"].double(), outputs["features"].double()
    features = parities["features"]
    cosines = [
        torch.cosine_similarity(found[:, :, y, x].flatten(), wanted[:, :, y, x].flatten(), dim=0)
        for y in range(8)
        for x in range(8)
    ]
    assert features.position_cosine == pytest.approx(min(cosines).item(), rel=1e-12)
    pooled = torch.cosine_similarity(found.mean((2, 3)), wanted.mean((2, 3)))
    assert features.pooled_cosine == pytest.approx(pooled.min().item(), rel=1e-12)
    ratios = found.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert features.norm_ratio == pytest.approx(ratios.max().item(), rel=1e-12)


TOKENS = torch.randn(64, 17, 24, generator=torch.Generator().manual_seed(0)) + 1
BACKBONE = ParityReference(
    IMAGES.images, {"pooled": TOKENS[:, 0], "spatial": TOKENS, "map": TOKENS[:, :, :, None]}, "it"
)


def planted(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The outputs of `BACKBONE` with one of them changed."""
    return {**BACKBONE.outputs, name: change(BACKBONE.outputs[name].clone())}


def test_backbone_without_logits_agrees_with_itself() -> None:
    parities = check(BACKBONE, lambda images: BACKBONE.outputs)
    assert parities.keys() == {"pooled", "spatial", "map"}
    assert summary(parities, 64) == "cosine 1.00000 to float32 on 64 images"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "change", "metrics"),
    [
        ("spatial", lambda tokens: tokens.roll(1, 1), ("cosine", "cosine of a position")),
        ("map", lambda values: values.roll(1, 2), ("cosine",)),
        ("pooled", lambda vectors: 2 * vectors, ("ratio of norms 2 (allowed ",)),
        ("spatial", lambda tokens: tokens / 2, ("ratio of norms 0.5 (allowed ",)),
        ("spatial", lambda tokens: tokens.index_copy(1, torch.tensor([5]), -tokens[:, 5:6]), ("of a position -1",)),
        ("spatial", lambda tokens: tokens.index_fill(1, torch.tensor([16]), 0.0), ("cosine of a position 0 ",)),
        ("spatial", lambda tokens: tokens.index_copy(0, torch.tensor([3]), -tokens[3:4]), ("cosine -1 (allowed ",)),
        ("pooled", lambda vectors: vectors.index_copy(0, torch.tensor([3]), vectors[4:5]), ("cosine 0.",)),
    ],
    ids=["permuted tokens", "permuted map", "doubled", "halved", "one position", "no position", "one image", "mix-up"],
)  # fmt: skip
def test_fault_in_one_output_is_found(
    name: str, change: Callable[[Tensor], Tensor], metrics: tuple[str, ...], precision: Precision
) -> None:
    outputs = planted(name, change)
    with pytest.raises(EngineError) as caught:
        check(BACKBONE, lambda images: outputs, precision=precision)
    message = str(caught.value)
    assert f"worst first: {name!r} " in message and all(metric in message for metric in metrics)
    assert not any(repr(other) in message for other in BACKBONE.outputs if other != name)


@pytest.mark.parametrize("name", ["pooled", "spatial", "map"])
def test_nan_in_one_position_is_found(name: str) -> None:
    def spoil(output: Tensor) -> Tensor:
        output[7].view(-1)[3] = float("nan")
        return output

    with pytest.raises(EngineError, match=f"returns {name!r} with NaN or inf for 1 of 64 images"):
        check(BACKBONE, lambda images: planted(name, spoil))


def test_direction_of_negligible_vectors_is_not_compared() -> None:
    """Where a ReLU leaves next to nothing, or the mean over the positions cancels out."""
    tokens = TOKENS.clone()
    tokens[:, 5] = 1e-5
    centered = tokens - tokens.mean(1, keepdim=True)
    wanted = {"dark": tokens, "centered": centered}
    found = {"dark": tokens.clone(), "centered": centered + 1e-5}
    found["dark"][:, 5] = -1e-5
    check(ParityReference(IMAGES.images, wanted, "it"), lambda images: found, precision="fp32")


def test_batches_are_full_and_every_image_counts(reference: ParityReference) -> None:
    sizes = []

    def teacher(images: Tensor) -> dict[str, Tensor]:
        sizes.append(len(images))
        return NET(images)

    check(reference, teacher, batch_sizes=(48, 1, 100))
    assert sizes == [1] * 64 + [48] * 2 + [100]

    def last_image_is_wrong(images: Tensor) -> dict[str, Tensor]:
        is_last = (images == reference.images[-1]).flatten(1).all(1)
        return {
            name: torch.where(is_last.view(-1, *[1] * (output.ndim - 1)), -output, output)
            for name, output in NET(images).items()
        }

    for size in (1, 48, 100):
        with pytest.raises(EngineError, match=f"in batches of {size} are too far from float32"):
            check(reference, last_image_is_wrong, batch_sizes=(size,), precision="int8")


def test_failing_batch_size_is_named(reference: ParityReference) -> None:
    def teacher(images: Tensor) -> dict[str, Tensor]:
        outputs = NET(images)
        return outputs if len(images) != 32 else {name: output.flip(0) for name, output in outputs.items()}

    with pytest.raises(EngineError, match="in batches of 32 are too far"):
        check(reference, teacher, batch_sizes=(1, 32, 64), precision="fp32")


def test_worst_output_comes_first(reference: ParityReference) -> None:
    def change(outputs: dict[str, Tensor]) -> None:
        outputs["features"] += torch.randn(outputs["features"].shape, generator=torch.Generator().manual_seed(0))

        outputs["logits"] *= 1.1

    with pytest.raises(
        EngineError, match=r"first: 'features' .*cosine 0\.\d+ \(allowed from 0.999\).*; 'logits' ratio"
    ):
        check(reference, off_by(change), precision="bf16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["logits", "features"])
def test_non_finite_output_is_refused(reference: ParityReference, name: str, value: float) -> None:
    def change(outputs: dict[str, Tensor]) -> None:
        outputs[name][3] = value

    with pytest.raises(EngineError, match=f"returns '{name}' with NaN or inf for 1 of 64 images.*use bf16"):
        check(reference, off_by(change))


def test_wrong_or_missing_output_is_refused(reference: ParityReference) -> None:
    with pytest.raises(EngineError, match=r"'logits': float32 returns \[64, 10\], the converted teacher \[64, 9\]"):
        check(reference, off_by(lambda outputs: outputs.update(logits=outputs["logits"][:, 1:])))
    with pytest.raises(EngineError, match=r"'features': float32 returns .*, the converted teacher nothing"):
        check(reference, off_by(lambda outputs: outputs.pop("features")))


def test_permuted_classes_are_refused(reference: ParityReference) -> None:
    with pytest.raises(EngineError, match=r"'logits' .*top-1 agreement"):
        check(reference, off_by(lambda outputs: outputs.update(logits=outputs["logits"].roll(1, 1))), precision="int8")


def test_ties_count_as_agreement() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    first, second = logits.topk(2, 1).indices.T
    rows = torch.arange(64)
    logits[rows, second] = logits[rows, first] - 1e-4
    reference = ParityReference(IMAGES.images, {"logits": logits}, "ties")
    swapped = logits.clone()
    swapped[rows, second] += 2e-4
    assert check(reference, lambda images: {"logits": swapped})["logits"].top1_agreement == 1

    logits[rows, first] += 0.2
    swapped = logits.clone()
    swapped[rows[:2], second[:2]] += 0.3
    with pytest.raises(EngineError, match=r"top-1 agreement 0.9688 \(allowed from 0.99\)"):
        check(reference, lambda images: {"logits": swapped})


def test_half_precision_has_tighter_bounds(reference: ParityReference) -> None:
    def change(outputs: dict[str, Tensor]) -> None:
        noise = torch.randn(outputs["features"].shape, generator=torch.Generator().manual_seed(0))
        outputs["features"] += 0.08 * noise * outputs["features"].std()

    assert check(reference, off_by(change), precision="int8")["features"].cosine < 0.999
    with pytest.raises(EngineError, match="cosine"):
        check(reference, off_by(change))


def write(engine: Path, content: bytes, outputs: tuple[str, ...] = ("logits", "features")) -> Parity:
    """Write the reference of an engine, and describe it as its manifest does."""
    parity_path(engine).write_bytes(content)
    return Parity(
        measured_on="onnx",
        images="the test",
        num_images=64,
        batch_sizes=(64,),
        outputs={name: OutputParity(cosine=1, norm_ratio=1) for name in outputs},
        tensors_sha256=hashlib.sha256(content).hexdigest(),
    )


def test_reference_round_trip(reference: ParityReference, tmp_path: Path) -> None:
    engine = tmp_path / "teacher.engine"
    content = reference.to_bytes()
    parity = write(engine, content)
    found = load_reference(engine, parity)
    assert found.source == "the test"
    assert torch.equal(found.images, reference.images)
    assert found.outputs.keys() == reference.outputs.keys()
    assert all(torch.equal(found.outputs[name], output) for name, output in reference.outputs.items())

    parity_path(engine).write_bytes(content[:-1])
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz has the sha256 .*, wanted .*build the engine"):
        load_reference(engine, parity)
    parity_path(engine).unlink()
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz cannot be read"):
        load_reference(engine, parity)


def npz(*, save: Callable[..., None] = np.savez, **arrays: object) -> bytes:
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def lying_npz() -> bytes:
    """One whose images claim to be 2**60 numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 60,)})
        archive.writestr("images.npy", header.getvalue())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: npz(images=np.zeros((10_000, 10_000), np.int8), save=np.savez_compressed),
            "it would unpack to 1000001",
        ),
        (lying_npz, ""),
        (lambda: npz(images=np.array([{}] * 64), **{"output.pooled": np.zeros(64)}), "allow_pickle=False"),
        (lambda: npz(images=np.zeros((64, 3)), **{"output.map": np.zeros(64)}), "wanted images and pooled, 64 of each"),
        (lambda: npz(images=np.zeros((64, 3))), "wanted images and pooled, 64 of each"),
        (lambda: npz(images=np.zeros((63, 3)), **{"output.pooled": np.zeros((64, 2))}), "and pooled, 64 of each"),
        (lambda: npz(images=np.zeros(()), **{"output.pooled": np.zeros((64, 2))}), ""),
        (lambda: npz(images=np.array(["a"] * 64), **{"output.pooled": np.zeros((64, 2))}), ""),
        (lambda: b"no archive", ""),
    ],
    ids=["bomb", "lying header", "pickle", "other output", "no output", "few images", "no rows", "text", "no archive"],
)
def test_hostile_reference_is_one_error(tmp_path: Path, make: Callable[[], bytes], reason: str) -> None:
    engine = tmp_path / "teacher.engine"
    parity = write(engine, make(), ("pooled",))
    with pytest.raises(EngineError, match=f"parity.npz holds no images and outputs: .*{reason}"):
        load_reference(engine, parity)


@pytest.mark.parametrize("kind", list(SPECIAL_FILES))
def test_special_file_is_no_reference(
    reference: ParityReference, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 bytes
    engine = Path("teacher.engine")
    parity = write(engine, reference.to_bytes())
    parity_path(engine).unlink()
    SPECIAL_FILES[kind](parity_path(engine))
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz cannot be read: (this is|it has) .*; delete it"):
        load_reference(engine, parity)


def test_reference_that_others_can_write_is_refused(reference: ParityReference, tmp_path: Path) -> None:
    engine = tmp_path / "teacher.engine"
    parity = write(engine, reference.to_bytes())
    parity_path(engine).chmod(0o664)
    with pytest.raises(EngineError, match=f"is not trusted: group may write to {parity_path(engine)}; if nobody did"):
        load_reference(engine, parity)


def test_reference_outputs_match_rounded_images(reference: ParityReference) -> None:
    assert not torch.equal(reference.images, IMAGES.images)
    assert torch.equal(reference.images.half().float(), reference.images)
    for name, output in NET(reference.images).items():
        torch.testing.assert_close(reference.outputs[name], output)


def test_non_finite_reference_is_refused() -> None:
    with pytest.raises(EngineError, match="the float32 teacher itself returns 'logits' with NaN or inf for 64 of 64"):
        make_reference(off_by(lambda outputs: outputs["logits"].fill_(float("nan"))), IMAGES)


def test_empty_or_overflowing_images_are_refused() -> None:
    with pytest.raises(EngineError, match="no images to check the teacher on in nowhere"):
        make_reference(NET, CalibrationSet(IMAGES.images[:0], "nowhere"))
    with pytest.raises(EngineError, match="the images of raw exceed the range of float16"):
        make_reference(NET, CalibrationSet(IMAGES.images * 1e6, "raw"))


def test_generated_images_are_fixed_and_normalized() -> None:
    first, second = generate_calibration_set(IMAGE_SHAPE), generate_calibration_set(IMAGE_SHAPE)
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (64, *IMAGE_SHAPE)
    assert first.images.std().item() == pytest.approx(1, rel=1e-4)
