"""Batches of the plan out of DALI, with stand-ins for the samples that cannot be read."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.bad_samples import BadSamplePolicy, BadSamples
from kd_pipeline.data.graph import Graph, GraphSettings, Probe, Samples
from kd_pipeline.data.mix import MixSettings, mixing
from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan, uniforms
from kd_pipeline.data.source import Source
from kd_pipeline.data.transform import EvalTransform, TrainTransform, parameters_of

__all__ = ["INDEX", "LABEL", "MIXING", "Read", "Reader", "group_size"]

INDEX, LABEL = range(2)
"""Rows of the facts that belong to a batch's images; the label is -1 for unlabelled data."""
MIXING = slice(2, None)
"""Rows that say how images are mixed, where they are."""

_GROUP_PIXELS, _GROUP_IMAGES = 256 * 224**2, 1024
"""What DALI works on at once, where batches are smaller: 150 MiB in float32, and so many images at most."""
_ALIGNMENT = 256
"""Every batch begins at a multiple of so many bytes, or a TensorRT engine would need a copy of it."""
_BLOCK = 4096
"""Samples of files that are prepared at once: for 64 images, a call of NumPy takes as long as for a thousand."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Read:
    """A batch out of DALI."""

    images: Any
    """DALI's dense tensor, of this batch and of others."""
    rows: slice
    """Which of its images are this batch's."""
    facts: NDArray[np.int64]
    """`[F, N]`, what is shown in the images, stand-ins included; its rows are named above."""
    valid: NDArray[np.bool_]
    """`[N]`, False for padding and stand-ins."""
    plan: BatchPlan
    """What was to be shown."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch that is to be read."""

    plan: BatchPlan
    facts: NDArray[np.int64]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Group:
    """Batches of one epoch that DALI works on at once."""

    epoch: int
    number: int
    """Of the first of them."""
    batches: Sequence[_Planned]

    @property
    def sizes(self) -> list[int]:
        """Images in each."""
        return [len(batch.valid) for batch in self.batches]

    def reads(self, images: Any) -> dict[tuple[int, int], Read]:
        """The batches among the group's `images`, by epoch and number."""
        rows = [slice(*ends) for ends in pairwise(accumulate(self.sizes, initial=0))]
        return {
            (self.epoch, number): Read(images, own, batch.facts, batch.valid, batch.plan)
            for number, (own, batch) in enumerate(zip(rows, self.batches, strict=True), self.number)
        }


