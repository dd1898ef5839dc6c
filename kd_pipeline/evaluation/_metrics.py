"""Further metrics of logits and labels: classes of torchmetrics by name, and functions of the user's own."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kd_pipeline._core.finite import has_softmax
from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError

__all__ = [
    "DISTANCES",
    "TEMPERATURE",
    "Metric",
    "MetricSettings",
    "compute",
    "distances",
    "measure",
    "open_metrics",
    "shares",
    "start",
    "update",
]

DISTANCES = ("kl", "logit_mse", "probability_l1")
"""Names of what `distances` returns."""
TEMPERATURE = 4.0
"""Softmax temperature of both models in the KL divergence."""

Metric = Callable[[Tensor, Tensor], Mapping[str, float]]
"""A custom metric: takes logits `[N, K]` float32 and labels `[N]` int64 of the whole split, returns values by name."""


class MetricSettings(Settings):
    """A classification metric of torchmetrics, or a custom function."""

    name: str = Field(pattern=r"^\w+((\.\w+)*:\w+)?$")
    """A class of `torchmetrics.classification`, such as `CohenKappa`, or a custom `Metric` as
    `package.module:function`."""
    kwargs: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """More arguments of the class; `task` defaults to multiclass and `num_classes` to the number of logits."""

    @property
    def is_custom(self) -> bool:
        """Whether `name` is a custom function."""
        return ":" in self.name

    @model_validator(mode="after")
    def _kwargs_need_a_class(self) -> Self:
        if self.is_custom and self.kwargs:
            raise ValueError(f"{self.name} gets only logits and labels; remove kwargs")
        return self


def open_metrics(settings: Sequence[MetricSettings], *, plugins: Collection[str] = ()) -> list[MetricSettings | Metric]:
    """Look up each metric now rather than after an evaluation; returns what `evaluate` takes.

    Args:
        settings: the metrics.
        plugins: modules that custom functions may come from.

    Raises:
        ConfigError: torchmetrics has no such class, or a function does not exist or is not allowed.
        MissingPackageError: torchmetrics is needed and not installed.
    """
    opened: list[MetricSettings | Metric] = []
    for metric in settings:
        if metric.is_custom:
            opened.append(import_function("metrics", metric.name, plugins))
        else:
            _torchmetrics_class(metric.name)
            opened.append(metric)
    return opened


def shares(right: Sequence[float], total: Sequence[float]) -> tuple[float | None, ...]:
    """Each of `right` divided by its `total`; None where that is 0."""
    return tuple(part / number if number else None for part, number in zip(right, total, strict=True))


def distances(logits: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """How far logits `[N, K, ...]` are from a teacher's: the fields of an `Evaluation` by name, each `[N, ...]`."""
    is_excluded = logits.isneginf() | teacher.isneginf()
    squares = (logits - teacher).square().masked_fill(is_excluded, 0)
    return {
        "kl": _kl_divergence(logits, teacher),
        "logit_mse": squares.sum(dim=1) / (~is_excluded).sum(dim=1),
        "probability_l1": (logits.softmax(dim=1) - teacher.softmax(dim=1)).abs().sum(dim=1),
    }


def measure(settings: MetricSettings, logits: Tensor, labels: Tensor) -> Any:
    """The value of a class of torchmetrics for logits `[N, K]` and labels `[N]` of the whole split.

    Raises:
        ConfigError: it fails.
    """
    metric = start(settings, logits)
    update(metric, settings, logits, labels)
    return compute(metric, settings)


def start(settings: MetricSettings, logits: Tensor, *, sums_over_ranks: bool = False) -> Any:
    """A new metric of torchmetrics for as many classes as `logits` `[N, K, ...]` have, on their device.

    Args:
        settings: its class and arguments.
        logits: of a batch.
        sums_over_ranks: whether each process gives it another part of the split.

    Raises:
        ConfigError: it takes other arguments.
    """
    kind = _torchmetrics_class(settings.name)
    arguments: dict[str, Any] = {"num_classes": logits.shape[1], "sync_on_compute": sums_over_ranks}
    if "task" in inspect.signature(kind).parameters:
        arguments["task"] = "multiclass"
    with _explained(settings):
        return kind(**arguments | settings.kwargs).to(logits.device)


def update(metric: Any, settings: MetricSettings, logits_NK: Tensor, label_N: Tensor) -> None:
    """Add rows to a metric; one of logits with NaN or inf is surely wrong: all classes are alike but the label, out.

    Raises:
        ConfigError: it fails.
    """
    is_bad_N = ~has_softmax(logits_NK)[:, None]
    is_label_NK = torch.nn.functional.one_hot(label_N, logits_NK.shape[1]).bool()
    probabilities_NK = logits_NK.masked_fill(is_bad_N, 0).masked_fill(is_bad_N & is_label_NK, -torch.inf).softmax(dim=1)
    with _explained(settings):
        metric.update(probabilities_NK, label_N)


def compute(metric: Any, settings: MetricSettings) -> Any:
    """The value of a metric.

    Raises:
        ConfigError: it fails.
    """
    with _explained(settings):
        return metric.compute()


def _kl_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || model) of the softmax at `TEMPERATURE` of each row of logits `[N, K, ...]`, `[N, ...]`."""
    log_model = (logits / TEMPERATURE).log_softmax(dim=1)
    log_teacher = (teacher / TEMPERATURE).log_softmax(dim=1)
    probability = log_teacher.exp()
    return (probability * (log_teacher - log_model).masked_fill(probability == 0, 0)).sum(dim=1)  # 0 · log 0 is 0


@contextmanager
def _explained(settings: MetricSettings) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # torchmetrics raises ValueError, TypeError, RuntimeError and others
        raise ConfigError(f"the metric {settings.name} fails: {exc}; check its kwargs {settings.kwargs}") from exc


def _torchmetrics_class(name: str) -> Any:
    classification = require("torchmetrics.classification", extra="train")
    kind = getattr(classification, name, None)
    if name not in classification.__all__ or kind is None:
        raise ConfigError(f"torchmetrics.classification has no {name!r}{suggest(name, classification.__all__)}")
    return kind
