"""Counts and sums over the images of a split, for models with logits `[N, K]`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_pipeline._core.finite import has_softmax
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.evaluation._gather import of_all_ranks
from kd_pipeline.evaluation._metrics import DISTANCES, Metric, MetricSettings, distances, measure, shares

__all__ = ["QUANTUM", "ImageTally"]

QUANTUM = 2.0**-24
"""Losses are rounded to multiples of this before they are summed. In float64 such sums are exact up to 5e8, so they do
not depend on the order of the samples or on how they are split into batches and ranks."""


@dataclass(frozen=True, slots=True)
class ImageTally:
    """Running counts and sums, on the model's device."""

    confusion: Tensor
    """`[K, K + 1]` int64: rows are labels; the last column is for rows with NaN or inf."""
    counts: Mapping[str, Tensor]
    """Int64 scalars."""
    sums: Mapping[str, Tensor]
    """Float64 scalars in units of `QUANTUM`: `loss` if there are labels, `DISTANCES` if there is a teacher."""
    rows: list[tuple[Tensor, ...]]
    """Index, valid, logits and labels of each batch; empty unless a metric needs them."""
    further: Sequence[MetricSettings | Metric]
    """Metrics that need the rows."""

    @classmethod
    def empty(
        cls, logits_NK: Tensor, *, has_labels: bool, has_teacher: bool, metrics: Sequence[MetricSettings | Metric]
    ) -> "ImageTally":
        """A tally for logits like these.

        Raises:
            DataError: there are metrics and no labels.
        """
        if metrics and not has_labels:
            raise DataError("metrics compare logits with labels, and this split has no labels; remove the metrics")
        num_classes, device = logits_NK.shape[1], logits_NK.device
        counts = ("samples", "bad_rows", "bad_labels", "bad_teacher_rows", "in_top5", "agreed")
        sums = (["loss"] if has_labels else []) + ([*DISTANCES] if has_teacher else [])
        return cls(
            torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device),
            {name: torch.zeros((), dtype=torch.int64, device=device) for name in counts},
            {name: torch.zeros((), dtype=torch.float64, device=device) for name in sums},
            [],
            metrics,
        )

    def add(self, batch: KDBatch, logits_NK: Tensor, teacher_NK: Tensor | None) -> None:
        """Add one batch, without waiting for the device."""
        is_bad_N = ~has_softmax(logits_NK)
        predicted_N = logits_NK.argmax(dim=1).masked_fill(is_bad_N, logits_NK.shape[1])
        self._count("samples", batch.valid, batch.valid)
        self._count("bad_rows", is_bad_N, batch.valid)
        if batch.labels is not None:
            labels = self._add_labels(batch.labels, logits_NK, predicted_N, batch.valid)
            if self.further:
                self.rows.append((batch.index, batch.valid, logits_NK, labels))
        if teacher_NK is not None:
            self._add_teacher(teacher_NK, logits_NK, predicted_N, batch.valid)

    def sum_over_ranks(self) -> None:
        """Add the tallies of all ranks, on every rank."""
        for tensor in (self.confusion, *self.counts.values(), *self.sums.values()):
            torch.distributed.all_reduce(tensor)
        if self.rows:
            self.rows[:] = [tuple(of_all_ranks(torch.cat(column)) for column in zip(*self.rows, strict=True))]

    def metrics(self) -> dict[str, Any]:
        """Wait for the device and compute the metrics: the fields of an `Evaluation` that are of images.

        Raises:
            ConfigError: a metric fails, or has the name of another one.
            DataError: a label exceeds the logits.
        """
        counts = {name: int(count) for name, count in self.counts.items()}
        num_samples, num_classes = counts["samples"], len(self.confusion)
        if counts["bad_labels"]:
            raise DataError(
                f"{counts['bad_labels']} of {num_samples} labels are not from 0 to {num_classes - 1}, and the model "
                f"has {num_classes} logits; evaluate a model of the data's classes"
            )
        # Means by name: `loss` and `DISTANCES` are fields themselves.
        found: dict[str, Any] = {name: float(total) * QUANTUM / num_samples for name, total in self.sums.items()}
        if "kl" in self.sums:
            found["agreement"] = counts["agreed"] / num_samples
        if "loss" in self.sums:
            found |= self._of_labels(counts)
        return found | {"metrics": self._further()}

    def _of_labels(self, counts: Mapping[str, int]) -> dict[str, Any]:
        confusion, num_classes = self.confusion.double().cpu(), len(self.confusion)
        right_K, label_K, predicted_K = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)[:num_classes]
        f1_K = 2 * right_K / (label_K + predicted_K)  # NaN for a class that is neither a label nor a prediction
        return {
            "top1": float(right_K.sum()) / counts["samples"],
            "top5": counts["in_top5"] / counts["samples"],
            "macro_f1": float(f1_K.nanmean()),
            "class_accuracy": shares(right_K.tolist(), label_K.tolist()),
            "confusion": tuple(map(tuple, self.confusion[:, :num_classes].tolist())),
        }

    def _further(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not self.further:
            return found
        logits_NK, label_N = self._logits_and_labels()
        for metric in self.further:
            values = _values(metric, logits_NK, label_N)
            if twice := found.keys() & values.keys():
                raise ConfigError(
                    f"two metrics are called {sorted(twice)[0]!r}; remove one, or rename the value of your function"
                )
            found |= values
        return found

    def _logits_and_labels(self) -> tuple[Tensor, Tensor]:
        """Logits `[N, K]` and labels `[N]` of the valid rows, in the order of the dataset."""
        index, valid, logits, labels = (torch.cat(column) for column in zip(*self.rows, strict=True))
        order = index[valid].argsort()
        return logits[valid][order], labels[valid][order]

    def _add_labels(self, labels: Tensor, logits_NK: Tensor, predicted_N: Tensor, valid_N: Tensor) -> Tensor:
        """Add the metrics of labels; returns the labels as `[N]` int64."""
        num_classes = logits_NK.shape[1]
        is_hard = labels.ndim == 1
        label_N = labels if is_hard else labels.argmax(dim=1)
        is_outside_N = (label_N < 0) | (label_N >= num_classes)
        label_N = label_N.masked_fill(is_outside_N, 0)  # an index out of range would kill the CUDA context
        top5_N5 = logits_NK.topk(min(5, num_classes), dim=1).indices
        is_in_top5_N = (top5_N5 == label_N[:, None]).any(dim=1) & (predicted_N < num_classes)
        self._count("bad_labels", is_outside_N, valid_N)
        self._count("in_top5", is_in_top5_N, valid_N)
        self.confusion.view(-1).scatter_add_(0, label_N * (num_classes + 1) + predicted_N, valid_N.long())
        loss_N = cross_entropy(logits_NK, label_N if is_hard else labels.to(logits_NK.dtype), reduction="none")
        self._sum("loss", loss_N, valid_N)
        return label_N

    def _add_teacher(self, teacher_NK: Tensor, logits_NK: Tensor, predicted_N: Tensor, valid_N: Tensor) -> None:
        if teacher_NK.shape != logits_NK.shape:
            raise ConfigError(
                f"the model returns logits {list(logits_NK.shape)}, the teacher {list(teacher_NK.shape)}; "
                "compare models of the same classes"
            )
        is_bad_N = ~has_softmax(teacher_NK)
        self._count("bad_teacher_rows", is_bad_N, valid_N)
        self._count("agreed", (predicted_N == teacher_NK.argmax(dim=1)) & ~is_bad_N, valid_N)
        for name, value_N in distances(logits_NK, teacher_NK).items():
            self._sum(name, value_N, valid_N)

    def _count(self, name: str, flags_N: Tensor, valid_N: Tensor) -> None:
        self.counts[name].add_((flags_N & valid_N).sum())

    def _sum(self, name: str, values_N: Tensor, valid_N: Tensor) -> None:
        self.sums[name].add_((values_N.double() / QUANTUM).round().masked_fill(~valid_N, 0).sum())


def _values(metric: MetricSettings | Metric, logits_NK: Tensor, label_N: Tensor) -> Mapping[str, Any]:
    """The values of a metric by name."""
    if isinstance(metric, MetricSettings):
        return {metric.name: measure(metric, logits_NK, label_N)}
    values = metric(logits_NK, label_N)
    if not isinstance(values, Mapping):
        raise ConfigError(f"the metric {metric} should return values by name, got {type(values).__qualname__}")
    return values
