import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from kd_pipeline import losses
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.distillation import Distillation, DistillSettings
from kd_pipeline.models.features import with_features
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.networks import IMAGE_SHAPE, NUM_CLASSES, LogitsOnly, random_images

MAP_LAYER = "net.body.2"
"""`[N, 16, 16, 16]` in a `LogitsOnly`."""
END_LAYER = "net.body.5"
"""`[N, 32, 8, 8]`."""


class WideNet(nn.Module):
    """A teacher with more channels than the student."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(9)
            self.layer1 = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU())
            self.layer2 = nn.Sequential(nn.Conv2d(24, 40, 3, stride=2, padding=1), nn.ReLU())
            self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(40, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pooled(self.layer2(self.layer1(images))))


class ReturnsText(nn.Module):
    def forward(self, images):
        return "images"


@pytest.fixture(scope="module")
def teacher():
    return PyTorchTeacher(with_features(WideNet(), ["layer1", "layer2", "pooled"]), image_shape=IMAGE_SHAPE)


def make_batch(teacher=None, *, valid=(True, True, False, True), labels=(3, 1, 4, 1), seed=0) -> KDBatch:
    images = random_images(len(valid), seed=seed)
    return KDBatch(
        images=images,
        labels=None if labels is None else torch.tensor(labels),
        index=torch.arange(len(valid)),
        valid=torch.tensor(valid),
        teacher={} if teacher is None else teacher(images),
    )


def make(settings, teacher=None, *, student=None, kind=Distillation, **arguments) -> Distillation:
    return kind(
        DistillSettings.model_validate(settings),
        student=LogitsOnly() if student is None else student,
        teacher_outputs=None if teacher is None else teacher.outputs,
        image_shape=IMAGE_SHAPE,
        num_classes=NUM_CLASSES,
        **arguments,
    )


def run(distillation, student, batch, *, epoch=0.0, epochs=10):
    with distillation.student_features(student) as features:
        logits = student(batch.images)
    return logits, features, distillation(logits, features, batch, epoch=epoch, epochs=epochs)


def test_weighted_sum_of_task_and_distill(teacher):
    student, batch = LogitsOnly(), make_batch(teacher)
    distillation = make(
        {"temperature": 3.0, "distill_weight": 0.7, "task_weight": 0.2, "label_smoothing": 0.1}, teacher
    )
    logits, features, result = run(distillation, student, batch)
    task = losses.task(logits, batch.labels, label_smoothing=0.1, valid=batch.valid)
    soft = losses.soft_target(logits, batch.teacher["logits"], temperature=3.0, valid=batch.valid)
    assert not features
    assert result.terms == {"task": task, "distill": soft}
    assert result.weights == {"task": 0.2, "distill": 0.7}
    assert result.temperature == 3.0
    torch.testing.assert_close(result.total, 0.2 * task + 0.7 * soft)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "dkd", "temperature": 2.0}, lambda s, t, y, v: losses.dkd(s, t, y, temperature=2.0, valid=v)),
        (
            {"loss": "dkd", "options": {"alpha": 0.5, "beta": 2.0}},
            lambda s, t, y, v: losses.dkd(s, t, y, alpha=0.5, beta=2.0, temperature=4.0, valid=v),
        ),
        ({"loss": "dist"}, lambda s, t, y, v: losses.dist(s, t, temperature=1.0, valid=v)),
        (
            {"loss": "dist", "temperature": 1.0, "options": {"intra_weight": 2.0}},
            lambda s, t, y, v: losses.dist(s, t, intra_weight=2.0, valid=v),
        ),
        ({"loss": "logit_mse"}, lambda s, t, y, v: losses.logit_mse(s, t, valid=v)),
        ({"loss": "cosine"}, lambda s, t, y, v: losses.cosine(s, t, valid=v)),
        (
            {"loss": "hard_label", "options": {"label_smoothing": 0.1}},
            lambda s, t, y, v: losses.hard_label(s, t, label_smoothing=0.1, valid=v),
        ),
        (
            {"options": {"standardize": True, "form": "cross_entropy"}},
            lambda s, t, y, v: losses.soft_target(s, t, standardize=True, form="cross_entropy", valid=v),
        ),
    ],
)
def test_options_and_temperature_reach_loss(teacher, settings, expected):
    student, batch = LogitsOnly(), make_batch(teacher)
    logits, _, result = run(make(settings, teacher), student, batch)
    torch.testing.assert_close(
        result.terms["distill"], expected(logits, batch.teacher["logits"], batch.labels, batch.valid)
    )
    own = {"soft_target": 4.0, "dkd": 4.0, "dist": 1.0}.get(settings.get("loss", "soft_target"))
    assert result.temperature == settings.get("temperature", own)


def test_one_word_is_one_loss(teacher):
    """As the main loss and as an extra term; `dist` has no temperature of 4 because `soft_target` has."""
    student, batch = LogitsOnly(), make_batch(teacher)
    for loss in ("soft_target", "dkd", "dist", "logit_mse", "cosine", "hard_label"):
        _, _, result = run(make({"loss": loss, "features": [{"loss": loss}]}, teacher), student, batch)
        assert result.terms["distill"] == result.terms[loss]


def test_features_are_extra_terms(teacher):
    student, batch = LogitsOnly(), make_batch(teacher)
    settings = {
        "features": [
            {"loss": "attention_transfer", "student": MAP_LAYER, "teacher": "layer1", "weight": 1000},
            {"loss": "feature_mse", "student": END_LAYER, "teacher": "layer2", "weight": 2, "projector": "conv"},
            {"loss": "dist", "weight": 0.5, "temperature": 3},
        ]
    }
    distillation = make(settings, teacher)
    logits, features, result = run(distillation, student, batch)
    attention, distance, correlation = list(result.terms.values())[2:]
    assert list(result.terms)[2:] == [f"attention_transfer.{MAP_LAYER}", f"feature_mse.{END_LAYER}", "dist"]
    teacher_outputs, valid = batch.teacher, batch.valid
    assert attention == losses.attention_transfer(features[MAP_LAYER], teacher_outputs["layer1"], valid=valid)
    projected = distillation.projectors[1](features[END_LAYER])
    assert distance == losses.feature_mse(projected, teacher_outputs["layer2"], valid=valid)
    assert correlation == losses.dist(logits, teacher_outputs["logits"], temperature=3.0, valid=valid)
    expected_total = 0.1 * result.terms["task"] + 0.9 * result.terms["distill"] + 1000 * attention + 2 * distance
    torch.testing.assert_close(result.total, expected_total + 0.5 * correlation)


def test_linear_projector(teacher):
    student = WideNet()
    student.pooled.append(nn.Linear(40, 12))
    student.head = nn.Linear(12, NUM_CLASSES)
    term = {"loss": "feature_cosine", "student": "pooled", "teacher": "pooled", "projector": "linear"}
    distillation = make({"features": [term]}, teacher, student=student)
    _, features, result = run(distillation, student, make_batch(teacher))
    assert distillation.projectors[0].weight.shape == (40, 12)
    assert features["pooled"].shape == (4, 12)
    assert result.terms["feature_cosine.pooled"] > 0


def test_gradients_reach_student_and_projectors(teacher):
    student, batch = LogitsOnly(), make_batch(teacher)
    terms = [
        {"loss": loss, "student": END_LAYER, "teacher": "layer2", "projector": "conv"}
        for loss in ("feature_mse", "feature_cosine", "channel_wise")
    ]
    distillation = make({"features": terms, "loss": "dist"}, teacher)
    run(distillation, student, batch)[2].total.backward()
    for parameter in (*student.parameters(), *distillation.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


def test_parameters_are_those_of_projectors(teacher):
    term = {"student": END_LAYER, "teacher": "layer2"}
    settings = {
        "features": [
            {"loss": "attention_transfer", **term},
            {"loss": "feature_mse", "projector": "conv", **term},
        ]
    }
    distillation = make(settings, teacher)
    shapes = {name: list(parameter.shape) for name, parameter in distillation.named_parameters()}
    assert shapes == {"projectors.1.weight": [40, 32, 1, 1], "projectors.1.bias": [40]}
    assert set(distillation.state_dict()) == set(shapes)
    twin = make(settings, teacher)
    twin.load_state_dict(distillation.state_dict())
    assert twin.projectors[1].weight.equal(distillation.projectors[1].weight)
    assert not list(make({}, teacher).parameters())


def test_zero_weight_disables_term(teacher):
    student = LogitsOnly()
    term = {"loss": "feature_mse", "student": END_LAYER, "teacher": "layer2", "projector": "conv", "weight": 0}
    distillation = make({"task_weight": 0, "features": [term]}, teacher)
    _, features, result = run(distillation, student, make_batch(teacher, labels=None))
    assert list(result.terms) == ["distill"]
    assert not features
    assert not list(distillation.parameters())


def test_without_teacher_loss_is_cross_entropy():
    student, batch = LogitsOnly(), make_batch()
    settings = {"task_weight": 0.1, "label_smoothing": 0.1, "features": [{"loss": "feature_mse", "student": "nowhere"}]}
    logits, _, result = run(make(settings), student, batch)
    assert result.total == losses.task(logits, batch.labels, label_smoothing=0.1, valid=batch.valid)
    assert (list(result.terms), result.weights, result.temperature) == (["task"], {"task": 1.0}, None)


def test_soft_labels_reach_task_loss(teacher):
    student, batch = LogitsOnly(), make_batch(teacher)
    mixed = torch.rand(4, NUM_CLASSES).softmax(1)
    logits, _, result = run(make({}, teacher, labels_are_soft=True), student, batch.replace(labels=mixed))
    assert result.terms["task"] == losses.task(logits, mixed, valid=batch.valid)


@pytest.mark.parametrize("settings", [{"loss": "dkd"}, {"features": [{"loss": "dkd"}]}])
def test_dkd_rejects_soft_labels(teacher, settings):
    make(settings, teacher, labels_are_soft=False)
    with pytest.raises(ConfigError, match=r"dkd needs one class per image.*disable mixup and cutmix"):
        make(settings, teacher, labels_are_soft=True)
    make({"loss": "dkd", "distill_weight": 0}, teacher, labels_are_soft=True)


def test_unlabeled_images(teacher):
    student, batch = LogitsOnly(), make_batch(teacher, labels=None)
    assert list(run(make({"task_weight": 0.0}, teacher), student, batch)[2].terms) == ["distill"]
    for settings in ({}, {"loss": "dkd", "task_weight": 0.0}):
        with pytest.raises(ConfigError, match="needs labels and the batch has none"):
            run(make(settings, teacher), student, batch)


def test_invalid_rows_are_ignored(teacher):
    settings = {
        "features": [
            {"loss": "attention_transfer", "student": MAP_LAYER, "teacher": "layer1"},
            {"loss": "feature_mse", "student": END_LAYER, "teacher": "layer2", "projector": "conv"},
        ]
    }
    student, batch = LogitsOnly().eval(), make_batch(teacher)
    distillation = make(settings, teacher)
    expected = run(distillation, student, batch)[2]
    garbage = {name: tensor.clone() for name, tensor in batch.teacher.items()}
    for tensor in garbage.values():
        tensor[2] = float("nan")
    labels = batch.labels.clone()
    labels[2] = -5
    found = run(distillation, student, batch.replace(teacher=garbage, labels=labels))[2]
    assert found.total == expected.total
    assert found.total.isfinite()


def test_ramps_change_within_epoch(teacher):
    settings = {
        "temperature": {"start": 10, "end": 2},
        "distill_weight": {"start": 0, "end": 1, "epochs": 5},
        "task_weight": {"start": 1, "end": 0, "epochs": 5},
        "features": [
            {"loss": "soft_target", "temperature": {"start": 1, "end": 3}, "weight": {"start": 4, "end": 8}},
        ],
    }
    student, batch = LogitsOnly().eval(), make_batch(teacher)
    distillation = make(settings, teacher)
    for epoch, temperature, weight in ((0.0, 10, 0), (0.25, 9.8, 0.05), (2.5, 8, 0.5), (7.5, 4, 1), (10.0, 2, 1)):
        logits, _, result = run(distillation, student, batch, epoch=epoch)
        assert result.temperature == pytest.approx(temperature)
        extra = pytest.approx(4 + 0.4 * epoch)
        assert result.weights == {
            "task": pytest.approx(1 - weight),
            "distill": pytest.approx(weight),
            "soft_target": extra,
        }
        teacher_logits = batch.teacher["logits"]
        soft = losses.soft_target(logits, teacher_logits, temperature=temperature, valid=batch.valid)
        torch.testing.assert_close(result.terms["distill"], soft)
        second = losses.soft_target(logits, teacher_logits, temperature=1 + 0.2 * epoch, valid=batch.valid)
        torch.testing.assert_close(result.terms["soft_target"], second)
        expected_total = (1 - weight) * result.terms["task"] + weight * soft + (4 + 0.4 * epoch) * second
        torch.testing.assert_close(result.total, expected_total)


def mean_absolute_error(logits: Tensor, batch: KDBatch) -> Tensor:
    return (logits - batch.teacher["logits"]).abs().mean(1)[batch.valid].mean()


def test_custom_loss_function(teacher):
    student, batch = LogitsOnly(), make_batch(teacher)
    logits, _, result = run(make({"task_weight": 0.4}, teacher, loss=mean_absolute_error), student, batch)
    assert result.terms["distill"] == mean_absolute_error(logits, batch)
    assert result.weights == {"task": 0.4, "distill": 0.6}
    assert result.temperature is None


def test_subclass_overrides_distill_loss(teacher):
    class Doubled(Distillation):
        def distill_loss(self, logits, features, batch, temperature):
            return 2 * super().distill_loss(logits, features, batch, temperature)

    student, batch = LogitsOnly().eval(), make_batch(teacher)
    expected = run(make({}, teacher), student, batch)[2].terms["distill"]
    assert run(make({}, teacher, kind=Doubled), student, batch)[2].terms["distill"] == 2 * expected


def test_custom_loss_needs_plugin(teacher, tmp_path, monkeypatch):
    (tmp_path / "my_kd_losses.py").write_text("def mine(logits, batch):\n    return logits.square().mean()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"loss": "my_kd_losses:mine"}
    with pytest.raises(ConfigError, match=r"would run code of the module my_kd_losses; allow it with --plugin"):
        make(settings, teacher)
    assert "my_kd_losses" not in sys.modules
    student, batch = LogitsOnly(), make_batch(teacher)
    logits, _, result = run(make(settings, teacher, plugins=["my_kd_losses"]), student, batch)
    assert result.terms["distill"] == logits.square().mean()
    monkeypatch.delitem(sys.modules, "my_kd_losses")
    with pytest.raises(ConfigError, match=r"my_kd_losses.py has no function called 'yours'"):
        make({"loss": "my_kd_losses:yours"}, teacher, plugins=["my_kd_losses"])
    with pytest.raises(ConfigError, match=r"the plugin no_such_losses cannot be imported"):
        make({"loss": "no_such_losses:mine"}, teacher, plugins=["no_such_losses"])


@pytest.mark.parametrize(("returned", "found"), [(lambda s, b: s.mean(1), r"\[4\]"), (lambda s, b: 1.0, "float")])
def test_custom_loss_must_return_scalar(teacher, returned, found):
    with pytest.raises(ConfigError, match=f"should return a scalar tensor, got {found}"):
        run(make({}, teacher, loss=returned), LogitsOnly(), make_batch(teacher))


def focal(logits: Tensor, batch: KDBatch) -> Tensor:
    log_q = logits.log_softmax(1).gather(1, batch.labels[:, None])[batch.valid]
    return (-((1 - log_q.exp()) ** 2) * log_q).mean()


def test_task_loss_function(teacher):
    student, batch = LogitsOnly().eval(), make_batch(teacher)
    logits, _, result = run(make({"task_weight": 0.4}, teacher, task_loss=focal), student, batch)
    usual = run(make({"task_weight": 0.4}, teacher), student, batch)[2]
    assert result.terms == {"task": focal(logits, batch), "distill": usual.terms["distill"]}
    assert result.weights == usual.weights
    alone = run(make({}, task_loss=focal), student, make_batch())[2]
    assert alone.terms == {"task": focal(logits, batch)} and alone.weights == {"task": 1.0}
    with pytest.raises(ConfigError, match=r"the task loss .* should return a scalar tensor, got \[4, 10\]"):
        run(make({}, teacher, task_loss=lambda outputs, batch: outputs), student, batch)


def test_task_loss_of_the_settings_needs_plugin(teacher):
    settings = {"task_loss": f"{__name__}:focal", "loss": None}
    with pytest.raises(ConfigError, match=r"distill.task_loss: .* allow it with --plugin"):
        make(settings)
    student, batch = LogitsOnly(), make_batch(teacher)
    logits, _, result = run(make(settings, teacher, plugins=[__name__]), student, batch)
    assert result.terms == {"task": focal(logits, batch)} and result.weights == {"task": 1.0}


def test_task_loss_of_a_student_without_logits(teacher):
    class Values(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"value": images.mean((1, 2, 3))}

    class Regression(Distillation):
        def task_loss(self, outputs, batch):
            return (outputs["value"] - batch.labels).square()[batch.valid].mean()

    batch = make_batch(teacher)
    settings = {"distill_weight": 0.0, "task_weight": 1.0}
    distillation = make(settings, teacher, student=Values(), kind=Regression)
    outputs, features, result = run(distillation, Values(), batch)
    assert result.total == distillation.task_loss(outputs, batch)
    assert [each.shape for each in distillation.compared(outputs, features)] == [(4,)]


class TwoHeads(nn.Module):
    """As of torchvision's networks with an auxiliary classifier, which have it in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.other = LogitsOnly(), WideNet()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        aux = {"aux": self.other(images)} if self.training else {}
        return {"logits": self.main(images)} | aux


