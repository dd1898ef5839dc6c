"""One epoch of a loader of the user's own, with batches that are read and prepared ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import DataError
from kd_pipeline.loader.user_batches import EpochStart, UserBatches

__all__ = ["OpenEpoch", "ReadyBatch"]


@dataclass(frozen=True, slots=True)
class ReadyBatch:
    """A batch whose teacher outputs are complete, or on a GPU will be at its event."""

    batch: KDBatch
    raw: Any
    """What the user's loader gave, which may be on its way to the GPU."""
    event: Any
    after: EpochStart
    """The position after this batch."""

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the batch."""
        return tensors_in(self.batch.asdict())


Prepare = Callable[[Any, int], tuple[KDBatch, Any]]
"""Makes a batch of what the user's loader gave and the number of rows before it, and returns it with its event."""


class OpenEpoch:
    """The rest of an epoch from a start on."""

    def __init__(self, user: UserBatches, start: EpochStart, prepare: Prepare, *, num_ahead: int) -> None:
        self.place = start.epoch, start.batch
        """Epoch and number of its first batch."""
        self._user, self._prepare, self._num_ahead = user, prepare, num_ahead
        self._after = start if start.batch else replace(start, torch_rng=torch.get_rng_state())
        self._iterator = user.start(start)
        self._ahead: deque[ReadyBatch] = deque()
        self._is_exhausted = False
        self._looked: Any = _NOTHING
        """What the iterator gave after the batches that were read, if it was asked."""
        self._failure: Exception | None = None

    def take(self) -> ReadyBatch | None:
        """The next batch; None at the end.

        Raises:
            Exception: whatever the user's loader or the teacher raises, after the good batches before it.
            DataError: a whole epoch has not a single batch.
        """
        while len(self._ahead) <= self._num_ahead and not self._is_exhausted and self._failure is None:
            try:
                self._read()
            except Exception as exc:
                self._failure = exc
        if self._ahead:
            return self._ahead.popleft()
        if self._failure is not None:
            raise self._failure
        if self._after.batch == 0:
            raise DataError(
                f"{type(self._user.batches).__qualname__} gave no batch in epoch {self.place[0] + 1}; each epoch "
                "iterates over it again, so its __iter__ has to start again, and needs enough samples for a batch"
            )
        return None

    def put_back(self, ready: ReadyBatch) -> None:
        """Let `take` return `ready` next, which it returned last."""
        self._ahead.appendleft(ready)

    def drop(self, keep: Callable[[Any, Any], None]) -> None:
        """Forget the batches that were read ahead; `keep` gets the event of each, and what the user's loader gave."""
        while self._ahead:
            ready = self._ahead.popleft()
            keep(ready.event, ready.raw)

    def complete(self, completed: Callable[[KDBatch], tuple[KDBatch, Any]]) -> None:
        """Change the batches that were read ahead; `completed` returns each with its event."""
        for place, ready in enumerate(self._ahead):
            batch, event = completed(ready.batch)
            self._ahead[place] = replace(ready, batch=batch, event=event)

    def _read(self) -> None:
        raw = next(self._iterator, _END) if self._looked is _NOTHING else self._looked
        self._looked = _NOTHING
        if raw is _END:
            self._is_exhausted = True
            return
        before = self._after
        inner = self._user.state()  # now, as the next batch may be read before this one is returned
        batch, event = self._prepare(raw, before.row)
        self._after = replace(before, batch=before.batch + 1, row=before.row + len(batch), inner=inner)
        self._ahead.append(ReadyBatch(batch, raw, event, self._after))
        if self._after.batch == self._user.num_batches:
            # Lightning asks for no more, and a sampler of torch draws from its generator at the very end.
            self._looked = next(self._iterator, _END)


_END, _NOTHING = object(), object()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, each.name) for each in fields(value))
    for each in parts:
        yield from tensors_in(each)
