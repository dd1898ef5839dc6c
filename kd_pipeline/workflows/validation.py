"""Evaluate the student of a stage on the splits of its config, while it trains and at the end."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.progress import Report, timed
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate, only_metrics
from kd_pipeline.evaluation._features import evaluate_features, label_free_terms
from kd_pipeline.evaluation._metrics import Metric, MetricSettings
from kd_pipeline.evaluation.frozen import (
    FeatureProbeSettings,
    Features,
    extract_outputs,
    feature_name,
    knn_top1,
    linear_top1,
    split_bank,
)
from kd_pipeline.evaluation.predictions import Predictions
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.dry_run import run_dry
from kd_pipeline.models.backbone import POOLED
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan, member_names

__all__ = ["Bar", "StageEvaluator", "check_probed"]

_logger = logging.getLogger("kd_pipeline")

_NUM_IMAGES = 12
"""Images with the largest loss that are drawn, and as many with the smallest."""

Bar = Callable[[str], AbstractContextManager[Report]]
"""Shows how far the work with a title is."""


class StageEvaluator:
    """Measures what the plan of a stage says; call it on all ranks."""

    def __init__(
        self,
        config: Config,
        plan: EvaluationPlan,
        open_loader: Callable[[str], AnyLoader],
        *,
        metrics: Sequence[MetricSettings | Metric],
        reference: Teacher | None,
        is_headless: bool,
        view: str = IMAGES,
    ) -> None:
        """Evaluate on the splits of `config`.

        Args:
            config: the run, with the stage that is evaluated.
            plan: of the stage.
            open_loader: returns the loader of a split, without a teacher; for `train`, as for evaluation.
            metrics: further metrics of logits and labels.
            reference: the teacher for images of these splits; None without one that can run on them.
            is_headless: whether the student has no logits.
            view: of the images that the student sees.
        """
        self._config, self._plan, self._open_loader = config, plan, open_loader
        self._metrics, self._reference = metrics, reference
        self._is_headless, self._view = is_headless, view
        self.predictions: dict[str, Predictions] = {}
        """Of the last evaluation of each split."""
        self._teacher_outputs: dict[str, str] = {}
        self._teacher_found: dict[str, dict[str, float]] = {}
        """Metrics of the teacher's features, which do not change, by split."""
        if plan.probed:
            self._teacher_outputs = _teacher_outputs(config, reference)

    def evaluate(
        self,
        model: nn.Module,
        distillation: Distillation,
        splits: Collection[str],
        *,
        compare: bool,
        with_probe: bool,
        bar: Bar = timed,
    ) -> dict[str, Evaluation]:
        """Evaluate `model`; a split of which nothing can be known is left out.

        Args:
            model: the student.
            distillation: the loss with the projectors of this student.
            splits: to evaluate on.
            compare: also compare the student's logits with the teacher's, if there is one.
            with_probe: also judge the features, on those of `splits` that the plan says.
            bar: shows the progress of each part.
        """
        found = {}
        for split in splits:
            if split != "train" and (self._reference is not None or not self._is_headless):
                found[split] = self._evaluate(model, distillation, split, compare=compare, bar=bar)
        probed = [split for split in self._plan.probed if split in splits] if with_probe else []
        for split, (num_samples, metrics) in self._probe(model, probed, bar).items():
            each = found.get(split) or only_metrics({}, num_samples=num_samples)
            found[split] = replace(each, metrics={**each.metrics, **metrics})
        return found

    def _measures_loss(self, split: str) -> bool:
        """Whether the distillation loss is measured on a split: where there are no logits, or no labels for them."""
        if self._config.stage != "distill" or self._reference is None:
            return False
        loader = self._open_loader(split)
        is_unlabeled = not (loader.has_labels or loader.has_masks)
        return self._is_headless or (is_unlabeled and bool(label_free_terms(self._config.distill)))

    def _evaluate(
        self, model: nn.Module, distillation: Distillation, split: str, *, compare: bool, bar: Bar
    ) -> Evaluation:
        limit = None if split == "test" else self._config.train.limit_val_batches
        loader = self._open_loader(split)
        of_loss = None
        if self._measures_loss(split):
            assert self._reference is not None
            with bar(f"distillation loss on {split}") as report:
                of_loss = evaluate_features(
                    model,
                    distillation,
                    loader,
                    self._reference,
                    epochs=self._config.train.epochs,
                    max_batches=limit,
                    report=report,
                    view=self._view,
                )
            if self._is_headless:
                return of_loss
        self.predictions[split] = predictions = Predictions(num_images=_NUM_IMAGES)
        with bar(f"evaluation on {split}") as report:
            found = evaluate(
                model,
                loader,
                reference=self._reference if compare and _has_logits(self._reference) else None,
                metrics=self._metrics if loader.has_labels or loader.has_masks else (),
                max_batches=limit,
                report=report,
                view=self._view,
                predictions=predictions,
            )
        return found if of_loss is None else replace(found, loss=of_loss.loss, metrics=of_loss.metrics)

    def _probe(self, model: nn.Module, splits: Collection[str], bar: Bar) -> dict[str, tuple[int, dict[str, float]]]:
        """The number of images of each split and the metrics of the features, the student's and the teacher's."""
        settings = self._config.feature_probe
        if settings is None or not splits:
            return {}
        unknown = [split for split in splits if split not in self._teacher_found]
        if self._reference is not None and self._teacher_outputs and unknown:
            names = {f"{name}_": output for name, output in self._teacher_outputs.items()}
            measured = self._measure(self._reference, names, unknown, settings, bar, "the teacher's features")
            self._teacher_found |= {split: metrics for split, (_, metrics) in measured.items()}
        found = self._measure(model, {"": POOLED}, splits, settings, bar, "features")
        return {
            split: (num_samples, metrics | self._teacher_found.get(split, {}))
            for split, (num_samples, metrics) in found.items()
        }

    def _measure(
        self,
        model: nn.Module | Teacher,
        names: Mapping[str, str],
        splits: Collection[str],
        settings: FeatureProbeSettings,
        bar: Bar,
        title: str,
    ) -> dict[str, tuple[int, dict[str, float]]]:
        """The metrics of outputs of `model`; `names` are the outputs by the start of their metrics' names."""
        bank = self._extract(model, names, settings.bank, bar, title)
        found = {}
        for split in splits:
            is_bank = split == settings.bank
            queries = bank if is_bank else self._extract(model, names, split, bar, title)
            metrics: dict[str, float] = {}
            for prefix, output in names.items():
                pair = split_bank(bank[output]) if is_bank else (bank[output], queries[output])
                num_samples = len(pair[1])
                metrics[f"{prefix}knn_top1"] = knn_top1(*pair, k=settings.k, temperature=settings.temperature)
                if settings.linear:
                    with bar(f"linear classifier on {title}"):
                        metrics[f"{prefix}linear_top1"] = linear_top1(*pair)
            found[split] = num_samples, metrics
        return found

    def _extract(
        self, model: nn.Module | Teacher, names: Mapping[str, str], split: str, bar: Bar, title: str
    ) -> dict[str, Features]:
        limit = None if split == "test" else self._config.train.limit_val_batches
        try:
            with bar(f"{title} of {split}") as report:
                return extract_outputs(
                    model,
                    self._open_loader(split),
                    list(names.values()),
                    max_batches=limit,
                    report=report,
                    view=self._view,
                )
        except DataError as exc:
            raise DataError(f"feature_probe: {split}: {exc}") from exc