def test_weighted_heads(teacher):
    student, batch = TwoHeads(), make_batch(teacher)
    settings = {"heads": {"aux": 0.5}, "label_smoothing": 0.1}
    distillation = make(settings, teacher, student=student)
    outputs, _, result = run(distillation, student, batch)
    main, aux = (losses.task(each, batch.labels, label_smoothing=0.1, valid=batch.valid) for each in outputs.values())
    assert result.terms["task"] == main and result.terms["task.aux"] == aux
    torch.testing.assert_close(result.total, 0.1 * main + 0.9 * result.terms["distill"] + 0.5 * aux)
    evaluated = distillation.eval()(student.eval()(batch.images), {}, batch, epoch=0, epochs=1)
    assert evaluated.terms.keys() == {"task", "distill"}
    baseline = make(settings, student=student)
    assert run(baseline, student.train(), batch)[2].weights == {"task": 1.0, "task.aux": 0.5}
    with pytest.raises(ConfigError, match=r"the loss needs 'aux' among .* found 'logits'"):
        run(baseline, LogitsOnly(), batch)


def spec(*shape) -> TensorSpec:
    return TensorSpec((None, *shape), torch.float32)


FEATURE = {"loss": "feature_mse", "student": END_LAYER, "teacher": "layer2", "projector": "conv"}


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"student": "net.body.9"}, ["no layer called 'net.body.9'", "did you mean 'net.body"]),
        ({"teacher": "layer3"}, ["no output called 'layer3'", "did you mean 'layer2' or 'layer1'"]),
        ({"projector": "none"}, [f"feature_mse.{END_LAYER}", "[2, 32, 8, 8]", "[2, 40, 8, 8]", "projector"]),
        ({"projector": "linear"}, ["projector: linear", "[2, 32, 8, 8]", "[any, 40, 8, 8]", "tokens [N, L, D]"]),
        ({"teacher": "pooled"}, ["projector: conv", "[2, 32, 8, 8]", "[any, 40]", "maps [N, C, H, W]"]),
        ({"teacher": "pooled", "loss": "channel_wise"}, ["[2, 32, 8, 8]", "[any, 40]", "compares maps"]),
        ({"loss": "dist"}, ["[2, 32, 8, 8]", "[any, 40, 8, 8]", "dist.", "compares vectors"]),
        ({"standardize": "phi_s", "teacher": "wide"}, ["[2, 32, 8, 8]", "[any, 52]", "phi_s", "standardize: global"]),
        ({"projector": "none", "loss": "relational", "teacher": "pooled"}, ["[2, 32]", "[2, 40]", "[any, 40]"]),
        ({"student": "net.body.1"}, ["'net.body.1'", "in place"]),
    ],
)
def test_mismatched_term(teacher, term, words):
    make({"features": [FEATURE]}, teacher)
    if term.get("teacher") == "wide":
        teacher, term = SimpleNamespace(outputs={**teacher.outputs, "wide": spec(52)}), term | {"projector": "auto"}
    with pytest.raises(ConfigError) as caught:
        make({"features": [FEATURE | term]}, teacher)
    for word in words:
        assert word in str(caught.value)


