"""A plan of some positions of each epoch, in batches that start where a part of the epoch starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan

__all__ = ["SpanPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanPlan(Plan):
    """The batches of one process that reads only some spans of positions, whatever other processes read.

    A span is cut into batches from its start on. The last one of it is smaller or, if `last_batch` is `pad`, is filled
    with samples from the start of the epoch, marked `valid=False`.
    """

    spans: Mapping[int, Sequence[tuple[int, int]]]
    """First position of each span, and the one after its last, by epoch.

    An epoch that is left out has none. Those after the last one are whole, because readers read ahead without end.
    """

    @classmethod
    def of(cls, plan: Plan, spans: Mapping[int, Sequence[tuple[int, int]]]) -> "SpanPlan":
        """Spans of the epochs of `plan`, which is that of a single process."""
        return cls(**{field.name: getattr(plan, field.name) for field in fields(Plan)}, spans=spans)

    def __len__(self) -> int:
        """The most batches that an epoch has."""
        return max(map(self.num_batches, self.spans), default=1)

    def num_batches(self, epoch: int) -> int:
        """Batches of `epoch`, perhaps none."""
        return sum(-(-(stop - start) // self.batch_size) for start, stop in self._spans(epoch))

    def epoch(self, epoch: int) -> "_SpanEpoch":
        """The batches of one epoch."""
        # Not super(), which does not work in a dataclass with slots.
        return _SpanEpoch(self, Plan.epoch(self, epoch).order, self.batch_spans(epoch))

    def batch_spans(self, epoch: int) -> list[tuple[int, int]]:
        """First position of each batch of an epoch, and the one after its last, without padding."""
        size = self.batch_size
        return [
            (first, min(first + size, stop)) for start, stop in self._spans(epoch) for first in range(start, stop, size)
        ]

    def _spans(self, epoch: int) -> Sequence[tuple[int, int]]:
        is_after = epoch > max(self.spans, default=-1)
        return [(0, self.num_samples)] if is_after else self.spans.get(epoch, ())


@dataclass(frozen=True, slots=True)
class _SpanEpoch(EpochPlan):
    spans: list[tuple[int, int]]
    """Of each batch."""

    def __len__(self) -> int:
        return len(self.spans)

    def batches(self, start: int, stop: int) -> tuple[BatchPlan, list[int]]:
        size = self.plan.batch_size if self.plan.last_batch == "pad" else 0
        positions: list[NDArray[np.int64]] = []
        valid: list[NDArray[np.bool_]] = []
        for first, end in self.spans[start:stop]:
            padding = np.arange(max(0, size - (end - first))) % self.plan.num_samples
            positions.append(np.concatenate([np.arange(first, end), padding]))
            valid.append(np.arange(len(positions[-1])) < end - first)
        position = np.concatenate(positions)
        plan = BatchPlan(self.indices(position), np.concatenate(valid), position % self.plan.repeats, position)
        return plan, [len(each) for each in positions]
