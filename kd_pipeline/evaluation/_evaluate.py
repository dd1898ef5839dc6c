"""Evaluate a model on a split: accuracy, F1, confusion, agreement with a teacher, and further metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from logging import getLogger
from typing import Any, overload

import torch
import torch.distributed
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.progress import Report, no_report
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, DataError, NonFiniteError
from kd_pipeline.evaluation._batches import batches_of
from kd_pipeline.evaluation._logits import known_views, logits_of, run_on_view, view_logits, with_mean
from kd_pipeline.evaluation._metrics import DISTANCES, Metric, MetricSettings
from kd_pipeline.evaluation._pixels import PixelTally
from kd_pipeline.evaluation._tally import ImageTally
from kd_pipeline.evaluation.predictions import Predictions
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.models.modules import eval_mode
from kd_pipeline.teachers.base import Teacher

__all__ = ["SCALARS", "Evaluation", "evaluate", "only_metrics"]

_logger = getLogger("kd_pipeline")

SCALARS = ("top1", "top5", "macro_f1", "miou", "pixel_accuracy", "loss", "agreement", *DISTANCES)
"""Fields of an `Evaluation` that are single numbers for a logger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics of a model on a split. Fractions are from 0 to 1; None means that a value cannot be known.

    A row of logits with NaN or inf counts as wrong, and in no column of the confusion matrix; a custom metric gets it
    as it is. For a model with logits of pixels, `loss`, `agreement`, the distances to the teacher, `class_accuracy` and
    `confusion` are of the pixels that are not ignored.
    """

    num_samples: int
    """Valid rows."""
    num_bad_rows: int
    """Rows of logits with NaN or inf."""
    top1: float | None
    """Fraction of samples whose label is the top prediction; None without labels, like every metric of labels."""
    top5: float | None
    """Fraction of samples whose label is among the top five predictions; 1 with at most five classes."""
    macro_f1: float | None
    """Mean F1 over the classes that occur at least once as a label or a prediction."""
    loss: float | None
    """Mean cross-entropy with the labels, in nats; NaN or inf if a row's is."""
    agreement: float | None
    """Fraction of samples with the same top prediction as the teacher; None without a teacher."""
    kl: float | None
    """Mean KL(teacher || model) of the softmax at T = 4, in nats, not multiplied by T²; None without a teacher."""
    logit_mse: float | None = None
    """Mean squared distance to the teacher's logits, over the classes that neither excludes with -inf."""
    probability_l1: float | None = None
    """Mean Σ_k |p_k - q_k| of both softmaxes at T = 1: from 0 to 2, twice their total variation."""
    teacher: "Evaluation | None" = None
    """The teacher's own metrics on the same images; None without a teacher."""
    class_accuracy: tuple[float | None, ...] | None
    """Top-1 of each class; None for a class without samples."""
    confusion: tuple[tuple[int, ...], ...] | None
    """`[K][K]`: rows are labels, columns predictions."""
    classes: tuple[str, ...] | None
    """Names of the K classes."""
    metrics: dict[str, Any]
    """Further metrics by name: numbers, or lists of them."""
    miou: float | None = None
    """Mean IoU over the classes that occur at least once in a mask or a prediction; None for a classifier, and without
    masks."""
    pixel_accuracy: float | None = None
    """Fraction of the pixels whose class is the top prediction."""
    class_iou: tuple[float | None, ...] | None = None
    """IoU of each class: its pixels in both mask and prediction, as a share of those in at least one."""

    def scalars(self) -> dict[str, float]:
        """Every known single number by name, for a logger."""
        named = {name: getattr(self, name) for name in SCALARS}
        return {name: float(value) for name, value in (named | self.metrics).items() if isinstance(value, float | int)}

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; NaN and inf become None."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return values | {"teacher": None if self.teacher is None else self.teacher.to_dict()}


@overload
def evaluate(
    model: nn.Module | Teacher,
    loader: AnyLoader,
    *,
    reference: nn.Module | Teacher | None = None,
    metrics: Sequence[MetricSettings | Metric] = (),
    max_batches: int | None = None,
    report: Report = no_report,
    view: str = IMAGES,
    reference_view: str | None = None,
    views: None = None,
    predictions: Predictions | None = None,
) -> Evaluation: ...


@overload
def evaluate(
    model: nn.Module | Teacher,
    loader: AnyLoader,
    *,
    reference: nn.Module | Teacher | None = None,
    metrics: Sequence[MetricSettings | Metric] = (),
    max_batches: int | None = None,
    report: Report = no_report,
    views: Sequence[str],
) -> dict[str, Evaluation]: ...