def test_invalid_option_fails_early(teacher):
    with pytest.raises(ConfigError, match=r"distill: label_smoothing must be .* got 1.5"):
        make({"loss": "hard_label", "options": {"label_smoothing": 1.5}}, teacher)


def test_mismatched_num_classes():
    arguments = {"student": LogitsOnly(), "image_shape": IMAGE_SHAPE}
    with pytest.raises(ConfigError, match="the teacher has 1001 classes and the data has 10"):
        Distillation(DistillSettings(), teacher_outputs={"logits": spec(1001)}, num_classes=10, **arguments)
    with pytest.raises(ConfigError, match=r"should return logits \[2, 7\] for 2 samples of 7 classes, got \[2, 10\]"):
        Distillation(DistillSettings(), teacher_outputs=None, num_classes=7, **arguments)


def test_invalid_student():
    with pytest.raises(ConfigError, match=r"a student returns a tensor, a tuple, or a mapping .*, got str; wrap"):
        make({}, student=ReturnsText())
    with pytest.raises(ConfigError, match=r"the student Conv2d fails on zeros \[2, 3, 32, 32\]"):
        make({}, student=nn.Conv2d(4, 4, 1))


def test_dynamic_teacher_shape(teacher):
    outputs = teacher.outputs | {"layer2": TensorSpec((None, 40, None, None), torch.float32)}
    student, batch = LogitsOnly(), make_batch(teacher)
    distillation = Distillation(
        DistillSettings.model_validate({"features": [FEATURE]}),
        student=student,
        teacher_outputs=outputs,
        image_shape=IMAGE_SHAPE,
        num_classes=NUM_CLASSES,
    )
    assert run(distillation, student, batch)[2].total.isfinite()


