"""What a stage measures on which splits, and which of these metrics selects the best student and stops the run."""

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Self

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._features import COSINE, cosine_names, label_free_terms
from kd_pipeline.evaluation._metrics import DISTANCES
from kd_pipeline.training.settings import TrainSettings

__all__ = ["PROBE_METRIC", "EvaluationPlan", "member_names", "own_defaults", "select_best"]

_logger = logging.getLogger("kd_pipeline")

_DEFAULTS = ("knn_top1", "top1", "miou", "loss")
"""Metrics that select the best student if none is named, the first that is measured."""
PROBE_METRIC = re.compile(r"(\w+_)?(knn|linear)_top1")
"""Names of the metrics of `feature_probe`, the student's and the teachers'."""


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Splits and metrics of a stage."""

    validated: tuple[str, ...]
    """Splits that the student is evaluated on during training."""
    probed: tuple[str, ...]
    """Splits whose images `feature_probe` classifies."""
    every_epoch: tuple[str, ...]
    """Metrics that each epoch measures, such as `val/top1`."""
    sparse: tuple[str, ...]
    """Metrics that only some epochs measure."""
    has_unknown: bool
    """Whether there are metrics of the user's own, whose names are not known before they are called."""
    is_own: bool = False
    """Whether a function of the user's own measures all of them."""

    @classmethod
    def of_function(cls, validated: tuple[str, ...]) -> Self:
        """The plan of a stage whose splits a function of the user's own evaluates."""
        return cls(validated, (), (), (), has_unknown=True, is_own=True)

    @classmethod
    def of(
        cls,
        config: Config,
        stage: str,
        *,
        labeled: Collection[str] | None = None,
        masked: Collection[str] | None = None,
        has_reference: bool = True,
        validated: tuple[str, ...] | None = None,
        is_headless: bool | None = None,
    ) -> Self:
        """The plan of a stage.

        Args:
            config: the run.
            stage: of the run.
            labeled: splits with labels; None if that is not known yet, and all that may be measured counts.
            masked: splits with masks that the student's logits are compared with; none if only `labeled` is given.
            has_reference: whether there is a teacher that can run on images of the other splits.
            validated: splits for validation; defaults to those of the config.
            is_headless: whether the student has no logits; defaults to what the config says.

        Raises:
            ConfigError: a split of `feature_probe` has no labels, or `train.metrics` have none to compare with.
        """
        has_reference = has_reference and stage == "distill"
        if is_headless is None:
            is_headless = stage == "distill" and config.student is not None and config.student.is_headless
        if validated is None:
            validated = config.data.validated
        probed = _probed(config, stage, labeled)
        bank = None if not probed or config.feature_probe is None else config.feature_probe.bank
        validated = tuple(name for name in validated if name != bank or bank in ("val", *probed))
        masked = () if labeled is not None and masked is None else masked
        with_classes = None if labeled is None or masked is None else {*labeled, *masked}
        _check_metrics(config, validated, with_classes, is_headless=is_headless)
        every_epoch = [
            f"{name}/{metric}"
            for name in validated
            for metric in _metrics(config, name, labeled, masked, has_reference, is_headless=is_headless)
        ]
        of_probe = [
            f"{name}/{metric}" for name in probed if name != "test" for metric in _probe_metrics(config, has_reference)
        ]
        is_rare = config.feature_probe is not None and config.feature_probe.every > 1
        return cls(
            validated,
            probed,
            tuple([*every_epoch, *([] if is_rare else of_probe)]),
            tuple(of_probe if is_rare else ()),
            any(metric.is_custom for metric in config.train.metrics),
        )

    def check(self, train: TrainSettings) -> None:
        """Refuse to select or stop by a metric that is not measured.

        Raises:
            ConfigError: one is not.
        """
        stopping = train.early_stopping
        known = [*self.every_epoch, *self.sparse]
        for key, metric in (
            ("select_by", train.select_by),
            ("early_stopping.metric", None if stopping is None else stopping.metric),
        ):
            is_known = metric is None or metric.startswith("train/") or metric in known or self.has_unknown
            if not is_known:
                raise ConfigError(f"train.{key}: {metric!r} is not measured{suggest(metric or '', known)}")


def select_best(config: Config, stage: str, plan: EvaluationPlan) -> Config:
    """`config` with the metrics and modes that select the best student and stop the run, which are logged.

    Raises:
        ConfigError: a metric that is named is not measured, or early stopping has none.
    """
    train = config.train
    plan.check(train)
    if plan.is_own and train.select_by is not None and train.select_mode is None:
        _check_direction(train.select_by)
    metric = train.select_by or _default_metric(plan)
    mode = None if metric is None else train.select_mode or _mode(config, metric)
    stopping = train.early_stopping
    if stopping is not None:
        stops_by = stopping.metric or metric
        if stops_by is None:
            raise ConfigError(
                "train.early_stopping: nothing is measured after an epoch that it could stop by; give a validation set "
                "labels, set feature_probe, or remove early_stopping"
                if not plan.is_own
                else "train.early_stopping: your own function validates, and which of its numbers stops the run is "
                "not known; set train.early_stopping.metric and mode, such as {metric: val/wer, mode: min}"
            )
        own_mode = mode if stops_by == metric else _mode(config, stops_by)
        stopping = stopping.model_copy(update={"metric": stops_by, "mode": stopping.mode or own_mode})
    if is_rank_zero() and train.select_by is None:
        if metric is not None:
            order = "higher" if mode == "max" else "lower"
            trained = "teacher" if stage == "teacher" else "student"
            _logger.info("the best %s is selected by %s (%s is better)", trained, metric, order)
        elif plan.validated and not plan.is_own:
            _logger.info("nothing is measured on validation images every epoch, so the last student is the result")
    changes = {"select_by": metric, "select_mode": mode, "early_stopping": stopping}
    return config.model_copy(update={"train": train.model_copy(update=changes)})


