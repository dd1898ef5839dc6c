"""Ensembles of real teachers, which run small networks."""

import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import CLASSES, IMAGE_SHAPE, NUM_CLASSES, ConvNet, LogitsOnly, random_images
from tests.teachers.onnx_models import linear_model

WEIGHTS = [3.0, 1.0, 2.0]


def member(seed: int = 0, **settings: object) -> Teacher:
    return open_teacher(TeacherSettings(**settings), module=ConvNet(seed), image_shape=IMAGE_SHAPE)


def members(num: int = 3) -> list[Teacher]:
    return [member(seed) for seed in range(num)]


def member_logits(images: Tensor, num: int = 3) -> list[Tensor]:
    return [ConvNet(seed).eval().requires_grad_(False)(images)["logits"] for seed in range(num)]


def linear(path: Path, **arguments: object) -> Teacher:
    onnx.save(linear_model(**arguments), path)
    return open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))


@pytest.mark.parametrize("num_images", [1, 7])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_softmax_is_weighted_mean(num_images: int, weights: list[float] | None) -> None:
    images = random_images(num_images)
    shares = weights or [1.0, 1.0, 1.0]
    wanted = sum(
        w / sum(shares) * logits.double().softmax(1) for w, logits in zip(shares, member_logits(images), strict=True)
    )
    logits = EnsembleTeacher(members(), weights=weights)(images)["logits"]
    torch.testing.assert_close(logits.double().softmax(1), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits, wanted.log().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_logits_are_weighted_mean(weights: list[float] | None) -> None:
    images = random_images(5)
    shares = weights or [1.0, 1.0, 1.0]
    wanted = sum(w / sum(shares) * logits for w, logits in zip(shares, member_logits(images), strict=True))
    logits = EnsembleTeacher(members(), weights=weights, average="logits")(images)["logits"]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.factor = LogitsOnly(), factor

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) * self.factor


def test_huge_logits_stay_finite() -> None:
    teachers = [open_teacher(TeacherSettings(), module=Scaled(f), image_shape=IMAGE_SHAPE) for f in (1e4, -1e4)]
    logits = EnsembleTeacher(teachers)(random_images(4))["logits"]
    assert logits.isfinite().all()
    top = logits.softmax(1).topk(2).values
    torch.testing.assert_close(top, torch.full_like(top, 0.5))


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_single_member_is_unchanged(average: str) -> None:
    images = random_images(4)
    logits = EnsembleTeacher([member()], average=average)(images)["logits"]
    torch.testing.assert_close(logits.softmax(1), member_logits(images, 1)[0].softmax(1))


@pytest.mark.slow
def test_members_may_differ_in_backend_and_precision(exported: Callable[[int], Path]) -> None:
    pytest.importorskip("openvino")
    teachers = [
        member(0, precision="bf16"),
        open_teacher(TeacherSettings(backend="openvino", onnx=exported(1))),
        open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(2))),
    ]
    ensemble = EnsembleTeacher(teachers)
    assert (ensemble.backend, ensemble.precision) == ("ensemble", "bf16+fp32")
    assert ensemble.classes == CLASSES
    images = random_images(6)
    wanted = sum(logits.softmax(1) for logits in member_logits(images)) / 3
    torch.testing.assert_close(ensemble(images)["logits"].softmax(1), wanted, rtol=0.05, atol=5e-3)


def test_images_and_max_batch_fit_all_members(tmp_path: Path) -> None:
    open_size = ("images", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])
    wide, fixed = linear(tmp_path / "wide.onnx", inputs=[open_size]), linear(tmp_path / "fixed.onnx")
    for teachers in ([wide, fixed], [fixed, wide]):
        ensemble = EnsembleTeacher(teachers)
        assert str(ensemble.images) == "[any, 3, 8, 8] float32"
        with pytest.raises(TeacherError, match=r"takes images \[any, 3, 8, 8\] float32, got \[1, 3, 9, 9\]"):
            ensemble(torch.zeros(1, 3, 9, 9))
    ensemble = EnsembleTeacher([member(0, max_batch=9), member(1, max_batch=4)])
    assert ensemble.max_batch == 4
    with pytest.raises(TeacherError, match="the ensemble teacher takes 1 to 4 images at a time, got 5"):
        ensemble(random_images(5))


def test_different_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError,
        match=r"member 1 \(onnxruntime\) has \[any, 3, 8, 8\] float32, those before it \[any, 3, 32, 32\] float32",
    ):
        EnsembleTeacher([member(), linear(tmp_path / "small.onnx")])
    half = open_teacher(TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE, dtype=torch.float16)
    with pytest.raises(TeacherError, match=r"\[any, 3, 32, 32\] float16, those before it \[any, 3, 32, 32\] float32"):
        EnsembleTeacher([member(), half])


