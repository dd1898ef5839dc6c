"""How good a model is on a split: accuracy, F1, confusion, agreement with a teacher, and any other metric."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Self

import torch
import torch.distributed
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher

__all__ = [
    "TEMPERATURE",
    "Evaluation",
    "Metric",
    "MetricSettings",
    "eval_mode",
    "evaluate",
    "images_for",
    "logits_of",
    "open_metrics",
]

TEMPERATURE = 4.0
"""Of both models in the KL divergence."""
_QUANTUM = 2.0**-24
"""Sums of numbers are taken in whole multiples of this. In float64 such sums are exact up to 5e8, so they depend
neither on the order of the samples nor on how they are split into batches and ranks."""

Metric = Callable[[Tensor, Tensor], Mapping[str, float]]
"""The user's own: gets logits `[N, K]` float32 and labels `[N]` int64 of the whole split, returns values by name."""


class MetricSettings(Settings):
    """A classification metric of torchmetrics, or the user's own function."""

    name: str = Field(pattern=r"^\w+((\.\w+)*:\w+)?$")
    """Its class in `torchmetrics.classification`, such as `CohenKappa`; or, as `package.module:function`, a `Metric` of
    your own."""
    kwargs: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """More arguments of the class; `task` is multiclass and `num_classes` the number of logits unless given."""

    @property
    def names_a_function(self) -> bool:
        """Whether it is the user's own."""
        return ":" in self.name

    @model_validator(mode="after")
    def _gives_arguments_to_a_class(self) -> Self:
        if self.names_a_function and self.kwargs:
            raise ValueError(f"{self.name} gets logits and labels alone; remove kwargs")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was found on a split. Fractions go from 0 to 1; None stands for what cannot be known.

    A row of logits with NaN or inf is a wrong answer in every figure, and in no column of the confusion matrix.
    """

    num_samples: int
    """Rows that count."""
    num_bad_rows: int
    """Rows of logits with NaN or inf."""
    top1: float | None
    """Part of the samples whose label is the first choice; None without labels, like all that follow from labels."""
    top5: float | None
    """Part of the samples whose label is among the first five choices; 1 where there are at most five classes."""
    macro_f1: float | None
    """Mean of the classes' F1, over those that are a label or a prediction at least once."""
    loss: float | None
    """Mean cross-entropy with the labels, in nats; NaN or inf where a row's is."""
    agreement: float | None
    """Part of the samples whose first choice is the teacher's; None without one."""
    kl: float | None
    """Mean KL(teacher || model) of the softmax at T = 4, in nats and not times T²; None without a teacher."""
    class_accuracy: tuple[float | None, ...] | None
    """Part of each class that was recognized; None for a class without samples."""
    confusion: tuple[tuple[int, ...], ...] | None
    """`[K][K]`: rows are labels, columns predictions."""
    classes: tuple[str, ...] | None
    """Names of the K classes."""
    metrics: dict[str, Any]
    """What else was asked for, by name: numbers, or lists of them."""

    def figures(self) -> dict[str, float]:
        """The single numbers that are known, by name, as a logger takes them."""
        named = {name: getattr(self, name) for name in ("top1", "top5", "macro_f1", "loss", "agreement", "kl")}
        return {name: float(value) for name, value in (named | self.metrics).items() if isinstance(value, float | int)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can spell; NaN and inf become None."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def open_metrics(settings: Sequence[MetricSettings], *, plugins: Collection[str] = ()) -> list[MetricSettings | Metric]:
    """What `evaluate` takes as its metrics, once each name is known to stand for something.

    Args:
        settings: which ones.
        plugins: modules that functions may come from.

    Raises:
        ConfigError: torchmetrics has no such class, or a function is not there or not allowed.
        MissingPackageError: torchmetrics is needed and not installed.
    """
    found: list[MetricSettings | Metric] = []
    for metric in settings:
        if metric.names_a_function:
            found.append(import_function("metrics", metric.name, plugins, caller="open_metrics"))
        else:
            _class_of(metric.name)
            found.append(metric)
    return found


def evaluate(
    model: nn.Module | Teacher,
    loader: KDDataLoader,
    *,
    reference: Teacher | None = None,
    metrics: Sequence[MetricSettings | Metric] = (),
    max_batches: int | None = None,
) -> Evaluation:
    """Run one epoch of `loader` through `model`; rows that are not `valid` count nowhere.

    Counts are exact, and sums of numbers rounded to 2**-24 are too, so that the result is the same for every batch
    size and number of ranks, as far as the model's own answers are. Where the loader reads one shard of several and
    `torch.distributed` is initialized, all ranks get the result for the whole split. Nothing waits for the GPU before
    the end. `metrics` need all logits at once, which stay on the device until then.

    Args:
        model: a student, which is in eval mode meanwhile, or any teacher. It returns logits `[N, K]` or a mapping with
            `"logits"`.
        loader: the split; its own teacher, if it has one, is what `agreement` and `kl` are measured by.
        reference: a teacher that is asked for the same images instead.
        metrics: names in torchmetrics, and functions of logits and labels.
        max_batches: look at no more than so many, for trying things out.

    Raises:
        ConfigError: the model returns no logits, or a metric is unknown, fails or has another's name.
        DataError: labels exceed the logits, or a metric needs labels and there are none.
        TeacherError: a teacher refuses the images or fails.
    """
    tally: _Tally | None = None
    with torch.no_grad(), eval_mode(model):
        for batch in islice(loader, max_batches):
            logits_NK = logits_of(model(images_for(model, batch.images)))
            wanted_NK = (batch.teacher if reference is None else reference(batch.images)).get("logits")
            if tally is None:
                has_labels, has_teacher = batch.labels is not None, wanted_NK is not None
                tally = _Tally.empty(logits_NK, has_labels=has_labels, has_teacher=has_teacher)
            tally.add(batch, logits_NK, wanted_NK, keep_rows=bool(metrics))
    assert tally is not None  # a loader has at least one batch
    if loader.shard.world_size > 1 and torch.distributed.is_initialized():
        tally.sum_over_ranks()
    return _result(tally, loader, metrics)


@dataclass(frozen=True, slots=True)
class _Tally:
    """What was counted so far, on the model's device."""

    confusion: Tensor
    """`[K, K + 1]` int64, rows are labels; the last column is for rows with NaN or inf."""
    counts: Mapping[str, Tensor]
    """Int64 scalars."""
    sums: Mapping[str, Tensor]
    """Float64 scalars, in units of `_QUANTUM`; there is one for whatever the first batch could be held against."""
    rows: list[tuple[Tensor, ...]]
    """Index, valid, logits and labels of each batch; empty unless a metric wants them."""

    @classmethod
    def empty(cls, logits_NK: Tensor, *, has_labels: bool, has_teacher: bool) -> "_Tally":
        num_classes, device = logits_NK.shape[1], logits_NK.device
        counts = ("samples", "bad_rows", "bad_labels", "in_top5", "agreed")
        sums = [name for name, is_known in (("loss", has_labels), ("kl", has_teacher)) if is_known]
        return cls(
            torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device),
            {name: torch.zeros((), dtype=torch.int64, device=device) for name in counts},
            {name: torch.zeros((), dtype=torch.float64, device=device) for name in sums},
            [],
        )

    def add(self, batch: KDBatch, logits_NK: Tensor, wanted_NK: Tensor | None, *, keep_rows: bool) -> None:
        """Count one batch; nothing here waits for the device."""
        is_bad_N = ~logits_NK.isfinite().all(dim=1)
        choice_N = logits_NK.argmax(dim=1).masked_fill(is_bad_N, logits_NK.shape[1])
        self._count("samples", batch.valid, batch.valid)
        self._count("bad_rows", is_bad_N, batch.valid)
        if batch.labels is not None:
            labels = self._add_labels(batch.labels, logits_NK, choice_N, batch.valid)
            if keep_rows:
                self.rows.append((batch.index, batch.valid, logits_NK, labels))
        if wanted_NK is not None:
            self._add_teacher(wanted_NK, logits_NK, choice_N, batch.valid)

    def sum_over_ranks(self) -> None:
        """Add up the tallies of all ranks, on every rank."""
        for tensor in (self.confusion, *self.counts.values(), *self.sums.values()):
            torch.distributed.all_reduce(tensor)
        if self.rows:
            self.rows[:] = [tuple(_of_all_ranks(torch.cat(column)) for column in zip(*self.rows, strict=True))]

    def logits_and_labels(self) -> tuple[Tensor, Tensor]:
        """Those of the valid rows, in the order of the dataset."""
        index, valid, logits, labels = (torch.cat(column) for column in zip(*self.rows, strict=True))
        order = index[valid].argsort()
        return logits[valid][order], labels[valid][order]

    def _add_labels(self, labels: Tensor, logits_NK: Tensor, choice_N: Tensor, valid_N: Tensor) -> Tensor:
        """Count what follows from labels, and return them as `[N]` int64."""
        num_classes = logits_NK.shape[1]
        is_hard = labels.ndim == 1
        label_N = labels if is_hard else labels.argmax(dim=1)
        is_outside_N = (label_N < 0) | (label_N >= num_classes)
        label_N = label_N.masked_fill(is_outside_N, 0)  # an index out of range would kill the CUDA context
        top5_N5 = logits_NK.topk(min(5, num_classes), dim=1).indices
        is_in_top5_N = (top5_N5 == label_N[:, None]).any(dim=1) & (choice_N < num_classes)
        self._count("bad_labels", is_outside_N, valid_N)
        self._count("in_top5", is_in_top5_N, valid_N)
        self.confusion.view(-1).scatter_add_(0, label_N * (num_classes + 1) + choice_N, valid_N.long())
        loss_N = cross_entropy(logits_NK, label_N if is_hard else labels.to(logits_NK.dtype), reduction="none")
        self._sum("loss", loss_N, valid_N)
        return label_N

    def _add_teacher(self, wanted_NK: Tensor, logits_NK: Tensor, choice_N: Tensor, valid_N: Tensor) -> None:
        if wanted_NK.shape != logits_NK.shape:
            raise ConfigError(
                f"the model gives logits {list(logits_NK.shape)}, the teacher that it is held against "
                f"{list(wanted_NK.shape)}; compare models of the same classes"
            )
        self._count("agreed", (choice_N == wanted_NK.argmax(dim=1)) & wanted_NK.isfinite().all(dim=1), valid_N)
        log_model_NK = (logits_NK / TEMPERATURE).log_softmax(dim=1)
        log_wanted_NK = (wanted_NK / TEMPERATURE).log_softmax(dim=1)
        self._sum("kl", (log_wanted_NK.exp() * (log_wanted_NK - log_model_NK)).sum(dim=1), valid_N)

    def _count(self, name: str, flags_N: Tensor, valid_N: Tensor) -> None:
        self.counts[name].add_((flags_N & valid_N).sum())

    def _sum(self, name: str, values_N: Tensor, valid_N: Tensor) -> None:
        self.sums[name].add_((values_N.double() / _QUANTUM).round().masked_fill(~valid_N, 0).sum())