def test_missing_features(teacher):
    student, batch = LogitsOnly(), make_batch(teacher)
    distillation = make({"features": [FEATURE]}, teacher)
    logits, features, _ = run(distillation, student, batch)
    with pytest.raises(
        ConfigError, match=rf"'{END_LAYER}' among the student's outputs and features .*student_features.* 'logits'"
    ):
        distillation(logits, {}, batch, epoch=0, epochs=1)
    with pytest.raises(ConfigError, match=r"'logits' among the batch's teacher outputs .* found nothing"):
        distillation(logits, features, batch.replace(teacher={}), epoch=0, epochs=1)


def test_dry_run_leaves_student_unchanged(teacher):
    student = LogitsOnly().train()
    student.net.head.eval()
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(0)
    position = torch.get_rng_state()
    make({"features": [FEATURE | {"loss": "attention_transfer", "projector": "none"}]}, teacher, student=student)
    assert all(before[name].equal(tensor) for name, tensor in student.state_dict().items())
    assert student.net.body.training
    assert not student.net.head.training
    assert torch.get_rng_state().equal(position)
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapper", "in place"])
def test_compiled_student(teacher, in_place):
    torch.compiler.reset()
    plain, student = LogitsOnly().eval(), LogitsOnly().eval()
    compiled = student
    if in_place:
        student.compile(backend="aot_eager")
    else:
        compiled = torch.compile(student, backend="aot_eager")
    distillation = make({"features": [FEATURE]}, teacher, student=compiled)
    for seed in range(3):
        batch = make_batch(teacher, seed=seed)
        expected = run(distillation, plain, batch)[2].total
        found = run(distillation, compiled, batch)[2].total
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
    for actual, desired in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, desired.grad)


