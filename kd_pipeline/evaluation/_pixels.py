"""Counts and sums over the pixels of a split, for models with logits `[N, K, h, w]`."""

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
from kd_pipeline.evaluation._metrics import (
    DISTANCES,
    Metric,
    MetricSettings,
    compute,
    distances,
    shares,
    start,
    update,
)
from kd_pipeline.losses.pixels import PixelLabels
from kd_pipeline.losses.resize import Resizer

__all__ = ["PixelTally"]

_QUANTUM = 2.0**-16
"""Losses are rounded to multiples of this before they are summed. In float64 such sums are exact up to 1e11, those of
10,000 photographs and more, so they do not depend on how the pixels are split into batches and ranks."""


@dataclass(frozen=True, slots=True)
class PixelTally:
    """Running counts and sums, on the model's device.

    Logits are enlarged to the masks, bilinearly as in torchvision's reference. Without masks those of the model and of
    its teacher meet at the larger of both sizes.
    """

    confusion: Tensor
    """`[K, K + 1]` int64 counts of pixels: rows are classes of masks; the last column is for logits with NaN or inf."""
    counts: Mapping[str, Tensor]
    """Int64 scalars."""
    sums: Mapping[str, Tensor]
    """Float64 scalars in units of `_QUANTUM`: `loss` if there are masks, `kl` if there is a teacher."""
    further: Sequence[tuple[MetricSettings, Any]]
    """Metrics of torchmetrics."""
    ignore_index: int
    resize: Resizer

    @classmethod
    def empty(
        cls,
        logits_NKhw: Tensor,
        *,
        has_masks: bool,
        has_teacher: bool,
        ignore_index: int,
        metrics: Sequence[MetricSettings | Metric],
        sums_over_ranks: bool,
    ) -> "PixelTally":
        """A tally for logits like these.

        Raises:
            ConfigError: a metric is a function, or takes other arguments.
            DataError: there are metrics and no masks.
        """
        if metrics and not has_masks:
            raise DataError("metrics compare logits with masks, and this split has no masks; remove the metrics")
        num_classes, device = logits_NKhw.shape[1], logits_NKhw.device
        counts = ("samples", "bad_rows", "bad_teacher_rows", "bad_labels", "labeled", "compared", "agreed")
        sums = (["loss"] if has_masks else []) + ([*DISTANCES] if has_teacher else [])
        return cls(
            torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device),
            {name: torch.zeros((), dtype=torch.int64, device=device) for name in counts},
            {name: torch.zeros((), dtype=torch.float64, device=device) for name in sums},
            [(each, start(each, logits_NKhw, sums_over_ranks=sums_over_ranks)) for each in map(_by_name, metrics)],
            ignore_index,
            Resizer("bilinear"),
        )

    def add(self, batch: KDBatch, logits_NKhw: Tensor, teacher_NKhw: Tensor | None) -> None:
        """Add one batch, image by image, as enlarged logits take much memory; without metrics nothing is waited for.

        Raises:
            ConfigError: the model and its teacher, or the model and the masks, do not go together.
        """
        if batch.masks is None and batch.labels is not None:
            raise ConfigError(
                f"the model returns logits {list(logits_NKhw.shape)} for the pixels, and the batch has labels of "
                "images and no masks; evaluate a classifier, or use data with masks"
            )
        if teacher_NKhw is not None and (teacher_NKhw.ndim != 4 or teacher_NKhw.shape[:2] != logits_NKhw.shape[:2]):
            raise ConfigError(
                f"the model returns logits {list(logits_NKhw.shape)}, the teacher {list(teacher_NKhw.shape)}; "
                "compare models of the same classes, both for pixels"
            )
        for row in range(len(batch)):
            self._add_image(
                logits_NKhw[row : row + 1],
                None if teacher_NKhw is None else teacher_NKhw[row : row + 1],
                None if batch.masks is None else batch.masks[row : row + 1],
                batch.valid[row],
            )

    def sum_over_ranks(self) -> None:
        """Add the tallies of all ranks, on every rank; metrics of torchmetrics do so themselves."""
        for tensor in (self.confusion, *self.counts.values(), *self.sums.values()):
            torch.distributed.all_reduce(tensor)

    def metrics(self) -> dict[str, Any]:
        """Wait for the device and compute the metrics: the fields of an `Evaluation` that are of pixels.

        Raises:
            ConfigError: a metric fails, or two have the same name.
            DataError: a class of a mask is not among the logits, or no pixel has one.
        """
        counts = {name: int(count) for name, count in self.counts.items()}
        confusion = self.confusion.double().cpu()
        num_classes = len(confusion)
        if counts["bad_labels"]:
            raise DataError(
                f"{counts['bad_labels']} pixels of the masks have classes that are not from 0 to {num_classes - 1}, "
                f"nor the ignore index {self.ignore_index}, and the model has {num_classes} logits; evaluate a model "
                "of the data's classes, or correct the ignore index"
            )
        has_masks = "loss" in self.sums
        if has_masks and not counts["labeled"]:
            raise DataError(
                f"no pixel of this split has a class: all have the ignore index {self.ignore_index}; look at its masks"
            )
        found: dict[str, Any] = {}
        if has_masks:
            right_K, label_K, predicted_K = confusion.diagonal(), confusion.sum(1), confusion.sum(0)[:num_classes]
            iou_K = right_K / (label_K + predicted_K - right_K)  # NaN for a class that is nowhere
            found = {
                "miou": float(iou_K.nanmean()),
                "pixel_accuracy": float(right_K.sum()) / counts["labeled"],
                "class_iou": tuple(None if iou != iou else iou for iou in iou_K.tolist()),
                "class_accuracy": shares(right_K.tolist(), label_K.tolist()),
                "confusion": tuple(map(tuple, self.confusion[:, :num_classes].tolist())),
                "loss": float(self.sums["loss"]) * _QUANTUM / counts["labeled"],
            }
        if "kl" in self.sums:
            num_compared = max(counts["compared"], 1)
            found["agreement"] = counts["agreed"] / num_compared
            found |= {name: float(self.sums[name]) * _QUANTUM / num_compared for name in DISTANCES}
        return found | {"metrics": self._further()}

    def _further(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for settings, metric in self.further:
            if settings.name in found:
                raise ConfigError(f"two metrics are called {settings.name!r}; remove one")
            found[settings.name] = compute(metric, settings)
        return found

    def _add_image(self, logits: Tensor, teacher: Tensor | None, mask: Tensor | None, valid: Tensor) -> None:
        """Add one image: logits `[1, K, h, w]`, the mask `[1, H, W]`, and whether the row is valid, a bool scalar."""
        size = _larger(logits, teacher) if mask is None else (mask.shape[1], mask.shape[2])
        logits_1KP = self.resize(logits, size).flatten(2)
        is_bad_1P = ~has_softmax(logits_1KP)
        predicted_1P = logits_1KP.argmax(dim=1).masked_fill(is_bad_1P, logits_1KP.shape[1])
        counts_1P = torch.ones_like(is_bad_1P)
        if mask is not None:
            labels, counts = PixelLabels(mask, self.ignore_index).at(size)
            labels_1P, counts_1P = labels.flatten(1), counts.flatten(1)
            self._add_labels(labels_1P, logits_1KP, predicted_1P, counts_1P & valid)
        counts_1P = counts_1P & valid
        self.counts["samples"].add_(valid)
        self.counts["bad_rows"].add_((is_bad_1P & counts_1P).any())
        if teacher is not None:
            self._add_teacher(self.resize(teacher, size).flatten(2), logits_1KP, predicted_1P, counts_1P)

    def _add_labels(self, labels_1P: Tensor, logits_1KP: Tensor, predicted_1P: Tensor, counts_1P: Tensor) -> None:
        num_classes = logits_1KP.shape[1]
        is_outside_1P = (labels_1P < 0) | (labels_1P >= num_classes)
        labels_1P = labels_1P.masked_fill(is_outside_1P, 0)  # an index out of range would kill the CUDA context
        self.counts["bad_labels"].add_((is_outside_1P & counts_1P).sum())
        self.counts["labeled"].add_(counts_1P.sum())
        cells_P = (labels_1P * (num_classes + 1) + predicted_1P).flatten()
        self.confusion.view(-1).scatter_add_(0, cells_P, counts_1P.flatten().long())
        self._sum("loss", cross_entropy(logits_1KP, labels_1P, reduction="none"), counts_1P)
        for settings, metric in self.further:
            keep_P = counts_1P[0]
            update(metric, settings, logits_1KP[0].T[keep_P], labels_1P[0][keep_P])

    def _add_teacher(self, teacher_1KP: Tensor, logits_1KP: Tensor, predicted_1P: Tensor, counts_1P: Tensor) -> None:
        is_bad_1P = ~has_softmax(teacher_1KP)
        self.counts["bad_teacher_rows"].add_((is_bad_1P & counts_1P).any())
        self.counts["compared"].add_(counts_1P.sum())
        agree_1P = (predicted_1P == teacher_1KP.argmax(dim=1)) & ~is_bad_1P
        self.counts["agreed"].add_((agree_1P & counts_1P).sum())
        for name, value_1P in distances(logits_1KP, teacher_1KP).items():
            self._sum(name, value_1P, counts_1P)

    def _sum(self, name: str, values_1P: Tensor, counts_1P: Tensor) -> None:
        self.sums[name].add_((values_1P.double() / _QUANTUM).round().masked_fill(~counts_1P, 0).sum())


def _by_name(metric: MetricSettings | Metric) -> MetricSettings:
    if isinstance(metric, MetricSettings):
        return metric
    raise ConfigError(
        f"the metric {metric} takes the logits [N, K] of a whole split, and those of all pixels are too many; name a "
        "class of torchmetrics, which is updated image by image, or validate with a function of your own"
    )


def _larger(logits: Tensor, teacher: Tensor | None) -> tuple[int, int]:
    others = logits if teacher is None else teacher
    return max(logits.shape[2], others.shape[2]), max(logits.shape[3], others.shape[3])
