import inspect

import pytest
from pydantic import ValidationError
from timm import create_model
from timm.task import LogitDistillationTask

from kd_pipeline import losses
from kd_pipeline._core.settings import Settings
from kd_pipeline.config.reader import read_config
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.ramp import Ramp, value_at
from kd_pipeline.losses.settings import DistillSettings, TermSettings

FALLING = {"start": 1.0, "end": 0.25, "kind": "cosine"}


def test_plain_config():
    settings = DistillSettings.model_validate({"temperature": 4.0, "distill_weight": 0.9, "task_weight": 0.1})
    assert (settings.loss, settings.temperature, settings.weights) == ("soft_target", 4.0, (0.9, 0.1))


@pytest.mark.parametrize(
    ("loss", "temperature", "distill_weight", "task_weight"),
    [
        ("soft_target", 4.0, 0.9, 0.1),
        ("dkd", 4.0, 1.0, 1.0),
        ("dist", 1.0, 1.0, 1.0),
        ("hard_label", None, 0.5, 0.5),
        ("logit_mse", None, 1.0, 1.0),
        ("cosine", None, 1.0, 1.0),
        ("mine.losses:far", None, 1.0, 1.0),
    ],
)
def test_defaults_are_those_of_the_loss(loss, temperature, distill_weight, task_weight):
    settings = DistillSettings(loss=loss)
    assert (settings.temperature, *settings.weights) == (temperature, distill_weight, task_weight)
    assert (settings.distill_weight, settings.task_weight) == settings.weights


@pytest.mark.parametrize("loss", [name for name in losses.__all__ if name != "task"])
def test_temperature_of_a_loss_is_the_same_everywhere(loss):
    """In a call, as a feature term and as the main loss."""
    parameter = inspect.signature(getattr(losses, loss)).parameters.get("temperature")
    expected = None if parameter is None else parameter.default
    assert TermSettings(loss=loss).temperature == expected
    if not loss.startswith("feature_") and loss not in ("am_radio", "attention_transfer", "channel_wise", "relational"):
        assert DistillSettings(loss=loss).temperature == DistillSettings(loss=loss, temperature=None).temperature
        assert DistillSettings(loss=loss).temperature == expected


@pytest.mark.parametrize(
    ("given", "distill_weight", "task_weight"),
    [
        ({"distill_weight": 0.5}, 0.5, 1.0),
        ({"distill_weight": 3.0}, 3.0, 1.0),
        ({"task_weight": 0.3}, 0.7, 0.3),
        ({"task_weight": 0.0}, 1.0, 0.0),
        ({"distill_weight": 2.0, "task_weight": 0.5}, 2.0, 0.5),
        ({"loss": "hard_label", "task_weight": 0.3}, 0.7, 0.3),
        ({"loss": "dkd", "task_weight": 1.0}, 1.0, 1.0),
        ({"loss": "dist", "task_weight": 0.5}, 1.0, 0.5),
        ({"loss": "dist", "distill_weight": 2.0}, 2.0, 1.0),
    ],
)
def test_default_weights(given, distill_weight, task_weight):
    assert DistillSettings(**given).weights == pytest.approx((distill_weight, task_weight))


def test_default_weights_match_timm():
    """`LogitDistillationTask` with one of its weights or both; with neither it has 1 and 1."""
    student = create_model("test_resnet", num_classes=4)
    for given in ({"distill_weight": 0.5}, {"task_weight": 0.3}, {"distill_weight": 2.0, "task_weight": 0.5}):
        named = {name.replace("_weight", "_loss_weight"): value for name, value in given.items()}
        task = LogitDistillationTask(student, create_model("test_resnet", num_classes=4), verbose=False, **named)
        assert DistillSettings(**given).weights == pytest.approx((task.distill_loss_weight, task.task_loss_weight))


def test_dumped_settings_tell_what_runs():
    """A folder's `config.yaml` leaves out what is None, and what is not set must not change with a later version."""
    dumped = DistillSettings(loss="dist", features=[{"loss": "soft_target"}]).model_dump(exclude_none=True)
    assert (dumped["temperature"], dumped["distill_weight"], dumped["task_weight"]) == (1.0, 1.0, 1.0)
    assert dumped["features"][0]["temperature"] == 4.0
    assert DistillSettings.model_validate(dumped) == DistillSettings(loss="dist", features=[{"loss": "soft_target"}])


