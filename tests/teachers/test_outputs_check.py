"""What `open_teacher` finds with a few images, on modules and ONNX files of each kind, and on sound ones."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn.functional import batch_norm, dropout

from kd_pipeline.errors import TeacherError
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.onnx.file import OUTPUTS_KEY, outputs_metadata
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.outputs_check import check_outputs, probability_problem
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
from tests.networks import CLASSES, IMAGE_SHAPE, NUM_CLASSES, ConvNet, LogitsOnly, random_images, vit_backbone
from tests.teachers.onnx_models import (
    LOGITS,
    active_dropout_model,
    fixed_batch_model,
    linear_model,
    noise_model,
    softmax_model,
    training_mode_model,
)

ONNX_BACKENDS = ["onnxruntime", "openvino"]


class Changed(nn.Module):
    """A network with changed logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.change = LogitsOnly(), change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.net(images))


class Normalized(nn.Module):
    """Normalizes its images with the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LogitsOnly()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(batch_norm(images, None, None, training=True))


def problems_of(module: nn.Module, **options: object) -> tuple[str, ...]:
    teacher = open_teacher(TeacherSettings(**options), module=module, image_shape=IMAGE_SHAPE)
    teacher.close()
    return teacher.problems


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"max_batch": 1}])
def test_sound_module_has_no_problems(options: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    assert problems_of(ConvNet(), **options) == ()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_sound_file_has_no_problems(exported: Callable[[int], Path], backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    teacher = open_teacher(TeacherSettings(backend=backend, onnx=exported(0)), image_shape=IMAGE_SHAPE, strict=True)
    assert teacher.problems == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: dropout(logits, 0.1, training=True),
        lambda logits: logits + 0.01 * torch.randn_like(logits),
    ],
    ids=["dropout", "noise"],
)
def test_random_outputs_are_found(change: Callable[[Tensor], Tensor]) -> None:
    (problem,) = problems_of(Changed(change))
    assert "when the same images are run again" in problem and "dropout is active" in problem
    assert "training=True" in problem  # what to look for in a module, which is in eval mode already


class Spoiled(nn.Module):
    """A backbone of which some outputs are changed."""

    def __init__(self, **changes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk, self.changes = vit_backbone(), changes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.trunk(images)
        return outputs | {name: change(outputs[name]) for name, change in self.changes.items()}


def same_for_all(output: Tensor) -> Tensor:
    return torch.zeros_like(output) + torch.arange(output.shape[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": same_for_all}, "returns the same 'pooled' for every image"),
        ({"spatial": same_for_all}, "returns the same 'spatial' for every image"),
        ({"pooled": same_for_all, "spatial": same_for_all}, "the same 'pooled' and 'spatial' for every image"),
        ({"spatial": lambda tokens: tokens / 0}, "returns 'spatial' with NaN or inf"),
        ({"pooled": lambda vectors: vectors.log()}, "returns 'pooled' with NaN or inf"),
        ({"spatial": lambda tokens: torch.where(tokens > 1, -math.inf, tokens)}, "returns 'spatial' with NaN or inf"),
        ({"spatial": lambda tokens: dropout(tokens, 0.1, training=True)}, "are run again ('spatial' by "),
        ({"pooled": lambda vectors: vectors - vectors.mean(0)}, "rest of its batch changes ('pooled' by "),
    ],
)
def test_problem_of_a_backbone_names_the_output(changes: dict[str, Callable[[Tensor], Tensor]], message: str) -> None:
    (problem,) = problems_of(Spoiled(**changes))
    assert message in problem


def test_outputs_that_are_alike_within_an_image_are_fine() -> None:
    """Tokens without positions, and vectors between 0 and 1 that are no logits."""
    changes = {"spatial": lambda tokens: tokens[:, :1].expand_as(tokens), "pooled": lambda each: each.softmax(1)}
    assert problems_of(Spoiled(**changes)) == ()


def test_more_prefix_tokens_than_tokens(tmp_path: Path) -> None:
    """In a file that leaves the number of its tokens open."""
    model = linear_model(outputs=[LOGITS, ("tokens", TensorProto.FLOAT, ["N", "L", 8])])
    model.graph.node[-1].CopyFrom(helper.make_node("ReduceMean", ["images"], ["tokens"], axes=[3], keepdims=0))
    model.opset_import[0].version = 13
    path = tmp_path / "net.onnx"
    for number in (2, 3):
        helper.set_model_props(model, {OUTPUTS_KEY: outputs_metadata({"tokens": number})})
        onnx.save(model, path)
        if number == 2:
            teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))
            assert teacher.outputs["tokens"].num_prefix_tokens == 2
    with pytest.raises(TeacherError, match=r"returns 'tokens' \[3, 3, 8\], which has no tokens after the 3 prefix tok"):
        open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))
    settings = TeacherSettings(backend="onnxruntime", onnx=path, num_prefix_tokens=0)  # the advice
    assert open_teacher(settings).outputs["tokens"].num_prefix_tokens == 0


def test_random_numbers_of_the_run_stay() -> None:
    teacher = open_teacher(TeacherSettings(), module=Changed(torch.rand_like), image_shape=IMAGE_SHAPE)
    state = torch.get_rng_state()
    assert check_outputs(teacher, image_shape=IMAGE_SHAPE, normalization=Normalization())
    assert torch.equal(torch.get_rng_state(), state)


def test_state_between_calls_is_found() -> None:
    class Counting(LogitsOnly):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(images) + torch.arange(NUM_CLASSES) * self.calls

    (problem,) = problems_of(Counting())
    assert "are run again" in problem


@pytest.mark.parametrize(
    "module", [Normalized(), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), LogitsOnly())]
)
def test_batch_statistics_are_found(module: nn.Module) -> None:
    (problem,) = problems_of(module)
    assert "when the rest of its batch changes" in problem and "BatchNorm is in training mode" in problem
    assert "track_running_stats=False" in problem


def test_batch_statistics_of_last_layer_are_found() -> None:
    """Which refuses a single image."""
    with pytest.raises(TeacherError, match=r"BatchNorm is in training mode.* fails on a single image"):
        problems_of(Changed(lambda logits: batch_norm(logits, None, None, training=True)))


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_file_in_training_mode_is_found(tmp_path: Path, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    path = tmp_path / "net.onnx"
    onnx.save(training_mode_model(), path)
    (problem,) = open_teacher(TeacherSettings(backend=backend, onnx=path)).problems
    assert "BatchNorm is in training mode" in problem and "module.eval() before torch.onnx.export" in problem


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_noise_in_a_file_is_found(tmp_path: Path, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    onnx.save(noise_model(), tmp_path / "net.onnx")
    (problem,) = open_teacher(TeacherSettings(backend=backend, onnx=tmp_path / "net.onnx")).problems
    assert "when the same images are run again" in problem


def test_active_dropout_in_a_file_is_refused_or_skipped(tmp_path: Path) -> None:
    onnx.save(active_dropout_model(), tmp_path / "net.onnx")
    # ONNX Runtime leaves dropout out, as an inference should.
    assert open_teacher(TeacherSettings(backend="onnxruntime", onnx=tmp_path / "net.onnx")).problems == ()
    pytest.importorskip("openvino")
    with pytest.raises(TeacherError, match="export it in eval mode"):
        open_teacher(TeacherSettings(backend="openvino", onnx=tmp_path / "net.onnx"))


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize("num_baked", [1, 2, 3, 32])
def test_fixed_batch_is_refused(tmp_path: Path, backend: str, num_baked: int) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    path = tmp_path / "net.onnx"
    onnx.save(fixed_batch_model(num_baked), path)
    with pytest.raises(TeacherError, match="a batch size is fixed inside the model"):
        open_teacher(TeacherSettings(backend=backend, onnx=path))


def test_wrong_number_of_rows_is_refused_in_any_call() -> None:
    teacher = open_teacher(TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE)
    infer = teacher._infer
    teacher._infer = lambda images: {**infer(images), "features": infer(images)["features"].flatten(0, 1)}
    with pytest.raises(TeacherError, match=r"'features' \[128, 8, 8\] for 4 images: a batch size is fixed"):
        teacher(random_images(4))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_softmax_is_found(precision: str) -> None:
    (problem,) = problems_of(Changed(lambda logits: logits.softmax(dim=1)), precision=precision)
    assert "each row sums to 1" in problem and "without the softmax at its end" in problem
    assert "at most 12.5% for the likeliest of 10 classes, where 10.0% is chance" in problem


def test_sigmoid_is_found() -> None:
    (problem,) = problems_of(Changed(lambda logits: torch.sigmoid(3 * logits)))
    assert "all between 0 and 1" in problem and "without the sigmoid at its end" in problem


@pytest.mark.parametrize("change", [lambda logits: logits.log_softmax(dim=1), torch.relu])
def test_log_softmax_and_relu_are_logits(change: Callable[[Tensor], Tensor]) -> None:
    assert problems_of(Changed(change)) == ()


def test_share_at_temperature_4_is_that_of_torch() -> None:
    problem = probability_problem(torch.eye(7))
    assert problem is not None and f"at most {(torch.eye(7) / 4).softmax(1).max():.1%}" in problem
    assert probability_problem(torch.ones(3, 1)) is None  # a single class


def test_excluded_classes_are_no_problem() -> None:
    def exclude(logits: Tensor) -> Tensor:
        return torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], -math.inf)], dim=1)

    assert problems_of(Changed(exclude)) == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    (problem,) = problems_of(Changed(lambda logits: torch.where(logits > 0, value, logits)))
    assert "'logits' with NaN or inf" in problem


def test_constant_outputs_are_found() -> None:
    (problem,) = problems_of(Changed(lambda logits: torch.zeros_like(logits) + torch.arange(10.0)))
    assert "the same 'logits' for every image" in problem


def test_members_are_checked_and_named(tmp_path: Path) -> None:
    members = []
    for name, model in (("sound", linear_model()), ("softmax", softmax_model())):
        onnx.save(model, tmp_path / f"{name}.onnx")
        members.append(TeacherSettings(backend="onnxruntime", onnx=tmp_path / f"{name}.onnx"))
    (problem,) = open_teacher(EnsembleSettings(members=members)).problems
    assert problem.startswith("member 1: ") and "without the softmax" in problem


def test_reordered_teacher_keeps_its_problems(exported: Callable[[int], Path]) -> None:
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0)), image_shape=IMAGE_SHAPE)
    teacher.problems = ("something",)
    assert match_classes(teacher, CLASSES[::-1]).problems == ("something",)


def test_problem_is_a_warning_and_strict_an_error(caplog: pytest.LogCaptureFixture) -> None:
    module = Changed(lambda logits: logits.softmax(dim=1))
    problems = problems_of(module)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == list(problems)
    with pytest.raises(TeacherError, match=r"without the softmax .* probe\.strict: false"):
        open_teacher(TeacherSettings(), module=module, image_shape=IMAGE_SHAPE, strict=True)
    # What the message advises works.
    sound = Changed(nn.Identity())
    assert open_teacher(TeacherSettings(), module=sound, image_shape=IMAGE_SHAPE, strict=True).problems == ()


def test_open_teacher_is_asked_too() -> None:
    teacher = open_teacher(TeacherSettings(), module=Normalized(), image_shape=IMAGE_SHAPE)
    teacher.problems = ()
    assert open_teacher(teacher, image_shape=IMAGE_SHAPE) is teacher and len(teacher.problems) == 1


def test_float16_images() -> None:
    options = {"image_shape": IMAGE_SHAPE, "dtype": torch.float16, "strict": True}
    assert open_teacher(TeacherSettings(), module=ConvNet(), **options).problems == ()


@pytest.mark.slow
def test_compiled_module_is_not_compiled_for_the_check() -> None:
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    teacher = open_teacher(TeacherSettings(compile=True), module=LogitsOnly(), image_shape=IMAGE_SHAPE)
    assert teacher.problems == () and counters["unique_graphs"] == before
    teacher(random_images(4))
    assert counters["unique_graphs"] == before + 1