class Reader:
    """Reads any batch of any epoch; fast when the next one is asked for, because DALI is already working on it."""

    def __init__(
        self,
        source: Source,
        transform: TrainTransform | EvalTransform,
        plan: Plan,
        settings: GraphSettings,
        policy: BadSamplePolicy,
        mix: MixSettings | None = None,
    ) -> None:
        self._probe = Probe(settings)
        self.bad_samples = BadSamples(source, policy, self._probe)
        self._group_size = group_size(plan.batch_size, transform)
        self._settings = replace(settings, max_batch=settings.max_batch * self._group_size)
        self._source, self._transform, self._plan, self._mix = source, transform, plan, mix
        self._labels = np.full(len(source), -1) if source.labels is None else source.labels
        self._epochs = _Epochs(plan)
        self._thread = ThreadPoolExecutor(1, "kd_pipeline-prepare")
        self._graph: Graph | None = None
        self._pulled: deque[_Group] = deque()
        self._ready: dict[tuple[int, int], Read] = {}

    def read(self, epoch: int, number: int, stream: Any = None) -> Read:
        """Batch `number` of `epoch`, with its images ordered on `stream`.

        Raises:
            BadSampleError: a sample cannot be read, and the policy is to raise.
            TooManyBadSamplesError: more samples are unreadable than the policy allows.
            RuntimeError: DALI failed, and no sample was the reason.
        """
        while (epoch, number) not in self._ready:
            self._ready = self._take(epoch, number, stream)
        return self._ready.pop((epoch, number))

    def _take(self, epoch: int, number: int, stream: Any) -> dict[tuple[int, int], Read]:
        """Batch `number` of `epoch` and those in one group with it; nothing where it is to be asked for again."""
        if self._graph is None or (self._pulled and self._position != (epoch, number)):
            self.stop()
            samples = self._pull(epoch, number)
            self._graph = Graph(samples, self._source.stores, self._transform, self._settings, self._probe)
        try:
            images = self._graph.take(stream)
        except RuntimeError as failure:
            group = self._pulled[0]
            self.stop()
            # Samples of later batches wait for their turn; the next group is this batch alone.
            index, _ = self.bad_samples.replace(group.batches[0].plan.index)
            if not self.bad_samples.examine(index) and len(group.batches) == 1:
                failure.add_note(f"while DALI worked on batch {number} of epoch {epoch}, {self._plan.shard}")
                raise
            return {}
        return self._pulled.popleft().reads(images)

    def stop(self) -> None:
        """Stop DALI and forget what it read ahead."""
        self._pulled.clear()
        self._ready.clear()
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def close(self) -> None:
        """Stop for good, and let go of all threads."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self._epochs.close()
        self._probe.close()

    @property
    def _position(self) -> tuple[int, int]:
        """Epoch and number of the first batch that DALI gives next."""
        return self._pulled[0].epoch, self._pulled[0].number

    def _pull(self, epoch: int, number: int) -> Iterator[Samples]:
        """What there is to read from a batch on, without end, as DALI asks for it."""
        for block in _ahead(self._blocks(epoch, number), self._thread):
            for group, samples in block:
                self._pulled.append(group)
                yield samples

    def _blocks(self, epoch: int, number: int) -> Iterator[list[tuple[_Group, Samples]]]:
        """The batches from one on, several at once; the next epoch is begun while this one is used up.

        The first group is one batch, which comes soon, and each one after it twice as large as long as it may be.
        Which samples are known to be unreadable never changes meanwhile: whoever learns of one stops, and begins anew.
        """
        group_sizes = _doubling(self._group_size)
        size = max(1, _BLOCK // self._plan.batch_size) if self._source.stores == "files" else self._group_size
        while True:
            batches = self._epochs.at(epoch)
            for first in range(number, len(batches), size):
                plans = [batches[place] for place in range(first, min(first + size, len(batches)))]
                planned, samples = self._prepared(plans, epoch)
                groups = list(_grouped(planned, epoch, first, group_sizes))
                yield list(zip(groups, samples.split(sum(group.sizes) for group in groups), strict=True))
            epoch, number = epoch + 1, 0

    def _prepared(self, plans: Sequence[BatchPlan], epoch: int) -> tuple[list[_Planned], Samples]:
        """Batches with their facts, and the samples of all of them, computed in one go."""
        index, readable = self.bad_samples.replace(np.concatenate([plan.index for plan in plans]))
        data = self._source.read(index)
        valid = np.concatenate([plan.valid for plan in plans]) & readable
        repeat = np.concatenate([plan.repeat for plan in plans])
        num_draws = self._transform.num_draws
        count = num_draws if self._mix is None else max(num_draws, self._mix.num_draws)
        draws = uniforms(index, seed=self._plan.seed, epoch=epoch, count=count, repeat=repeat).astype(np.float64)
        cuts = np.cumsum([len(plan.index) for plan in plans])[:-1]
        valids = np.split(valid, cuts)
        facts = np.split(np.stack([index, self._labels[index]]), cuts, axis=1)
        if self._mix is not None:
            size, repeats = self._transform.size, self._plan.repeats
            parts = zip(np.split(draws, cuts), valids, strict=True)
            mixed = [mixing(self._mix, *part, size=size, repeats=repeats) for part in parts]
            facts = [np.concatenate([own, columns.T]) for own, columns in zip(facts, mixed, strict=True)]
        samples = Samples(
            index=index,
            data=data,
            crop=self._transform.crop.parameters(draws[:, :num_draws]),
            parameters=parameters_of(self._transform, draws[:, :num_draws]),
        )
        rows = zip(plans, map(np.ascontiguousarray, facts), valids, strict=True)
        return [_Planned(*row) for row in rows], samples


class _Epochs:
    """The plans of the epochs; while one is used up, the next one is made: ten million samples take a second."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._thread = ThreadPoolExecutor(1, "kd_pipeline-order")
        self._known: dict[int, Future[EpochPlan]] = {}

    def at(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; that one and the next are kept."""
        self._known = {
            number: self._known.get(number) or self._thread.submit(self._plan.epoch, number)
            for number in (epoch, epoch + 1)
        }
        return self._known[epoch].result()

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(cancel_futures=True)


def group_size(batch_size: int, transform: TrainTransform | EvalTransform) -> int:
    """How many batches DALI works on at once.

    At the end of each op its threads wait for the slowest of the images, and Python takes as long for a few as for
    many.
    """
    pixels = transform.size**2
    batch_bytes = batch_size * 3 * pixels * np.dtype(transform.dtype).itemsize
    if batch_bytes % _ALIGNMENT:
        return 1
    return max(1, min(_GROUP_IMAGES, _GROUP_PIXELS // pixels) // batch_size)


def _grouped(batches: Sequence[_Planned], epoch: int, number: int, sizes: Iterator[int]) -> Iterator[_Group]:
    """Batches from `number` of `epoch` on, so many in each group."""
    first = 0
    while first < len(batches):
        members = batches[first : first + next(sizes)]
        yield _Group(epoch, number + first, members)
        first += len(members)


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4 and so on up to `most`, again and again."""
    size = 1
    while True:
        yield size
        size = min(2 * size, most)


def _ahead(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """The items of an endless iterator; while one is used up, `thread` makes the next."""
    coming = thread.submit(next, items)
    while True:
        item, coming = coming.result(), thread.submit(next, items)
        yield item