def _result(tally: _Tally, loader: KDDataLoader, metrics: Sequence[MetricSettings | Metric]) -> Evaluation:
    """Where the host waits for the numbers."""
    counts = {name: int(count) for name, count in tally.counts.items()}
    num_samples = counts["samples"]
    if num_samples == 0:
        raise DataError("no sample of this split can be read, so there is nothing to evaluate on")
    means = {name: float(total) * _QUANTUM / num_samples for name, total in tally.sums.items()}
    confusion = tally.confusion.double().cpu()
    num_classes = len(confusion)
    if counts["bad_labels"]:
        raise DataError(
            f"{counts['bad_labels']} of {num_samples} labels are not from 0 to {num_classes - 1}, and the model has "
            f"{num_classes} logits; evaluate a model of the data's classes"
        )
    has_labels = "loss" in means
    right_K, label_K, choice_K = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)[:num_classes]
    f1_K = 2 * right_K / (label_K + choice_K)  # 0 / 0 is NaN: a class that nobody mentions
    accuracies = [
        None if num == 0 else right / num for right, num in zip(right_K.tolist(), label_K.tolist(), strict=True)
    ]
    return Evaluation(
        num_samples=num_samples,
        num_bad_rows=counts["bad_rows"],
        top1=float(right_K.sum()) / num_samples if has_labels else None,
        top5=counts["in_top5"] / num_samples if has_labels else None,
        macro_f1=float(f1_K.nanmean()) if has_labels else None,
        loss=means.get("loss"),
        agreement=counts["agreed"] / num_samples if "kl" in means else None,
        kl=means.get("kl"),
        class_accuracy=tuple(accuracies) if has_labels else None,
        confusion=tuple(map(tuple, tally.confusion[:, :num_classes].tolist())) if has_labels else None,
        classes=loader.classes,
        metrics=_measured(metrics, tally) if metrics else {},
    )