def test_no_gpu_sync(teacher):
    """Fake tensors have no values: `.item()`, branches and boolean indexing raise. On a GPU they would synchronize."""
    settings = {
        "loss": "dkd",
        "temperature": {"start": 4, "end": 1},
        "features": [
            FEATURE,
            {"loss": "attention_transfer", "student": MAP_LAYER, "teacher": "layer2"},
            {"loss": "channel_wise", "student": END_LAYER, "teacher": "layer2", "projector": "conv"},
            {"loss": "feature_cosine"},
            {"loss": "relational", "queue_size": 8, "standardize": "channels"},
            {"loss": "am_radio", "student": MAP_LAYER, "teacher": "layer2", "projector": "mlp", "standardize": "phi_s"},
        ],
    }
    distillation, student = make(settings, teacher), LogitsOnly()
    distillation.standardizers.eval()  # they count the first batches on the CPU, as real numbers
    batch = make_batch(teacher)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(
            batch,
            images=mode.from_tensor(batch.images),
            labels=mode.from_tensor(batch.labels),
            valid=mode.from_tensor(batch.valid),
            teacher={name: mode.from_tensor(tensor) for name, tensor in batch.teacher.items()},
        )
        result = run(distillation, student, fake, epoch=0.5)[2]
        assert result.total.shape == ()
        result.total.backward()