@pytest.mark.parametrize("kind", [{"kind": "linear"}, {"kind": "cosine"}, {"kind": "decay", "rate": 0.5}])
def test_default_distill_weight_of_ramp(kind):
    distill, task = DistillSettings(task_weight={"start": 1.0, "end": 0.25, **kind}).weights
    for epoch in (0, 1.5, 3, 10):
        assert value_at(distill, epoch, 10) == pytest.approx(1 - value_at(task, epoch, 10))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task_weight": 1.0}, r"1 - 1 = 0 for the teacher; set distill_weight too, to 0"),
        ({"task_weight": {"start": 1, "end": 1}}, r"1 - 1 = 0 for the teacher"),
        ({"task_weight": 1.5}, r"1 - task_weight falls to -0.5; set distill_weight too"),
        ({"task_weight": {"start": 0.5, "end": 2}}, r"1 - task_weight falls to -1; set distill_weight too"),
        (
            {"task_weight": {"start": 1, "end": 0.1, "kind": "exponential"}},
            r"not an exponential ramp; set",
        ),
        ({"distill_weight": -1.0}, r"should not fall below 0, got -1"),
        ({"task_weight": {"start": 1, "end": -0.5}}, r"should not fall below 0, got -0.5"),
        ({"temperature": 0.0}, r"should stay above 0, got 0"),
        ({"temperature": {"start": 4, "end": 0}}, r"should stay above 0, got 0"),
        ({"distill_weight": 0.0, "task_weight": 0.0}, r"all weights are 0"),
        ({"loss": "soft_targets"}, r"no loss called 'soft_targets'; did you mean 'soft_target'"),
        ({"loss": "kullback"}, r"no loss called 'kullback'; there are 'cosine', 'dist', 'dkd'"),
        ({"loss": "feature_mse"}, r"no loss called 'feature_mse'"),
        ({"loss": "task"}, r"no loss called 'task'"),
        ({"loss": "dkd", "options": {"gamma": 2.0}}, r"dkd has no option 'gamma'; .*'alpha'"),
        ({"loss": "dkd", "options": {"alhpa": 2.0}}, r"dkd has no option 'alhpa'; did you mean 'alpha'"),
        ({"loss": "dkd", "options": {"alpha": "big"}}, r"alpha: Input should be a valid number, got 'big'"),
        ({"loss": "dkd", "options": {"temperature": 2.0}}, r"dkd has no option 'temperature'"),
        ({"options": {"form": "mse"}}, r"form: Input should be 'kl' or 'cross_entropy', got 'mse'"),
        ({"options": {"standardize": 1.0}}, r"standardize: Input should be a valid boolean, got 1.0"),
        ({"loss": "cosine", "temperature": 2.0}, r"temperature has no effect on cosine"),
        ({"loss": "mine.losses:far", "temperature": 2.0}, r"temperature has no effect on mine.losses:far"),
        ({"loss": "mine.losses:far", "options": {"a": 1.0}}, r"mine.losses:far gets the logits and the batch only"),
        ({"label_smoothing": 1.0}, r"less than 1"),
        ({"features": [{"loss": "feature_mes"}]}, r"no loss called 'feature_mes'; did you mean 'feature_mse'"),
        ({"features": [{"loss": "task"}]}, r"no loss called 'task'"),
        ({"features": [{"loss": "feature_mse", "temperature": 2.0}]}, r"temperature has no effect on feature_mse"),
        ({"features": [{"loss": "feature_mse", "weight": -2.0}]}, r"should not fall below 0, got -2"),
        ({"features": [{"loss": "feature_mse", "student": "a"}] * 2}, r"two terms called feature_mse.a"),
        ({"features": [{"loss": "am_radio", "options": {"mask": True}}]}, r"am_radio has no option 'mask'"),
        ({"features": [{"loss": "relational", "options": {"references_MD": 1.0}}]}, r"no option 'references_MD'"),
        ({"features": [{"loss": "cosine", "queue_size": 8}]}, r"queue_size has no effect on cosine"),
        ({"features": [{"loss": "relational", "queue_size": 0}]}, r"queue_size"),
        ({"features": [{"loss": "am_radio", "grid": 0}]}, r"grid"),
        ({"features": [{"loss": "am_radio", "grid": "larger"}]}, r"grid"),
        ({"features": [{"loss": "am_radio", "projector": "mlp2"}]}, r"projector"),
        ({"loss": "relational"}, r"no loss called 'relational'"),
        ({"task_loss": "focal"}, r"should match pattern"),
        ({"task_loss": "mine:focal", "task_weight": 0.0}, r"task_loss has no effect with task_weight: 0"),
        ({"task_loss": "mine:focal", "label_smoothing": 0.1}, r"label_smoothing has no effect on mine:focal"),
        ({"heads": {"logits": 0.5}}, r"heads: logits is the main head"),
        ({"heads": {"aux": -0.5}}, r"should not fall below 0, got -0.5"),
        ({"heads": {"aux": 0.5}, "student_losses": {"task.aux": 1.0}}, r"student_losses: 'task.aux' is taken"),
    ],
)
def test_invalid_settings(given, message):
    with pytest.raises(ValidationError, match=message):
        DistillSettings(**given)