def _measured(metrics: Sequence[MetricSettings | Metric], tally: _Tally) -> dict[str, Any]:
    if not tally.rows:
        raise DataError("metrics compare logits with labels, and this split has no labels; leave out the metrics")
    logits_NK, label_N = tally.logits_and_labels()
    found: dict[str, Any] = {}
    for metric in metrics:
        if isinstance(metric, MetricSettings):
            values: Mapping[str, Any] = {metric.name: _torchmetric(metric, logits_NK, label_N)}
        else:
            values = metric(logits_NK, label_N)
            if not isinstance(values, Mapping):
                raise ConfigError(f"the metric {metric} should return values by name, got {type(values).__qualname__}")
        if twice := found.keys() & values.keys():
            raise ConfigError(f"two metrics are called {sorted(twice)[0]!r}; give one another name")
        found |= {name: _plain(value) for name, value in values.items()}
    return found


def _torchmetric(settings: MetricSettings, logits_NK: Tensor, label_N: Tensor) -> Any:
    kind = _class_of(settings.name)
    arguments: dict[str, Any] = {"num_classes": logits_NK.shape[1], "sync_on_compute": False}
    if "task" in inspect.signature(kind).parameters:
        arguments["task"] = "multiclass"
    try:
        metric = kind(**arguments | settings.kwargs).to(logits_NK.device)
        metric.update(logits_NK.softmax(dim=1), label_N)
        return metric.compute()
    except Exception as exc:  # torchmetrics raises ValueError, TypeError, RuntimeError and others
        raise ConfigError(f"the metric {settings.name} fails: {exc}; check its kwargs {settings.kwargs}") from exc


