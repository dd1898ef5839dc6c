"""The prediction for each sample of a split, the table of them, and the images with the largest and smallest loss."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.finite import has_softmax
from kd_pipeline.batch import KDBatch
from kd_pipeline.evaluation._gather import of_all_ranks

__all__ = ["COLUMNS", "MAX_ROWS", "PredictionRow", "Predictions", "cells", "to_csv"]

COLUMNS = ("index", "path", "label", "student", "student_probability", "teacher", "teacher_probability", "loss")
"""Of the table."""
MAX_ROWS = 100_000
"""A split with more samples keeps only some of them."""
_NUM_WORST = _NUM_BEST = 1000
_NUM_RANDOM = 10_000

_NONE = -1
"""The class of a row of logits with NaN or inf, and of a teacher that is not there."""
_INDEX, _LABEL, _STUDENT, _STUDENT_P, _TEACHER, _TEACHER_P, _LOSS = range(7)


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """What is known of one sample."""

    index: int
    """Of the sample in its split."""
    label: int
    student: int | None
    """The top class; None if the logits hold NaN or inf."""
    student_probability: float | None
    teacher: int | None
    """None also without a teacher."""
    teacher_probability: float | None
    loss: float
    """Cross-entropy of the row with its label, in nats; NaN or inf if its logits hold them."""


class Predictions:
    """Collects the rows of one evaluation of a classifier, in bounded memory and without waiting for the device.

    Of more than `MAX_ROWS` samples it keeps the 1,000 with the largest loss, the 1,000 with the smallest, and 10,000
    that a hash of their index chooses: the same in each evaluation, whatever the batches.
    """

    def __init__(self, *, num_images: int = 0) -> None:
        """Collect rows, and `num_images` of the images with the largest loss and as many with the smallest."""
        self._hardest, self._easiest = _Highest(num_images), _Highest(num_images)
        self._blocks: list[Tensor] = []
        """`[n, 7]` float64 on the model's device; they hold integers up to 2**53 exactly."""
        self._num_rows = 0

    def add(self, batch: KDBatch, logits: Tensor, teacher: Tensor | None) -> None:
        """Add the valid rows of a batch; one without labels, or with logits of pixels, has none.

        Args:
            batch: with labels `[N]` or `[N, K]`, whose largest share then counts.
            logits: `[N, K]`.
            teacher: the same of the teacher.
        """
        if batch.labels is None or logits.ndim != 2:
            return
        label_N = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(dim=1)
        # An index out of range would kill the CUDA context, and is reported by the metrics.
        target = label_N.clamp(0, logits.shape[1] - 1) if batch.labels.ndim == 1 else batch.labels.to(logits.dtype)
        loss_N = cross_entropy(logits, target, reduction="none")
        missing = torch.full_like(loss_N, _NONE)
        theirs = (missing, missing) if teacher is None else _top(teacher)
        columns = (batch.index, label_N, *_top(logits), *theirs, loss_N)
        block = torch.stack([column.double() for column in columns], dim=1)
        block[~batch.valid, _INDEX] = _NONE  # to select the rows here would wait for the device
        self._blocks.append(block)
        self._num_rows += len(block)
        self._add_images(batch, loss_N)
        if self._num_rows >= 2 * MAX_ROWS:
            self._reduce()

    def gather(self) -> None:
        """Join the rows of all ranks, on every rank, if there are several with rows."""
        if self._blocks:
            self._blocks = [of_all_ranks(self._valid())]
            self._num_rows = len(self._blocks[0])
            self._hardest.gather()
            self._easiest.gather()

    @property
    def hardest(self) -> list[tuple[int, Tensor]]:
        """The indices and images `[3, H, W]` with the largest loss, the largest first."""
        return self._hardest.images()

    @property
    def easiest(self) -> list[tuple[int, Tensor]]:
        """Those with the smallest loss, the smallest first."""
        return self._easiest.images()

    def rows(self) -> list[PredictionRow]:
        """The rows in the order of the split; empty for pixels and without labels."""
        if not self._blocks:
            return []
        found = self._valid()
        if len(found) > MAX_ROWS:
            found = _selected(found)
        found = found[found[:, _INDEX].argsort(stable=True)]
        return [_row(values) for values in found.tolist()]

    def _add_images(self, batch: KDBatch, loss_N: Tensor) -> None:
        images = batch.inputs.get(IMAGES)
        if images is not None and images.ndim == 4 and images.shape[1] == 3:
            loss_N = loss_N.double().nan_to_num(nan=math.inf)
            self._hardest.add(loss_N.masked_fill(~batch.valid, -math.inf), batch.index, images)
            self._easiest.add((-loss_N).masked_fill(~batch.valid, -math.inf), batch.index, images)

    def _valid(self) -> Tensor:
        rows = torch.cat(self._blocks)
        return rows[rows[:, _INDEX] >= 0]

    def _reduce(self) -> None:
        rows = self._valid()
        self._blocks = [_selected(rows) if len(rows) > MAX_ROWS else rows]
        self._num_rows = len(self._blocks[0])


