"""Which metrics a stage measures, which one selects the best student, and what is refused before anything is opened."""

import logging
from pathlib import Path
from typing import Any

import pytest

from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan, select_best
from kd_pipeline.workflows.stage import check_config
from tests.training import tiny_run

HEADLESS = {"student": {"builtin": "small_resnet", "num_classes": 0}}
VAL = tiny_run.split(Path(), "val", tiny_run.EVAL)
LABELED = {"train", "val", "bank", "test"}


def config_of(**changes: Any):
    return tiny_run.settings(Path(), "run", **changes)


def chosen(labeled=LABELED, has_reference: bool = True, stage: str = "distill", **changes: Any):
    config = config_of(**changes)
    plan = EvaluationPlan.of(config, stage, labeled=labeled, has_reference=has_reference)
    train = select_best(config, stage, plan).train
    return train.select_by, train.select_mode


PROBE = {"feature_probe": {"bank": "val"}}


def test_best_is_selected_by_what_is_measured() -> None:
    assert chosen() == chosen(stage="baseline") == ("val/top1", "max")
    assert chosen(labeled={"train"}) == ("val/loss", "min")
    assert chosen(labeled={"train"}, stage="baseline") == chosen(labeled={"train"}, has_reference=False) == (None, None)
    assert chosen(labeled={"train"}, distill={"loss": "dkd"}) == (None, None)  # which needs labels
    assert chosen(**HEADLESS) == ("val/loss", "min")
    assert chosen(**HEADLESS, has_reference=False) == (None, None)
    assert chosen(**HEADLESS, **PROBE) == chosen(**HEADLESS, **PROBE, has_reference=False) == ("val/knn_top1", "max")
    rare = {"feature_probe": {"bank": "val", "every": 2}}
    assert chosen(**HEADLESS, **rare) == ("val/loss", "min")
    assert chosen(data__val=None) == (None, None)
    assert chosen(data__val=None, data__more={"other": VAL}, labeled={"other"}) == ("other/top1", "max")


def test_best_network_for_segmentation_is_selected_by_miou() -> None:
    config = config_of(train__compare_with_teacher=True)
    plan = EvaluationPlan.of(config, "distill", labeled={"train"}, masked={"val"})
    names = ("miou", "pixel_accuracy", "loss", "agreement", "kl", "logit_mse", "probability_l1")
    assert plan.every_epoch == tuple(f"val/{name}" for name in names)
    train = select_best(config, "distill", plan).train
    assert (train.select_by, train.select_mode) == ("val/miou", "max")
    before = EvaluationPlan.of(config, "distill")  # the data is opened
    before.check(config.train.model_copy(update={"select_by": "val/miou"}))
    with pytest.raises(ConfigError, match="'val/top1' is not measured"):
        plan.check(config.train.model_copy(update={"select_by": "val/top1"}))


def test_choice_is_logged(caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    chosen(labeled=set(), **HEADLESS)
    chosen(labeled=set(), has_reference=False, **HEADLESS)
    chosen(train__select_by="val/loss")  # which was told
    assert caplog.messages == [
        "the best student is selected by val/loss (lower is better)",
        "nothing is measured on validation images every epoch, so the last student is the result",
    ]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/loss", "min"),
        ("val/linear_top1", "max"),
        ("val/teacher_knn_top1", "max"),
        ("val/cosine.pooled", "min"),
        ("val/am_radio.spatial", "min"),
        ("val/cosine_to_teacher.pooled", "max"),
    ],
)
def test_mode_is_that_of_the_metric(metric: str, mode: str) -> None:
    assert chosen(train__select_by=metric, **HEADLESS, **PROBE) == (metric, mode)
    given = {"train__select_by": metric, "train__select_mode": "max"}
    assert chosen(**given, **HEADLESS, **PROBE) == (metric, "max")


def test_sparse_metric_may_select() -> None:
    config = config_of(train__select_by="val/knn_top1", feature_probe={"bank": "val", "every": 2}, **HEADLESS)
    plan = EvaluationPlan.of(config, "distill", labeled=LABELED)
    assert select_best(config, "distill", plan).train.select_by == "val/knn_top1"
    assert "val/knn_top1" in plan.sparse and "val/knn_top1" not in plan.every_epoch


