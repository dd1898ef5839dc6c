"""Batches of the plan out of DALI, with stand-ins for the samples that cannot be read."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.bad_samples import BadSamplePolicy, BadSamples
from kd_pipeline.data.graph import Graph, GraphSettings, Samples
from kd_pipeline.data.mix import MixSettings, mixing
from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan, uniforms
from kd_pipeline.data.source import Source
from kd_pipeline.data.transform import EvalTransform, TrainTransform, parameters_of

__all__ = ["INDEX", "LABEL", "MIXING", "Read", "Reader"]

INDEX, LABEL = range(2)
"""Rows of the facts that belong to a batch's images; the label is -1 for unlabelled data."""
MIXING = slice(2, None)
"""Rows that say how images are mixed, where they are."""

_BLOCK = 4096
"""Samples of files that are prepared at once: for 64 images, a call of NumPy takes as long as for a thousand."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Read:
    """A batch out of DALI."""

    images: Any
    """DALI's dense tensor."""
    facts: NDArray[np.int64]
    """`[F, N]`, what is shown in the images, stand-ins included; its rows are named above."""
    valid: NDArray[np.bool_]
    """`[N]`, False for padding and stand-ins."""
    plan: BatchPlan
    """What was to be shown."""


@dataclass(frozen=True, slots=True)
class _Pulled:
    """A batch that DALI works on."""

    epoch: int
    number: int
    plan: BatchPlan
    facts: NDArray[np.int64]
    valid: NDArray[np.bool_]


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
        self.bad_samples = BadSamples(source, policy, settings)
        self._source, self._transform, self._plan, self._settings = source, transform, plan, settings
        self._mix = mix
        self._labels = np.full(len(source), -1) if source.labels is None else source.labels
        self._epochs = _Epochs(plan)
        self._thread = ThreadPoolExecutor(1, "kd_pipeline-prepare")
        self._graph: Graph | None = None
        self._pulled: deque[_Pulled] = deque()

    def read(self, epoch: int, number: int, stream: Any = None) -> Read:
        """Batch `number` of `epoch`, with its images ordered on `stream`.

        Raises:
            BadSampleError: a sample cannot be read, and the policy is to raise.
            TooManyBadSamplesError: more samples are unreadable than the policy allows.
            RuntimeError: DALI failed, and no sample was the reason.
        """
        while True:
            if self._graph is None or (self._pulled and self._position != (epoch, number)):
                self.stop()
                self._graph = Graph(self._pull(epoch, number), self._source.stores, self._transform, self._settings)
            try:
                images = self._graph.take(stream)
            except RuntimeError as failure:
                index, _ = self.bad_samples.replace(self._pulled[0].plan.index)
                self.stop()
                if not self.bad_samples.examine(index):
                    failure.add_note(f"while DALI worked on batch {number} of epoch {epoch}, {self._plan.shard}")
                    raise
            else:
                pulled = self._pulled.popleft()
                return Read(images, pulled.facts, pulled.valid, pulled.plan)

    def stop(self) -> None:
        """Stop DALI and forget what it read ahead."""
        self._pulled.clear()
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def close(self) -> None:
        """Stop for good, and let go of all threads."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self._epochs.close()
        self.bad_samples.close()

    @property
    def _position(self) -> tuple[int, int]:
        """Epoch and number of the batch that DALI gives next."""
        return self._pulled[0].epoch, self._pulled[0].number

    def _pull(self, epoch: int, number: int) -> Iterator[Samples]:
        """What there is to read from a batch on, without end, as DALI asks for it."""
        for block in _ahead(self._blocks(epoch, number), self._thread):
            for pulled, samples in block:
                self._pulled.append(pulled)
                yield samples

    def _blocks(self, epoch: int, number: int) -> Iterator[list[tuple[_Pulled, Samples]]]:
        """The batches from one on, several at once; the next epoch is begun while this one is used up.

        Which samples are known to be unreadable never changes meanwhile: whoever learns of one stops, and begins anew.
        """
        size = max(1, _BLOCK // self._plan.batch_size) if self._source.stores == "files" else 1
        while True:
            batches = self._epochs.at(epoch)
            for first in range(number, len(batches), size):
                plans = [batches[place] for place in range(first, min(first + size, len(batches)))]
                prepared = enumerate(zip(plans, *self._prepared(plans, epoch), strict=True), first)
                yield [
                    (_Pulled(epoch, place, plan, facts, valid), samples)
                    for place, (plan, facts, valid, samples) in prepared
                ]
            epoch, number = epoch + 1, 0

    def _prepared(
        self, plans: Sequence[BatchPlan], epoch: int
    ) -> tuple[Sequence[NDArray[np.int64]], Sequence[NDArray[np.bool_]], Iterator[Samples]]:
        """Facts, what is valid, and samples of each batch, all computed in one go."""
        index, readable = self.bad_samples.replace(np.concatenate([plan.index for plan in plans]))
        data = self._source.read(index)
        valid = np.concatenate([plan.valid for plan in plans]) & readable
        repeat = np.concatenate([plan.repeat for plan in plans])
        num_draws = self._transform.num_draws
        count = num_draws if self._mix is None else max(num_draws, self._mix.num_draws)
        draws = uniforms(index, seed=self._plan.seed, epoch=epoch, count=count, repeat=repeat).astype(np.float64)
        sizes = [len(plan.index) for plan in plans]
        cuts = np.cumsum(sizes)[:-1]
        valids = np.split(valid, cuts)
        facts = np.split(np.stack([index, self._labels[index]]), cuts, axis=1)
        if self._mix is not None:
            size, repeats = self._transform.size, self._plan.repeats
            batches = zip(np.split(draws, cuts), valids, strict=True)
            mixed = [mixing(self._mix, *batch, size=size, repeats=repeats) for batch in batches]
            facts = [np.concatenate([own, columns.T]) for own, columns in zip(facts, mixed, strict=True)]
        samples = Samples(
            data=data,
            crop=self._transform.crop.parameters(draws[:, :num_draws]),
            parameters=parameters_of(self._transform, draws[:, :num_draws]),
            trusted=self.bad_samples.trusted(index),
        )
        return [np.ascontiguousarray(own) for own in facts], valids, samples.split(sizes)


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


def _ahead(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """The items of an endless iterator; while one is used up, `thread` makes the next."""
    coming = thread.submit(next, items)
    while True:
        item, coming = coming.result(), thread.submit(next, items)
        yield item