class _Highest:
    """The images with the highest scores so far, copied, on the device."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: tuple[Tensor, ...] = ()
        """Scores `[n]`, indices `[n]` and images `[n, 3, H, W]`."""

    def add(self, score_N: Tensor, index_N: Tensor, images: Tensor) -> None:
        """Add a batch; images of another size than the first are left out."""
        if not self._count or (self._kept and images.shape[1:] != self._kept[2].shape[1:]):
            return
        found = self._top((score_N, index_N, images))  # first of the batch, as all of its images would be copied
        self._kept = self._top(_joined(self._kept, found)) if self._kept else found

    def gather(self) -> None:
        """Keep the highest of all ranks, on every rank."""
        if self._kept:
            self._kept = self._top(tuple(of_all_ranks(each.contiguous()) for each in self._kept))

    def images(self) -> list[tuple[int, Tensor]]:
        """The indices and images, the highest first; not those of invalid rows."""
        if not self._kept:
            return []
        score, index, images = (each.cpu() for each in self._kept)
        return [(int(index[at]), images[at]) for at in range(len(score)) if score[at] > -math.inf]

    def _top(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = found[0].topk(min(self._count, len(found[0]))).indices
        return tuple(each[chosen] for each in found)


def _joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))


def to_csv(
    rows: Sequence[PredictionRow], classes: Sequence[str] | None, path_of: Callable[[int], str] | None = None
) -> str:
    """The table as CSV.

    Args:
        rows: of the table.
        classes: names in label order; None shows the numbers.
        path_of: returns the file of a sample by its index; None if they have none.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(cells(rows, classes, path_of))
    return text.getvalue()


def cells(
    rows: Sequence[PredictionRow], classes: Sequence[str] | None, path_of: Callable[[int], str] | None = None
) -> Iterator[tuple[int | float | str, ...]]:
    """The cells of each row, in the order of `COLUMNS`; the arguments are those of `to_csv`."""
    for row in rows:
        yield (
            row.index,
            "" if path_of is None else path_of(row.index),
            _name(row.label, classes),
            _name(row.student, classes),
            _rounded(row.student_probability),
            _name(row.teacher, classes),
            _rounded(row.teacher_probability),
            _rounded(row.loss),
        )


def _top(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The top class and its probability of each row."""
    is_bad_N = ~has_softmax(logits_NK)
    probability_N, class_N = logits_NK.softmax(dim=1).max(dim=1)
    return class_N.masked_fill(is_bad_N, _NONE), probability_N.masked_fill(is_bad_N, _NONE)


def _selected(rows: Tensor) -> Tensor:
    """Those of more than `MAX_ROWS` that are kept; chosen of parts that were chosen, they are the same."""
    loss = rows[:, _LOSS].nan_to_num(nan=math.inf)
    order = loss.argsort(stable=True)
    # A multiplicative hash: neighbors in the split are far from each other in it.
    hashed = (rows[:, _INDEX].long() * 2654435761 % 2**32).argsort(stable=True)
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for chosen in (order[:_NUM_BEST], order[-_NUM_WORST:], hashed[:_NUM_RANDOM]):
        kept[chosen] = True
    return rows[kept]


def _row(values: list[float]) -> PredictionRow:
    def top(at: int, probability_at: int) -> tuple[int | None, float | None]:
        return (None, None) if values[at] == _NONE else (int(values[at]), values[probability_at])

    return PredictionRow(
        int(values[_INDEX]),
        int(values[_LABEL]),
        *top(_STUDENT, _STUDENT_P),
        *top(_TEACHER, _TEACHER_P),
        values[_LOSS],
    )


def _name(label: int | None, classes: Sequence[str] | None) -> str:
    if label is None:
        return ""
    return classes[label] if classes is not None and 0 <= label < len(classes) else str(label)


def _rounded(value: float | None) -> float | str:
    """Six digits, as many as float32 has."""
    return "" if value is None else float(f"{value:.6g}")