def check_probed(student: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Check that a student has features to judge, with inputs of two rows by name.

    Raises:
        ConfigError: it fails, or returns no vector but logits.
    """
    outputs = run_dry(student, (), example).outputs
    if feature_name({name: each.ndim for name, each in outputs.items()}, POOLED) is None:
        shapes = ", ".join(f"{name!r} {list(each.shape)}" for name, each in outputs.items())
        raise ConfigError(
            f"feature_probe judges a student's vector {POOLED!r}, and the student returns {shapes}; set "
            "student.num_classes: 0, which leaves out the head of a classifier, or remove feature_probe"
        )


def _teacher_outputs(config: Config, teacher: Teacher | None) -> dict[str, str]:
    """The outputs to judge beside the student's, by the names of the teachers; logs why there is none."""
    if teacher is None:
        if config.stage == "distill" and is_rank_zero():
            _logger.info("feature probe: without the teacher, because a recording has no outputs for these images")
        return {}
    num_dims = {name: len(spec.shape) for name, spec in teacher.outputs.items()}
    members = member_names(config)
    wanted = {member: f"{member}.{POOLED}" for member in members} or {"teacher": POOLED}
    found = {name: output for name, output in wanted.items() if feature_name(num_dims, output) is not None}
    if lacking := [name for name in wanted if name not in found]:
        shapes = ", ".join(f"{name} {spec}" for name, spec in teacher.outputs.items())
        if is_rank_zero():
            _logger.info(
                "feature probe: without %s, which has no single vector but logits: %s",
                " and ".join("the teacher" if name == "teacher" else name for name in lacking),
                shapes,
            )
    return found


def _has_logits(teacher: Teacher | None) -> bool:
    """Whether the student's logits can be compared with the teacher's; members' of several are not averaged."""
    return teacher is not None and "logits" in teacher.outputs