def own_defaults() -> dict[str, Literal["max", "min"]]:
    """Metrics of a function of the user's own that select the best student if none is named, with their modes."""
    return {f"val/{name}": "min" if name == "loss" else "max" for name in _DEFAULTS}


def member_names(config: Config) -> tuple[str, ...]:
    """Names of the teachers, if there are several with outputs of their own."""
    members = getattr(config.teacher, "members", None)
    return tuple(members) if isinstance(members, dict) else ()


def _probed(config: Config, stage: str, labeled: Collection[str] | None) -> tuple[str, ...]:
    probe = config.feature_probe
    if probe is None or stage == "teacher":
        return ()
    if labeled is not None:
        for key, name in (("bank", probe.bank), *(("sets", name) for name in probe.sets or ())):
            if name not in labeled:
                raise ConfigError(
                    f"feature_probe.{key}: the split {name!r} has no labels, which features are judged by; name one "
                    f"with labels{f', such as {sorted(labeled)[0]!r}' if labeled else ''}, or remove feature_probe"
                )
    if probe.sets is not None:
        return probe.sets
    found = [name for name in config.data.validated if name != probe.bank and (labeled is None or name in labeled)]
    has_test = config.data.test is not None and probe.bank != "test" and (labeled is None or "test" in labeled)
    return (*(found or [probe.bank]), *(["test"] if has_test else []))


def _metrics(
    config: Config,
    split: str,
    labeled: Collection[str] | None,
    masked: Collection[str] | None,
    has_reference: bool,
    *,
    is_headless: bool,
) -> Iterator[str]:
    """What is measured on a split every epoch, besides the probe."""
    train = config.train
    is_masked = masked is not None and split in masked
    has_masks = masked is None or is_masked
    has_labels = labeled is None or (split in labeled and not is_masked)
    lacks_labels = labeled is None or not (split in labeled or is_masked)
    if not is_headless and (has_labels or has_masks):
        yield from ("top1", "top5", "macro_f1") if has_labels else ()
        yield from ("miou", "pixel_accuracy") if has_masks else ()
        yield from ("loss", *(metric.name for metric in train.metrics))
    if not is_headless and has_reference and train.compare_with_teacher:
        yield from ("agreement", *DISTANCES)
    if has_reference and (is_headless or lacks_labels):
        terms = label_free_terms(config.distill)
        yield from ("loss", *terms, *cosine_names(config.distill).values()) if terms else ()


def _probe_metrics(config: Config, has_reference: bool) -> Iterator[str]:
    assert config.feature_probe is not None
    teachers = (member_names(config) or ("teacher",)) if has_reference else ()
    for metric in ("knn_top1", *(["linear_top1"] if config.feature_probe.linear else [])):
        yield from (metric, *(f"{teacher}_{metric}" for teacher in teachers))


def _check_metrics(
    config: Config, validated: Collection[str], with_classes: Collection[str] | None, *, is_headless: bool
) -> None:
    if not config.train.metrics:
        return
    if is_headless:
        raise ConfigError(
            "train.metrics compare logits with labels, and a student without a head has no logits; remove them, or set "
            "feature_probe"
        )
    if validated and with_classes is not None and not set(validated) & set(with_classes):
        raise ConfigError("train.metrics compare logits with labels, and no validation set has labels; remove them")


def _default_metric(plan: EvaluationPlan) -> str | None:
    names = (f"{split}/{metric}" for split in plan.validated for metric in _DEFAULTS)
    return next((name for name in names if name in plan.every_epoch), None)


def _check_direction(metric: str) -> None:
    """Refuse to guess whether a number of the user's own is better when it is higher."""
    if metric.partition("/")[2] not in _DEFAULTS:
        raise ConfigError(
            f"train.select_by: whether {metric} is better when it is higher or lower is not known; set "
            "train.select_mode to max or min"
        )


def _mode(config: Config, metric: str) -> Literal["max", "min"]:
    """Losses, and terms of the loss, are better the lower they are."""
    name = metric.partition("/")[2]
    if PROBE_METRIC.fullmatch(name) or name.startswith(f"{COSINE}."):
        return "max"
    losses = {"loss", *DISTANCES, "task", "distill", *config.distill.term_names}
    return "min" if name in losses else "max"
