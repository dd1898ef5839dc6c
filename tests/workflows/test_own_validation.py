"""Validation by a function of the user's own: its numbers are logged, select the best student, and are checked."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.text import WordErrorRate

from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.batch_loader import BatchLoader
from kd_pipeline.workflows._train import train
from tests.training import tiny_run
from tests.training.tiny_run import logged
from tests.workflows.objects import assert_same, batches, config, network, plain_loop, run, teacher

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

CALLS: list[tuple[str, ...]] = []


def count_rows(model: nn.Module, loaders: Mapping[str, Any]) -> dict[str, float]:
    """Named by `train.validate`."""
    CALLS.append(tuple(loaders))
    assert not model.training and not torch.is_grad_enabled()
    return {"rows": sum(len(batch) for loader in loaders.values() for batch in loader), "speech/wer": 0.5}


def in_turn(name: str, *values: Any) -> Callable[..., Mapping[str, Any]]:
    """Returns these values, one in each call."""
    rest = list(values)
    return lambda model, loaders: {name: rest.pop(0)}


VAL = {"val": batches(32, start=100)}


def test_numbers_are_logged_and_the_weights_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    student = network()
    result = run(tmp_path / "run", student=student, validation=VAL, validate=count_rows)
    rows = [row for row in logged(tmp_path / "run") if "val/rows" in row]
    assert [(row["val/rows"], row["speech/wer"]) for row in rows] == [(32, 0.5)] * 2
    assert result.evaluations["val"].metrics == {"rows": 32.0} and result.evaluations["speech"].metrics == {"wer": 0.5}
    assert [line.split()[0] for line in result.lines] == ["split", "val", "speech"]
    assert_same(student, plain_loop(batches))


def test_word_error_rate_of_torchmetrics(tmp_path: Path) -> None:
    """Any metric of torchmetrics: here of words that the classes are the names of."""

    def validate(model: nn.Module, loaders: Mapping[str, Any]) -> dict[str, Tensor]:
        rate = WordErrorRate()
        for batch in loaders["val"]:
            predicted, wanted = model(batch.input).argmax(1).tolist(), batch.labels.tolist()
            rate.update([f"word {each}" for each in predicted], [f"word {each}" for each in wanted])
        return {"wer": rate.compute()}

    student = network()
    settings = {"select_by": "val/wer", "select_mode": "min"}
    result = run(tmp_path / "run", settings, student=student, validation=VAL, validate=validate)
    num_wrong = sum(int((student(each.input).argmax(1) != each.labels).sum()) for each in BatchLoader(VAL["val"]))
    assert result.evaluations["val"].metrics == {"wer": pytest.approx(num_wrong / 64)}


def test_function_of_the_config_needs_permission(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", validate=f"{__name__}:count_rows")
    given: dict[str, Any] = {"student": network(), "teacher": teacher(), "train_batches": batches(), "validation": VAL}
    with pytest.raises(ConfigError, match=r"train\.validate: .* would run code of the module"):
        train(settings, **given)
    CALLS.clear()
    train(settings, **given, plugins=[__name__])
    assert CALLS == [("val",)] * 2  # the last one is that of the result


def test_test_set_is_evaluated_at_the_end(tmp_path: Path) -> None:
    CALLS.clear()
    settings: Any = {"validation": {**VAL, "test": batches(16, start=200)}}

    def count(model: nn.Module, loaders: Mapping[str, Any]) -> dict[str, float]:
        return {"rows": count_rows(model, loaders)["rows"]}

    result = run(tmp_path / "run", **settings, validate=count)
    assert CALLS == [("val",), ("val",), ("test",)]
    assert {name: each.metrics for name, each in result.evaluations.items()} == {
        "val": {"rows": 32.0},
        "test": {"rows": 16.0},
    }


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_any_number_selects_the_best(tmp_path: Path, mode: str, best: int) -> None:
    student = network()
    changes = {"epochs": 3, "select_by": "val/wer", "select_mode": mode}
    run(tmp_path / "run", changes, student=student, validation=VAL, validate=in_turn("wer", 0.5, 0.2, 0.9, 0.0))
    assert_same(student, plain_loop(batches, epochs=best))


@pytest.mark.parametrize(("name", "best"), [("top1", 1), ("loss", 2)])
def test_usual_name_selects_by_default(tmp_path: Path, name: str, best: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    student = network()
    run(tmp_path / "run", {"epochs": 3}, student=student, validation=VAL, validate=in_turn(name, 0.9, 0.2, 0.5, 0.0))
    assert f"the best student is selected by val/{name}" in caplog.text
    assert_same(student, plain_loop(batches, epochs=best))


def test_other_names_do_not_select_and_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    student = network()
    run(tmp_path / "run", student=student, validation=VAL, validate=in_turn("wer", 0.1, 0.9, 0.0))
    assert "validation returned val/wer and none of val/knn_top1, val/top1, val/miou, val/loss" in caplog.text
    assert_same(student, plain_loop(batches))


def test_resumed_run_keeps_the_best_so_far(tmp_path: Path) -> None:
    def go(epochs: int, *values: float) -> nn.Module:
        student = network()
        run(tmp_path / "run", {"epochs": epochs}, student=student, validation=VAL, validate=in_turn("top1", *values))
        return student

    go(1, 0.9, 0.9)
    assert_same(go(2, 0.1, 0.9), plain_loop(batches, epochs=1))


def test_direction_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.select_by: whether val/wer is better .* set train\.select_mode"):
        run(tmp_path / "run", {"select_by": "val/wer"}, validation=VAL, validate=count_rows)


def test_missing_metric_names_what_there_is(tmp_path: Path) -> None:
    changes = {"select_by": "val/cer", "select_mode": "min"}
    with pytest.raises(ConfigError, match=r"no metric 'val/cer' to select the best by; there are .*val/rows"):
        run(tmp_path / "run", changes, validation=VAL, validate=count_rows)


def test_works_without_labels_and_logits(tmp_path: Path) -> None:
    images = [batch[0] for batch in batches()]

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 4)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"pooled": self.layer(images.flatten(1))}

    changes = {"select_by": "val/norm", "select_mode": "min"}
    result = run(
        tmp_path / "run",
        changes,
        student=Vectors(),
        teacher=None,
        train_batches=images,
        validation=images[:2],
        distillation=lambda outputs, batch: outputs["pooled"].pow(2).mean(),
        validate=lambda model, loaders: {
            "norm": sum(model(batch.input)["pooled"].norm() for batch in loaders["val"]),
        },
    )
    assert result.evaluations["val"].metrics["norm"] > 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({}, "should return numbers by name.*got an empty mapping"),
        (None, "should return numbers by name.*got NoneType"),
        (0.5, "should return numbers by name.*got float"),
        ({"wer": "low"}, "should return numbers by name, got str for 'wer'"),
        ({"wer": True}, "should return numbers by name, got bool for 'wer'"),
        ({"wer": torch.zeros(2)}, r"should return numbers by name, got Tensor \[2\] for 'wer'"),
        ({1: 0.5}, "should name its numbers with printable characters, got 1"),
        ({"wer": 0.5, "val/wer": 0.6}, "returned val/wer twice"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path: Path, returned: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", {"epochs": 1}, validation=VAL, validate=lambda model, loaders: returned)


def test_function_of_other_arguments_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"should take the student and the loaders by name: validate\(model, loaders"):
        run(tmp_path / "run", validation=VAL, validate=lambda model: {"a": 1.0})


def test_two_functions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two functions validate"):
        run(tmp_path / "run", {"validate": f"{__name__}:count_rows"}, validation=VAL, validate=count_rows)


def test_validation_of_images_of_a_config(tmp_path: Path) -> None:
    tiny_run.write_digits(tmp_path)
    settings: Config = tiny_run.settings(tmp_path, "run", train__epochs=1)
    CALLS.clear()
    result = train(settings, validate=count_rows, plugins=["tests.training.networks"])
    assert CALLS == [("val",)] and result.evaluations["val"].metrics == {"rows": float(tiny_run.NUM_VAL)}
