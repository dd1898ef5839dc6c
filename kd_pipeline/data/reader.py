"""Batches of the plan out of DALI, with stand-ins for the samples that cannot be read."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.bad_samples import BadSamplePolicy, BadSamples
from kd_pipeline.data.dali import Graph, GraphSettings, Probe, Samples
from kd_pipeline.data.mixing import MixSettings, mixing
from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan, uniforms
from kd_pipeline.data.sources.base import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform, parameters_of

__all__ = ["INDEX", "LABEL", "MIXING", "VALID", "Read", "Reader", "group_size"]

INDEX, LABEL, VALID = range(3)
"""Rows of the facts that belong to a batch's images, which reach a GPU in one copy: the label is -1 for unlabeled data,
and valid is 0 for padding and substitutes."""
MIXING = slice(3, None)
"""Rows that say how images are mixed, where they are."""

_GROUP_IMAGES, _GROUP_PIXELS, _GROUP_FILE_PIXELS = 256, 256 * 224**2, 2**26
"""What DALI works on at once at most, where a batch is less: images; their pixels when they are finished, 150 MiB in
float32; and those that the files have, 200 MB."""
_ALIGNMENT = 256
"""Every batch begins at a multiple of so many bytes, or a TensorRT engine would need a copy of it."""
_BLOCK = 4096
"""Samples of files that are prepared at once: for 64 images, a call of NumPy takes as long as for a thousand."""

T = TypeVar("T")
_logger = logging.getLogger("kd_pipeline")


@dataclass(frozen=True, slots=True)
class Read:
    """A batch out of DALI."""

    images: Any
    """DALI's dense tensor, of this batch and of others."""
    rows: slice
    """Which of its images are this batch's."""
    facts: NDArray[np.int64]
    """`[F, N]`, what is shown in the images, stand-ins included; its rows are named above."""
    plan: BatchPlan
    """What was to be shown."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch that is to be read."""

    plan: BatchPlan
    facts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Group:
    """Batches of one epoch that DALI works on at once."""

    epoch: int
    number: int
    """Of the first of them."""
    batches: Sequence[_Planned]

    def split(self, size: int) -> tuple["_Group", "_Group"]:
        """The first batches, so many, and the others."""
        first, rest = self.batches[:size], self.batches[size:]
        return _Group(self.epoch, self.number, first), _Group(self.epoch, self.number + len(first), rest)

    @property
    def ends(self) -> list[int]:
        """0, and behind how many of the group's images each batch ends."""
        return list(accumulate((batch.facts.shape[1] for batch in self.batches), initial=0))

    def reads(self, images: Any) -> dict[tuple[int, int], Read]:
        """The batches among the group's `images`, by epoch and number."""
        rows = [slice(*ends) for ends in pairwise(self.ends)]
        return {
            (self.epoch, number): Read(images, own, batch.facts, batch.plan)
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
        self._next: tuple[int, int] | None = None
        self._ungrouped: int | None = None
        self._retried: tuple[int, int] | None = None
        self._ready: dict[tuple[int, int], Read] = {}

    def read(self, epoch: int, number: int, stream: Any = None) -> Read:
        """Batch `number` of `epoch`, with its images ordered on `stream`.

        Raises:
            BadSampleError: a sample cannot be read, and the policy is to raise.
            TooManyBadSamplesError: more samples are unreadable than the policy allows.
            RuntimeError: DALI failed twice on the batch, and no sample was the reason.
            IndexError: an epoch has no such batch.
        """
        if not 0 <= number < len(self._plan):
            raise IndexError(f"batch {number} of epochs of {len(self._plan)} batches")
        while (epoch, number) not in self._ready:
            self._ready = self._take(epoch, number, stream)
        return self._ready.pop((epoch, number))

    def _take(self, epoch: int, number: int, stream: Any) -> dict[tuple[int, int], Read]:
        """Batch `number` of `epoch` and those in one group with it; nothing where it is to be asked for again."""
        if self._graph is None or self._next != (epoch, number):
            self.stop()
            samples = self._pull(epoch, number)
            self._graph = Graph(samples, self._source.stores, self._transform, self._settings, self._probe)
        try:
            images = self._graph.take(stream)
            reads = self._pulled.popleft().reads(images)
            self._next, self._retried = self._behind(max(reads)), None
            return reads
        except RuntimeError as failure:
            batches = self._pulled[0].batches if self._pulled else []  # none where the source itself failed
            self.stop()
            self._explain(failure, batches, epoch, number)
            return {}
        except BaseException:
            self.stop()  # what was pulled may have been lost on the way, as by an interrupt
            raise

    def _explain(self, failure: RuntimeError, batches: Sequence[_Planned], epoch: int, number: int) -> None:
        """Find out why DALI failed on some batches from `number` on; returns where they are to be asked for again.

        Raises:
            BadSampleError, TooManyBadSamplesError: a sample is the reason.
            RuntimeError: `failure` itself, of a source or for the second time.
        """
        if len(batches) > 1:
            # So that what is wrong with a batch is said at its turn.
            _logger.info("DALI failed on %d batches at once; one by one up to epoch %d", len(batches), epoch + 1)
            self._ungrouped = epoch
            return
        if any(self.bad_samples.examine(self.bad_samples.replace(it.plan.index)[0]) for it in batches):
            return
        if not batches or self._retried == (epoch, number):
            self._retried = None
            failure.add_note(f"while DALI worked on batch {number} of epoch {epoch}, {self._plan.shard}")
            raise failure
        # Each image alone decodes: as where other processes have the memory for a moment.
        _logger.warning("DALI failed on batch %d of epoch %d and on no image of it; once more", number, epoch)
        self._retried = epoch, number

    def _behind(self, position: tuple[int, int]) -> tuple[int, int]:
        """The position of the batch that follows."""
        epoch, number = position
        return (epoch, number + 1) if number + 1 < len(self._plan) else (epoch + 1, 0)

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

    def _pull(self, epoch: int, number: int) -> Iterator[Samples]:
        """What there is to read from a batch on, without end, as DALI asks for it.

        The first group is one batch, which comes soon, and each one after it twice as large as long as it may be.
        """
        size = 1
        for block, samples in _ahead(self._blocks(epoch, number), self._thread):
            row = 0
            while block.batches:
                group, block = block.split(size)
                self._pulled.append(group)
                row, first = row + group.ends[-1], row
                yield samples.part(slice(first, row))
                size = 1 if group.epoch == self._ungrouped else min(2 * size, self._most_batches())

    def _most_batches(self) -> int:
        """How many batches may be one group, given the files that were read last."""
        area = float("nan") if self._graph is None else self._graph.mean_area
        fitting = _GROUP_FILE_PIXELS // (area * self._plan.batch_size) if area > 0 else 1
        return max(1, min(self._group_size, int(fitting)))

    def _blocks(self, epoch: int, number: int) -> Iterator[tuple[_Group, Samples]]:
        """The batches from one on, many at once; the next epoch is begun while this one is used up.

        Which samples are known to be unreadable never changes meanwhile: whoever learns of one stops, and begins anew.
        """
        size = max(1, _BLOCK // self._plan.batch_size) if self._source.stores == "files" else self._group_size
        while True:
            batches = self._epochs.at(epoch)
            for first in range(number, len(batches), size):
                plans = [batches[place] for place in range(first, min(first + size, len(batches)))]
                planned, samples = self._prepared(plans, epoch)
                yield _Group(epoch, first, planned), samples
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
        facts = np.split(np.stack([index, self._labels[index], valid]), cuts, axis=1)
        if self._mix is not None:
            size, repeats = self._transform.size, self._plan.repeats
            parts = zip(np.split(draws, cuts), np.split(valid, cuts), strict=True)
            mixed = [mixing(self._mix, *part, size=size, repeats=repeats) for part in parts]
            facts = [np.concatenate([own, columns.T]) for own, columns in zip(facts, mixed, strict=True)]
        samples = Samples(
            index=index,
            data=data,
            crop=self._transform.crop.parameters(draws[:, :num_draws]),
            parameters=parameters_of(self._transform, draws[:, :num_draws]),
        )
        rows = zip(plans, map(np.ascontiguousarray, facts), strict=True)
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


def _ahead(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """The items of an endless iterator; while one is used up, `thread` makes the next."""
    coming = thread.submit(next, items)
    while True:
        item, coming = coming.result(), thread.submit(next, items)
        yield item