def evaluate(
    model: nn.Module | Teacher,
    loader: AnyLoader,
    *,
    reference: nn.Module | Teacher | None = None,
    metrics: Sequence[MetricSettings | Metric] = (),
    max_batches: int | None = None,
    report: Report = no_report,
    view: str = IMAGES,
    reference_view: str | None = None,
    views: Sequence[str] | None = None,
    predictions: Predictions | None = None,
) -> Evaluation | dict[str, Evaluation]:
    """Evaluate `model` on one epoch of `loader`; rows that are not `valid` are ignored.

    Counts are exact, and losses are rounded to 2**-24 before they are summed. The result is therefore the same for
    every batch size and number of ranks, as far as the model's own outputs are. If the loader reads one shard of
    several, every rank returns the result for the whole split. Nothing waits for the GPU before the end. `metrics` need
    all logits at once, which stay on the device until then; those of pixels they get image by image. Rows of logits
    with NaN or inf count as wrong, and are logged as a warning.

    Args:
        model: a network, which is in eval mode meanwhile, or a teacher. Returns logits `[N, K]`, or a mapping with
            `"logits"`, which may also be those of the pixels, `[N, K, h, w]`, for data with masks.
        loader: the split. `agreement`, `kl` and the other distances are measured against its teacher, if it has one.
        reference: measure `agreement` and `kl` against this network or teacher instead.
        metrics: classes of torchmetrics, and functions of logits and labels.
        max_batches: stop after this many batches.
        report: called with the number of batches that are done, and that there are, as far as that is known.
        view: of the images that a network sees; a teacher sees its own. Of a view with a `count`, each copy counts.
        reference_view: the same of the reference, if it is another one.
        views: evaluate on each of these views instead, such as sizes and crops of one reading of the images, and return
            the evaluations by name. Any model and `reference` see each of them. Copies in a view, and several views
            under the name `"averaged"`, count once with the mean of their probabilities.
        predictions: collects the prediction for each row of a classifier; not with `views`.

    Raises:
        ConfigError: a model returns no logits, or fails on the size of one of `views`; there is no such view; a
            metric is unknown, fails or has the name of another one; or `max_batches` is below 1.
        DataError: a label exceeds the logits, a metric needs labels and there are none, or all pixels are ignored.
        NonFiniteError: every row of the model's logits holds NaN or inf.
        TeacherError: a teacher rejects the images or fails.
        StateError: the loader reads one shard of several, and there is no process group.
    """
    names = None if views is None else known_views(loader, views)
    found: dict[str, _Pair] = {}
    with torch.no_grad(), eval_mode(model), eval_mode(reference):
        for batch in batches_of(loader, max_batches, report):
            if names is None:
                logits, rows = _logits_of_view(model, reference, batch, view, reference_view)
                compared = {view: logits}
                if predictions is not None:
                    predictions.add(rows, *logits)
            else:
                compared, rows = _logits_of_views(model, reference, batch, names), batch
            for name, each in compared.items():
                found.setdefault(name, _Pair(loader, metrics)).add(rows, *each)
    if views is None:
        return found[view].result()
    return {name: pair.result(name) for name, pair in found.items()}


_Logits = tuple[Tensor, Tensor | None]
"""Those of a model, and those of the one that it is compared with."""


def _logits_of_view(
    model: nn.Module | Teacher,
    reference: nn.Module | Teacher | None,
    batch: KDBatch,
    view: str,
    reference_view: str | None,
) -> tuple[_Logits, KDBatch]:
    """The logits for the view that a model sees, and the rows that they are of."""
    output, rows = run_on_view(model, batch, view)
    seen = model.view if isinstance(model, Teacher) else view
    theirs = batch.of_view(seen).teacher.get("logits")
    if isinstance(reference, Teacher):
        theirs = logits_of(reference.with_outputs(batch).of_view(seen).teacher)
    elif reference is not None:
        theirs = logits_of(run_on_view(reference, batch, reference_view or view)[0])
    return (logits_of(output), theirs), rows


def _logits_of_views(
    model: nn.Module | Teacher, reference: nn.Module | Teacher | None, batch: KDBatch, names: Sequence[str]
) -> dict[str, _Logits]:
    """The logits for each view, and of several the mean."""
    logits = with_mean({name: view_logits(model, batch, name) for name in names})
    theirs: Mapping[str, Tensor | None] = dict.fromkeys(logits, batch.of_view(IMAGES).teacher.get("logits"))
    if reference is not None:
        theirs = with_mean({name: view_logits(reference, batch, name) for name in names})
    return {name: (each, theirs[name]) for name, each in logits.items()}