def test_different_num_classes_are_refused() -> None:
    five = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    other = open_teacher(TeacherSettings(), module=five, image_shape=IMAGE_SHAPE)
    with pytest.raises(
        TeacherError, match=r"must share their logits: .*\[any, 5\] float32, those before it \[any, 10\] float32"
    ):
        EnsembleTeacher([member(), other])


def test_different_devices_are_refused() -> None:
    other = member(1)
    other.device = torch.device("meta")
    with pytest.raises(TeacherError, match=r"member 1 \(pytorch\) is on meta, member 0 on cpu"):
        EnsembleTeacher([member(0), other])


def test_different_class_names_are_refused(tmp_path: Path) -> None:
    def named(name: str, classes: str) -> Teacher:
        return linear(tmp_path / f"{name}.onnx", metadata={"kd_pipeline.classes": classes})

    first = named("first", '["ant", "bee", "cat", "dog", "eel"]')
    nameless = linear(tmp_path / "nameless.onnx")
    assert EnsembleTeacher([nameless, first, nameless]).classes == ("ant", "bee", "cat", "dog", "eel")
    assert EnsembleTeacher([nameless]).classes is None
    with pytest.raises(
        TeacherError, match=r"logit 2 is 'dog' for member 2 \(onnxruntime\) and 'cat' for member 1; reorder"
    ):
        EnsembleTeacher([nameless, first, named("other", '["ant", "bee", "dog", "cat", "eel"]')])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "has 2 teachers and 1 weights"),
        ([1.0, 0.0], "weight 1 of the ensemble should be a positive number, got 0.0"),
        ([-1.0, 2.0], "weight 0 .* got -1.0"),
        ([1.0, math.nan], "got nan"),
        ([math.inf, 1.0], "got inf"),
    ],
)
def test_invalid_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EnsembleTeacher(members(2), weights=weights)


def test_empty_ensemble_is_refused() -> None:
    with pytest.raises(ConfigError, match="an ensemble of no teachers"):
        EnsembleTeacher([])


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_ensemble_keeps_contract(average: str) -> None:
    ensemble = EnsembleTeacher(members(), average=average)
    images = random_images(4)
    before = images.clone()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ensemble(images)
    outputs = ensemble(images.requires_grad_())
    assert outputs.keys() == ensemble.outputs.keys() == {"logits"}
    logits = outputs["logits"]
    assert ensemble.outputs["logits"].accepts(tuple(logits.shape), logits.dtype)
    assert str(ensemble.outputs["logits"]) == f"[any, {NUM_CLASSES}] float32"
    assert torch.equal(under_autocast["logits"], logits)
    assert not logits.requires_grad and not under_autocast["logits"].is_inference()
    assert torch.equal(images, before)
    kept = logits.clone()
    assert not torch.equal(ensemble(random_images(4, seed=1))["logits"], kept)
    assert torch.equal(logits, kept)
    logits.add_(1.0)
    assert torch.equal(ensemble(images)["logits"], kept)
    assert not isinstance(ensemble, nn.Module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_no_gpu_sync(average: str) -> None:
    teachers = [
        open_teacher(TeacherSettings(), module=ConvNet(seed), image_shape=IMAGE_SHAPE, device="cuda")
        for seed in range(2)
    ]
    ensemble, images = EnsembleTeacher(teachers, average=average), random_images(4).cuda()
    ensemble(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ensemble(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_close_closes_members() -> None:
    teachers = members(2)
    ensemble = EnsembleTeacher(teachers)
    ensemble.close()
    ensemble.close()
    for closed, backend in ((ensemble, "ensemble"), (teachers[0], "pytorch"), (teachers[1], "pytorch")):
        with pytest.raises(TeacherError, match=f"the {backend} teacher is closed"):
            closed(random_images(1))


def test_closed_member_is_named() -> None:
    teachers = members(2)
    ensemble = EnsembleTeacher(teachers)
    teachers[1].close()
    with pytest.raises(TeacherError, match=r"the ensemble teacher failed on images .*: the pytorch teacher is closed"):
        ensemble(random_images(1))


def test_fingerprint_depends_on_members_and_weights() -> None:
    ensemble = EnsembleTeacher(members(2))
    same = [EnsembleTeacher(members(2)), EnsembleTeacher(members(2), weights=[5.0, 5.0])]
    others = [
        EnsembleTeacher(members(3)),
        EnsembleTeacher([member(0), member(2)]),
        EnsembleTeacher([member(0), member(1, precision="bf16")]),
        EnsembleTeacher(members(2), weights=[1.0, 2.0]),
        EnsembleTeacher(members(2), average="logits"),
    ]
    assert all(other.fingerprint == ensemble.fingerprint for other in same)
    assert len({other.fingerprint for other in [ensemble, *others]}) == 1 + len(others)