class Trunk(nn.Module):
    """A student without logits: a vector `[N, 40]` and a map `[N, 40, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = WideNet()
        self.wide.head = nn.Identity()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        spatial = self.wide.layer2(self.wide.layer1(images))
        return {"embedding": self.wide.pooled(spatial), "grid": spatial}


MEMBERS = {
    "dino.pooled": TensorSpec((None, 24), torch.float32),
    "dino.spatial": TensorSpec((None, 5 + 16, 24), torch.float32, num_prefix_tokens=5),
    "clip.embeds": TensorSpec((None, 20), torch.float32),
    "clip.tokens": TensorSpec((None, 1 + 9, 20), torch.float32),
}
"""Two vision transformers."""


def members_batch(num_rows: int = 4, *, seed: int = 0, valid=None) -> KDBatch:
    generator = torch.Generator().manual_seed(seed)
    return KDBatch(
        images=torch.randn(num_rows, *IMAGE_SHAPE, generator=generator),
        labels=None,
        index=torch.arange(num_rows),
        valid=torch.ones(num_rows, dtype=torch.bool) if valid is None else torch.tensor(valid),
        teacher={name: torch.randn(num_rows, *spec.shape[1:], generator=generator) for name, spec in MEMBERS.items()},
    )


def of_members(*terms, student=None) -> Distillation:
    return Distillation(
        DistillSettings(loss=None, features=terms),
        student=Trunk() if student is None else student,
        teacher_outputs=MEMBERS,
        image_shape=IMAGE_SHAPE,
        num_classes=None,
    )


BOTH_MEMBERS = (
    {"loss": "cosine", "student": "pooled", "teacher": "dino.pooled"},
    {"loss": "am_radio", "student": "spatial", "teacher": "dino.spatial", "standardize": "phi_s", "weight": 0.5},
    {"loss": "cosine", "student": "pooled", "teacher": "clip.pooled", "projector": "mlp"},
    {"loss": "relational", "student": "pooled", "teacher": "clip.pooled", "queue_size": 6, "standardize": "global"},
    {"loss": "feature_smooth_l1", "student": "spatial", "teacher": "clip.spatial", "grid": 4},
)


def test_terms_of_several_teachers():
    """Aliases on both sides, names that differ, projectors that fit, and gradients in all of it."""
    student, distillation, batch = Trunk(), of_members(*BOTH_MEMBERS), members_batch()
    result = run(distillation, student, batch)[2]
    assert list(result.terms) == [
        "cosine.pooled.dino.pooled",
        "am_radio.spatial",
        "cosine.pooled.clip.pooled",
        "relational.pooled",
        "feature_smooth_l1.spatial",
    ]
    expected = losses.cosine(
        distillation.projectors[0](student(batch.images)["embedding"]), batch.teacher["dino.pooled"]
    )
    torch.testing.assert_close(result.terms["cosine.pooled.dino.pooled"], expected)
    result.total.backward()
    for parameter in (*student.parameters(), *distillation.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in batch.teacher.values())


def test_shares_are_the_balance():
    student, distillation = Trunk(), of_members(*BOTH_MEMBERS)
    result = run(distillation, student, members_batch())[2]
    assert sum(result.shares.values()) == pytest.approx(1)
    name = "am_radio.spatial"
    assert result.shares[name] == pytest.approx(0.5 * result.terms[name].item() / result.total.item())
    assert not any(share.requires_grad for share in result.shares.values())
    nothing = run(distillation, student, members_batch(valid=[False] * 4))[2]
    assert nothing.total == 0 and all(share == 0 for share in nothing.shares.values())


def test_other_rows_do_not_matter():
    """Of the terms that do not compare images with each other."""
    student, distillation = Trunk().eval(), of_members(*BOTH_MEMBERS[:3], BOTH_MEMBERS[4]).eval()
    batch = members_batch(6, valid=[True, True, False, False, False, False])
    other = replace(
        batch,
        images=batch.images.clone(),
        teacher={name: tensor.clone() for name, tensor in batch.teacher.items()},
    )
    for tensor in (other.images, *other.teacher.values()):
        tensor[2:] = float("nan")
    first, second = run(distillation, student, batch)[2], run(distillation, student, other)[2]
    assert second.total.isfinite()
    for name in first.terms:
        torch.testing.assert_close(first.terms[name], second.terms[name])


def test_cosines():
    """Of what is compared, for each sample, and nothing is learned from them."""
    student, batch = Trunk(), members_batch()
    distillation = of_members(
        *BOTH_MEMBERS, {"loss": "attention_transfer", "student": "spatial", "teacher": "dino.spatial"}
    )
    run(distillation, student, members_batch(seed=1))
    before = copy.deepcopy(distillation.state_dict())
    outputs, features = student(batch.images), {}
    cosines = distillation.cosines(outputs, features, batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in distillation.state_dict().items())
    # Attention maps of different widths have no cosine.
    assert list(cosines) == list(distillation.settings.term_names[:5])
    for cosine in cosines.values():
        assert cosine.shape == (4,) and cosine.dtype == torch.float32 and not cosine.requires_grad
        assert cosine.abs().max() <= 1 + 1e-6
    name = "cosine.pooled.dino.pooled"
    distillation.eval()
    value = distillation(outputs, features, batch, epoch=0, epochs=1).terms[name]
    torch.testing.assert_close(1 - cosines[name].mean(), value.detach())


def test_queue_and_statistics_resume():
    """From any batch, as if it had not stopped."""
    student, distillation, twin = Trunk(), of_members(*BOTH_MEMBERS), of_members(*BOTH_MEMBERS)
    for seed in range(3):
        run(distillation, student, members_batch(seed=seed))
    assert {name.split(".")[0] for name in distillation.state_dict()} == {"projectors", "standardizers", "queues"}
    twin.load_state_dict(copy.deepcopy(distillation.state_dict()))
    for seed in range(3, 6):
        batch = members_batch(seed=seed, valid=[True, False, True, True])
        expected, found = (run(each, student, batch)[2] for each in (distillation, twin))
        for name, value in expected.terms.items():
            assert torch.equal(found.terms[name], value), name
    for name, tensor in distillation.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name


def test_queue_serves_the_next_batch():
    student, distillation = Trunk().eval(), of_members(BOTH_MEMBERS[3] | {"standardize": "none"})
    first, second = members_batch(seed=0), members_batch(seed=1)
    run(distillation, student, first)
    found = run(distillation, student, second)[2].total
    references = torch.cat([second.teacher["clip.embeds"], first.teacher["clip.embeds"]])
    projected = distillation.projectors[0](student(second.images)["embedding"])
    expected = losses.relational(projected, second.teacher["clip.embeds"], references_MD=references)
    torch.testing.assert_close(found, expected)
    assert int(distillation.queues["0"].is_filled.sum()) == 6


def test_evaluation_changes_nothing():
    student, distillation = Trunk(), of_members(*BOTH_MEMBERS)
    run(distillation, student, members_batch())
    before = copy.deepcopy(distillation.state_dict())
    distillation.eval()
    run(distillation, student, members_batch(seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in distillation.state_dict().items())


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"student": "spatial"}, ["cosine.spatial", "compares vectors", "'spatial' is [2, 40, 8, 8]", "[any, 21, 24]"]),
        ({"student": "wide.head"}, ["'wide.head'", "gave no output"]),
        ({"student": "wide.layer9"}, ["no layer called 'wide.layer9'"]),
        ({"teacher": "sam.spatial"}, ["no output called 'sam.spatial'", "'dino.spatial' [any, 21, 24]"]),
        ({"teacher": "pooled"}, ["may mean 'dino.pooled' or 'clip.embeds'"]),
        ({"teacher": "dino.pooled", "projector": "none"}, ["[2, 40]", "[2, 24]", "[any, 24]"]),
        ({"loss": "am_radio", "projector": "conv", "teacher": "dino.pooled"}, ["projector: conv", "auto or mlp"]),
    ],
)
def test_what_does_not_fit_is_named(term, words):
    with pytest.raises(ConfigError) as caught:
        of_members({"loss": "cosine", "student": "pooled", "teacher": "dino.spatial"} | term)
    for word in words:
        assert word in str(caught.value)


def test_student_without_map():
    """The advice of the message works."""

    class Vector(Trunk):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"embedding": super().forward(images)["embedding"]}

    with pytest.raises(ConfigError, match=r"no map .*to the pooled term alone: \[{loss: cosine, student: pooled, "):
        of_members(*BOTH_MEMBERS[:2], student=Vector())
    of_members(BOTH_MEMBERS[0], student=Vector())


def test_layer_comes_before_alias(teacher):
    """`WideNet` returns logits alone, and `pooled` is one of its layers."""
    term = {"loss": "feature_cosine", "student": "pooled", "teacher": "pooled"}
    assert make({"features": [term]}, teacher, student=WideNet()).layers == ("pooled",)