def test_term_names_differ():
    """The teacher's output tells terms apart that compare it with the same output of the student."""
    pairs = [("pooled", "dino.pooled"), ("pooled", "clip.pooled"), ("spatial", "dino.spatial"), ("logits", "logits")]
    terms = [{"loss": "cosine", "student": student, "teacher": teacher} for student, teacher in pairs]
    names = ("cosine.pooled.dino.pooled", "cosine.pooled.clip.pooled", "cosine.spatial", "cosine")
    assert DistillSettings(features=terms).term_names == names
    assert DistillSettings(features=terms[::-1]).term_names == names[::-1]


def test_queue_size():
    assert TermSettings(loss="relational").queue_size == 4096
    assert TermSettings(loss="relational", queue_size=8).queue_size == 8
    assert TermSettings(loss="cosine").queue_size is None


def test_every_loss_but_task_can_be_a_term():
    named = set()
    for name in losses.__all__:
        try:
            named.add(TermSettings(loss=name).loss)
        except ValidationError:
            assert name == "task"
    assert named == set(losses.__all__) - {"task"}


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "cosine"},
        {"loss": "dkd", "options": {"alpha": 1, "beta": 2.5, "standardize": True}, "temperature": FALLING},
        {"task_weight": FALLING},
        {"features": [{"loss": "channel_wise", "student": "a", "teacher": "b", "temperature": 3, "weight": FALLING}]},
        {"features": [{"loss": "am_radio", "grid": 7, "resize": "area", "projector": "mlp", "standardize": "phi_s"}]},
        {"features": [{"loss": "relational", "queue_size": 16, "options": {"form": "kl"}}]},
    ],
)
def test_json_round_trip(given):
    settings = DistillSettings(**given)
    assert DistillSettings.model_validate_json(settings.model_dump_json()) == settings


class Run(Settings):
    distill: DistillSettings = DistillSettings()


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        """
distill:
  loss: dkd
  temperature: {start: 10, end: 1, kind: decay, rate: 0.9}
  options: {alpha: 1, beta: 8, standardize: true}
  distill_weight: {start: 0, end: 1, epochs: 20}
  label_smoothing: 0.1
  features:
    - {loss: feature_mse, student: layer3, teacher: layer3, weight: 100, projector: conv}
    - {loss: channel_wise, student: layer2, teacher: layer2, temperature: 3}
"""
    )
    settings = read_config(Run, path).distill
    assert settings.temperature == Ramp(start=10, end=1, kind="decay", rate=0.9)
    assert settings.options == {"alpha": 1.0, "beta": 8.0, "standardize": True}
    assert settings.weights == (Ramp(start=0, end=1, epochs=20), 1.0)
    assert settings.term_names == ("feature_mse.layer3", "channel_wise.layer2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distill: {loss: dkdd}", ["run.yaml:1", "distill.loss", "did you mean 'dkd'"]),
        ("distill:\n  temperature: hot", ["run.yaml:2", "distill.temperature", "a number", "'hot'"]),
        ("distill:\n  options: {aplha: 2}\n  loss: dkd", ["run.yaml:2", "distill.options", "did you mean 'alpha'"]),
        ("distill:\n  features:\n    - {loss: dist, wieght: 2}", ["run.yaml:3", "distill.features.0.wieght"]),
        ("distill: {temperature: {start: 4, stop: 1}}", ["run.yaml:1", "distill.temperature.stop"]),
    ],
)
def test_yaml_errors_name_line_and_key(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(Run, path)
    for word in words:
        assert word in str(caught.value)
