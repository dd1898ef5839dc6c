"""A converted teacher passes only with finite answers of the right shape that are close to float32's."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.manifest import Parity
from kd_pipeline.teachers.tensorrt.parity import (
    Exam,
    Samples,
    compare,
    exam_path,
    generated_samples,
    load_exam,
    set_exam,
)
from tests.networks import IMAGE_SHAPE, ConvNet, random_images

SAMPLES = Samples(random_images(64), "the test")
NET = ConvNet().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exam() -> Exam:
    return set_exam(NET, SAMPLES)


def off_by(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The network with changed answers."""

    def teacher(images: Tensor) -> dict[str, Tensor]:
        answers = {name: answer.clone() for name, answer in NET(images).items()}
        change(answers)
        return answers

    return teacher


def test_a_teacher_agrees_with_itself(exam: Exam) -> None:
    figures = compare(exam, NET, batch_sizes=(1, 7, 64, 100), precision="fp16")
    assert figures["cosine"] == pytest.approx(1, abs=1e-9)
    assert figures["top1_agreement"] == 1
    assert figures["kl"] == pytest.approx(0, abs=1e-9)


def test_the_figures_are_those_of_their_definitions(exam: Exam) -> None:
    noise = 0.01 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    answers = {"logits": exam.answers["logits"] + noise, "features": exam.answers["features"]}
    figures = compare(exam, lambda images: answers, batch_sizes=(64,), precision="int8")
    wanted, found = exam.answers["logits"].double(), answers["logits"].double()
    assert figures["cosine"] == pytest.approx(torch.cosine_similarity(wanted, found).min().item(), rel=1e-12)
    target, log_input = (wanted / 4).softmax(1), (found / 4).log_softmax(1)
    assert figures["kl"] == pytest.approx((target * (target.log() - log_input)).sum(1).mean().item(), rel=1e-6)
    assert 0 < figures["kl"] < 1e-3


def test_every_batch_has_the_size_that_it_is_asked_for_and_every_image_counts(exam: Exam) -> None:
    sizes = []

    def teacher(images: Tensor) -> dict[str, Tensor]:
        sizes.append(len(images))
        return NET(images)

    compare(exam, teacher, batch_sizes=(48, 1, 100), precision="fp16")
    assert sizes == [1] * 64 + [48] * 2 + [100]

    def last_image_is_wrong(images: Tensor) -> dict[str, Tensor]:
        answers = NET(images)
        return {name: torch.where(_is_last(images, exam, answer), -answer, answer) for name, answer in answers.items()}

    for size in (1, 48, 100):
        with pytest.raises(EngineError, match=f"in batches of {size} are too far from float32"):
            compare(exam, last_image_is_wrong, batch_sizes=(size,), precision="int8")


def _is_last(images: Tensor, exam: Exam, answer: Tensor) -> Tensor:
    found = (images == exam.images[-1]).flatten(1).all(1)
    return found.view(-1, *[1] * (answer.ndim - 1))


def test_a_teacher_that_fails_at_one_batch_size_alone_is_refused_with_that_size(exam: Exam) -> None:
    def teacher(images: Tensor) -> dict[str, Tensor]:
        answers = NET(images)
        return answers if len(images) != 32 else {name: answer.flip(0) for name, answer in answers.items()}

    with pytest.raises(EngineError, match="in batches of 32 are too far"):
        compare(exam, teacher, batch_sizes=(1, 32, 64), precision="fp32")