@pytest.mark.parametrize(
    ("changes", "labeled", "metric"),
    [
        (HEADLESS, LABELED, "val/top1"),
        (HEADLESS, LABELED, "val/knn_top1"),
        ({**HEADLESS, "feature_probe": {"bank": "val", "linear": False}}, LABELED, "val/linear_top1"),
        ({}, {"train"}, "val/top1"),
        ({}, LABELED, "val/distill"),
    ],
)
def test_metric_that_is_not_measured_is_refused(changes: dict[str, Any], labeled: set[str], metric: str) -> None:
    for key, value in (("select_by", metric), ("early_stopping", {"metric": metric})):
        with pytest.raises(ConfigError, match=rf"^train.{key}.*'{metric}' is not measured; "):
            chosen(labeled, **changes, **{f"train__{key}": value})


def test_early_stopping_follows_the_selection() -> None:
    def stopping(labeled=LABELED, **changes: Any):
        config = config_of(**changes)
        plan = EvaluationPlan.of(config, "distill", labeled=labeled)
        found = select_best(config, "distill", plan).train.early_stopping
        return found.metric, found.mode, found.patience

    assert stopping(train__early_stopping={"patience": 3}) == ("val/top1", "max", 3)
    assert stopping(**HEADLESS, train__early_stopping={}) == ("val/loss", "min", 10)
    assert stopping(train__early_stopping={"metric": "val/loss"}) == ("val/loss", "min", 10)
    with pytest.raises(ConfigError, match="early_stopping: nothing is measured after an epoch"):
        stopping(data__val=None, train__early_stopping={})


def test_mode_without_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="select_mode: min is of a metric; set select_by too"):
        config_of(train__select_mode="min")


def test_sets_of_the_probe() -> None:
    def probed(labeled=LABELED, **changes: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        plan = EvaluationPlan.of(config_of(**HEADLESS, **changes), "distill", labeled=labeled)
        return plan.probed, plan.validated

    more = {"data__more": {"bank": VAL}}
    assert probed(**PROBE) == (("val",), ("val",))
    assert probed(**PROBE, data__test=VAL) == (("val", "test"), ("val",))
    # What is only a bank is not evaluated on.
    assert probed(**more, feature_probe={"bank": "bank"}) == (("val",), ("val",))
    assert probed({"train", "bank"}, **more, feature_probe={"bank": "bank"}) == (("bank",), ("val", "bank"))
    assert probed(**more, feature_probe={"bank": "bank", "sets": ["bank"]}) == (("bank",), ("val", "bank"))
    assert probed(feature_probe={"bank": "train"}) == (("val",), ("val",))
    assert probed(**more) == ((), ("val", "bank"))


def test_probe_needs_labels() -> None:
    changes = {**HEADLESS, "data__more": {"bank": VAL}}
    with pytest.raises(ConfigError, match=r"feature_probe.bank: the split 'val' has no labels.*such as 'bank'"):
        chosen({"bank"}, **changes, **PROBE)
    with pytest.raises(ConfigError, match=r"feature_probe.sets: the split 'val' has no labels"):
        chosen({"bank"}, **changes, feature_probe={"bank": "bank", "sets": ["val"]})


def test_probe_names_existing_splits() -> None:
    with pytest.raises(ValueError, match=r"feature_probe.bank: there is no split 'vall'; did you mean 'val'"):
        config_of(feature_probe={"bank": "vall"})
    with pytest.raises(ValueError, match=r"feature_probe.sets: features of the images that the student is trained on"):
        config_of(feature_probe={"bank": "val", "sets": ["train"]})


def test_metrics_need_logits_and_labels() -> None:
    metrics = {"train__metrics": [{"name": "CohenKappa"}]}
    with pytest.raises(ConfigError, match="a student without a head has no logits; remove them, or set feature_probe"):
        chosen(**HEADLESS, **metrics)
    with pytest.raises(ConfigError, match="no validation set has labels; remove them"):
        chosen({"train"}, **metrics)


def test_student_without_head_is_for_distillation() -> None:
    with pytest.raises(ConfigError, match=r"stage: baseline trains on labels, and student.num_classes: 0 leaves no"):
        check_config(config_of(**HEADLESS, stage="baseline"), "baseline")
    model = {"builtin": "small_resnet", "num_classes": 0}
    with pytest.raises(ConfigError, match=r"stage: teacher trains on labels, and teacher.model.num_classes: 0"):
        check_config(config_of(teacher={"model": model}, stage="teacher"), "teacher")
    with pytest.raises(ConfigError, match=r"the student is a classifier, which returns logits; set"):
        check_config(config_of(student={"builtin": "small_resnet"}, **PROBE), "distill")
    check_config(config_of(**HEADLESS, **PROBE), "distill")
