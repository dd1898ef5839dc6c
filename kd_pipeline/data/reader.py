"""Batches of the plan out of DALI, with stand-ins for the samples that cannot be read."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_pipeline.data.bad_samples import BadSamplePolicy, BadSamples
from kd_pipeline.data.graph import Graph, GraphSettings, Samples
from kd_pipeline.data.mix import MixSettings, mixing
from kd_pipeline.data.plan import BatchPlan, Plan, uniforms
from kd_pipeline.data.source import Source
from kd_pipeline.data.transform import EvalTransform, TrainTransform

__all__ = ["INDEX", "LABEL", "MIXING", "VALID", "Reader"]

INDEX, LABEL, VALID = range(3)
"""Columns of the facts that go through DALI beside the images; the label is -1 for unlabelled data."""
MIXING = slice(3, None)
"""Columns that say how images are mixed, where they are."""


@dataclass(frozen=True, slots=True)
class _Pulled:
    """A batch that DALI works on."""

    epoch: int
    number: int
    plan: BatchPlan


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
        self._graph: Graph | None = None
        self._pulled: deque[_Pulled] = deque()

    def read(self, epoch: int, number: int, stream: Any = None) -> tuple[Any, Any]:
        """Images and facts `[N, F]` int64 of batch `number` of `epoch`, as dense DALI tensors ordered on `stream`.

        Raises:
            BadSampleError: a sample cannot be read, and the policy is to raise.
            TooManyBadSamplesError: more samples are unreadable than the policy allows.
            RuntimeError: DALI failed, and no sample was the reason.
        """
        while True:
            if self._graph is None or (self._pulled and self._position != (epoch, number)):
                self.stop()
                samples = self._samples_from(epoch, number)
                self._graph = Graph(samples, self._source.stores, self._transform, self._settings)
            try:
                outputs = self._graph.take(stream)
            except RuntimeError as failure:
                index, _ = self.bad_samples.replace(self._pulled[0].plan.index)
                self.stop()
                if not self.bad_samples.examine(index):
                    failure.add_note(f"while DALI worked on batch {number} of epoch {epoch}, {self._plan.shard}")
                    raise
            else:
                self._pulled.popleft()
                return outputs

    def stop(self) -> None:
        """Stop DALI and forget what it read ahead."""
        self._pulled.clear()
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def close(self) -> None:
        """Stop for good, and let go of the threads that examine files."""
        self.stop()
        self.bad_samples.close()

    @property
    def _position(self) -> tuple[int, int]:
        """Epoch and number of the batch that DALI gives next."""
        return self._pulled[0].epoch, self._pulled[0].number

    def _samples_from(self, epoch: int, number: int) -> Iterator[Samples]:
        """What there is to read from a batch on, without end: the next epoch is begun while this one is used up."""
        while True:
            batches = self._plan.epoch(epoch)
            while number < len(batches):
                plan = batches[number]
                self._pulled.append(_Pulled(epoch, number, plan))
                yield self._samples(plan, epoch)
                number += 1
            epoch, number = epoch + 1, 0

    def _samples(self, plan: BatchPlan, epoch: int) -> Samples:
        index, readable = self.bad_samples.replace(plan.index)
        data = self._source.read(index)
        valid = plan.valid & readable
        facts = np.stack([index, self._labels[index], valid], axis=1)
        num_draws = self._transform.num_draws
        count = num_draws if self._mix is None else max(num_draws, self._mix.num_draws)
        draws = uniforms(index, seed=self._plan.seed, epoch=epoch, count=count, repeat=plan.repeat)
        if self._mix is not None:
            size, repeats = self._transform.size, self._plan.repeats
            columns = mixing(self._mix, draws.astype(np.float64), valid, size=size, repeats=repeats)
            facts = np.concatenate([facts, columns], axis=1)
        return Samples(
            data=data,
            facts=facts,
            draws=draws[:, :num_draws],
            trusted=self.bad_samples.trusted(index, data),
        )