def test_the_worst_output_comes_first_in_the_message(exam: Exam) -> None:
    def change(answers: dict[str, Tensor]) -> None:
        answers["features"] += torch.randn(answers["features"].shape, generator=torch.Generator().manual_seed(0))

    with pytest.raises(
        EngineError, match=r"cosine 0\.\d+ \(allowed from 0.999\).*worst first: 'features' 0\.\d+, 'log"
    ):
        compare(exam, off_by(change), batch_sizes=(64,), precision="bf16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["logits", "features"])
def test_one_answer_that_is_not_finite_is_refused_and_counted(exam: Exam, name: str, value: float) -> None:
    def change(answers: dict[str, Tensor]) -> None:
        answers[name][3] = value

    with pytest.raises(EngineError, match=f"answers '{name}' with NaN or inf for 1 of 64 images.*take bf16"):
        compare(exam, off_by(change), batch_sizes=(64,), precision="fp16")


def test_an_answer_of_another_shape_or_none_is_refused_with_both(exam: Exam) -> None:
    with pytest.raises(EngineError, match=r"gives 'logits' as \[64, 9\], the float32 one as \[64, 10\]"):
        compare(exam, off_by(lambda a: a.update(logits=a["logits"][:, 1:])), batch_sizes=(64,), precision="fp16")
    with pytest.raises(EngineError, match=r"gives 'features' as None"):
        compare(exam, off_by(lambda a: a.pop("features")), batch_sizes=(64,), precision="fp16")


def test_classes_in_another_order_are_refused(exam: Exam) -> None:
    with pytest.raises(EngineError, match="top1_agreement"):
        compare(exam, off_by(lambda a: a.update(logits=a["logits"].roll(1, 1))), batch_sizes=(64,), precision="int8")


def test_a_tie_that_rounding_breaks_is_no_disagreement_and_a_clear_lead_that_it_breaks_is() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    first, second = logits.topk(2, 1).indices.T
    rows = torch.arange(64)
    logits[rows, second] = logits[rows, first] - 1e-4
    exam = Exam(SAMPLES.images, {"logits": logits}, "ties")
    swapped = logits.clone()
    swapped[rows, second] += 2e-4
    assert compare(exam, lambda images: {"logits": swapped}, batch_sizes=(64,), precision="fp16")["top1_agreement"] == 1

    logits[rows, first] += 0.2
    swapped = logits.clone()
    swapped[rows[:2], second[:2]] += 0.3
    with pytest.raises(EngineError, match=r"top1_agreement 0.9688 \(allowed from 0.99\)"):
        compare(exam, lambda images: {"logits": swapped}, batch_sizes=(64,), precision="fp16")


def test_half_precision_is_held_to_more_than_eight_bits(exam: Exam) -> None:
    def change(answers: dict[str, Tensor]) -> None:
        noise = torch.randn(answers["features"].shape, generator=torch.Generator().manual_seed(0))
        answers["features"] += 0.08 * noise * answers["features"].std()

    assert compare(exam, off_by(change), batch_sizes=(64,), precision="int8")["cosine"] < 0.999
    with pytest.raises(EngineError, match="cosine"):
        compare(exam, off_by(change), batch_sizes=(64,), precision="fp16")


def test_an_exam_is_kept_bit_for_bit(exam: Exam, tmp_path: Path) -> None:
    engine = tmp_path / "teacher.engine"
    content = exam.to_bytes()
    exam_path(engine).write_bytes(content)
    parity = Parity(
        measured_on="onnx",
        images="the test",
        num_images=64,
        batch_sizes=(64,),
        cosine=1,
        top1_agreement=1,
        kl=0,
        tensors_sha256=hashlib.sha256(content).hexdigest(),
    )
    found = load_exam(engine, parity)
    assert found.source == "the test"
    assert torch.equal(found.images, exam.images)
    assert found.answers.keys() == exam.answers.keys()
    assert all(torch.equal(found.answers[name], answer) for name, answer in exam.answers.items())

    exam_path(engine).write_bytes(content[:-1])
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz has the sha256 .*, wanted .*build the engine"):
        load_exam(engine, parity)
    exam_path(engine).unlink()
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz cannot be read"):
        load_exam(engine, parity)


def test_the_answers_of_an_exam_are_those_to_the_images_as_it_keeps_them(exam: Exam) -> None:
    assert not torch.equal(exam.images, SAMPLES.images)
    assert torch.equal(exam.images.half().float(), exam.images)
    for name, answer in NET(exam.images).items():
        torch.testing.assert_close(exam.answers[name], answer)


def test_a_float32_teacher_that_answers_nan_makes_no_exam() -> None:
    with pytest.raises(EngineError, match="the float32 teacher itself answers 'logits' with NaN or inf for 64 of 64"):
        set_exam(off_by(lambda answers: answers["logits"].fill_(float("nan"))), SAMPLES)


def test_no_images_and_images_beyond_float16_make_no_exam() -> None:
    with pytest.raises(EngineError, match="no images to compare the teacher on in nowhere"):
        set_exam(NET, Samples(SAMPLES.images[:0], "nowhere"))
    with pytest.raises(EngineError, match="the images of raw leave the range of float16"):
        set_exam(NET, Samples(SAMPLES.images * 1e6, "raw"))


def test_generated_images_are_always_the_same_and_normalized() -> None:
    first, second = generated_samples(IMAGE_SHAPE), generated_samples(IMAGE_SHAPE)
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (64, *IMAGE_SHAPE)
    assert first.images.std().item() == pytest.approx(1, rel=1e-4)