def _class_of(name: str) -> Any:
    """The class in torchmetrics."""
    classification = require("torchmetrics.classification", extra="train")
    kind = getattr(classification, name, None)
    if name not in classification.__all__ or kind is None:
        raise ConfigError(f"torchmetrics.classification has no {name!r}{suggest(name, classification.__all__)}")
    return kind


def images_for(model: nn.Module | Teacher, images: Tensor) -> Tensor:
    """Images of a loader, for a network in the dtype of its weights; a teacher takes them as they are."""
    weight = None if isinstance(model, Teacher) else next(model.parameters(), None)
    return images if weight is None else images.to(weight.dtype)


def logits_of(output: object) -> Tensor:
    """The logits among what a model returned, in float32, or float64 where they are.

    Raises:
        ConfigError: there are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(output).__qualname__
        raise ConfigError(f"a model returns logits [N, K], or a mapping with 'logits', got {found}")
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def eval_mode(model: nn.Module | Teacher) -> Iterator[None]:
    """Every module of a network in eval mode; each gets its own mode back."""
    if isinstance(model, Teacher):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _of_all_ranks(rows: Tensor) -> Tensor:
    """`rows` `[n, ...]` of all ranks, one after another; n may differ."""
    world_size = torch.distributed.get_world_size()
    number = torch.tensor([len(rows)], device=rows.device)
    numbers = [torch.zeros_like(number) for _ in range(world_size)]
    torch.distributed.all_gather(numbers, number)
    padded = torch.cat([rows, rows.new_zeros(int(max(numbers)) - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([part[: int(num)] for part, num in zip(gathered, numbers, strict=True)])


def _plain(value: Any) -> Any:
    """Lists, dicts and finite numbers."""
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