class _Pair:
    """Tallies of a model and of the one that it is compared with."""

    def __init__(self, loader: AnyLoader, metrics: Sequence[MetricSettings | Metric]) -> None:
        self._loader, self._metrics = loader, metrics
        self._tally: ImageTally | PixelTally | None = None
        self._teacher: ImageTally | PixelTally | None = None

    def add(self, batch: KDBatch, logits: Tensor, teacher: Tensor | None) -> None:
        """Add one batch, without waiting for the device."""
        loader, metrics = self._loader, self._metrics
        self._tally = self._tally or _empty(loader, batch, logits, has_teacher=teacher is not None, metrics=metrics)
        self._tally.add(batch, logits, teacher)
        if teacher is not None:
            self._teacher = self._teacher or _empty(loader, batch, teacher, has_teacher=False, metrics=())
            self._teacher.add(batch, teacher, None)

    def result(self, view: str | None = None) -> Evaluation:
        """The metrics of all ranks; an error names `view`."""
        assert self._tally is not None  # a loader has at least one batch
        if self._loader.shard.world_size > 1:
            for each in (self._tally, self._teacher):
                if each is not None:
                    each.sum_over_ranks()
        classes = self._loader.classes
        try:
            teacher = None if self._teacher is None else _result(self._teacher, classes)
            return replace(_result(self._tally, classes), teacher=teacher)
        except NonFiniteError as exc:
            if view is None:
                raise
            raise NonFiniteError(f"view {view!r}: {exc}") from exc


def _empty(
    loader: AnyLoader,
    batch: KDBatch,
    logits: Tensor,
    *,
    has_teacher: bool,
    metrics: Sequence[MetricSettings | Metric],
) -> ImageTally | PixelTally:
    """A tally for the logits of images or of pixels."""
    if logits.ndim == 4:
        return PixelTally.empty(
            logits,
            has_masks=batch.masks is not None,
            has_teacher=has_teacher,
            ignore_index=loader.ignore_index,
            metrics=metrics,
            sums_over_ranks=loader.shard.world_size > 1,
        )
    if batch.labels is None and batch.masks is not None:
        raise ConfigError(
            f"the model returns logits {list(logits.shape)} for an image, and the data has masks, the class of each "
            "pixel; evaluate a network for segmentation, which returns {'logits': [N, K, h, w]}"
        )
    return ImageTally.empty(logits, has_labels=batch.labels is not None, has_teacher=has_teacher, metrics=metrics)


def only_metrics(metrics: Mapping[str, float], *, num_samples: int) -> Evaluation:
    """An `Evaluation` of which only further metrics are known."""
    return Evaluation(
        num_samples=num_samples,
        num_bad_rows=0,
        top1=None,
        top5=None,
        macro_f1=None,
        loss=None,
        agreement=None,
        kl=None,
        class_accuracy=None,
        confusion=None,
        classes=None,
        metrics=dict(metrics),
    )


def _result(tally: ImageTally | PixelTally, classes: tuple[str, ...] | None) -> Evaluation:
    """Wait for the device and compute the metrics."""
    counts = {name: int(count) for name, count in tally.counts.items()}
    if counts["samples"] == 0:
        raise DataError("no sample of this split can be read, so there is nothing to evaluate")
    _check_finite(counts)
    found = tally.metrics()
    further = {name: _plain(value) for name, value in found.pop("metrics").items()}
    known = only_metrics(further, num_samples=counts["samples"])
    return replace(known, **found, classes=classes, num_bad_rows=counts["bad_rows"])


def _check_finite(counts: Mapping[str, int]) -> None:
    """Report rows with NaN or inf: their top class is arbitrary, and would look like chance."""
    num_samples, num_bad = counts["samples"], counts["bad_rows"]
    hint = "check its weights and the normalization of its images, and if it runs in float16, use bfloat16 or float32"
    if num_bad == num_samples:
        raise NonFiniteError(f"the model's logits hold NaN or inf for all {num_samples} images; {hint}")
    for owner, num in (("model", num_bad), ("teacher", counts["bad_teacher_rows"])):
        if num:
            _logger.warning(
                "the %s's logits hold NaN or inf for %d of %d images, which count as wrong; %s",
                *(owner, num, num_samples, hint),
            )


def _plain(value: Any) -> Any:
    """`value` as JSON values; NaN and inf become None."""
    match value:
        case Tensor():
            return _plain(value.tolist())
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
