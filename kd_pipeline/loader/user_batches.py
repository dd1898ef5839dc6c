"""A loader of the user's own: its epochs, its length, and how it continues within an epoch."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, IterableDataset

from kd_pipeline.errors import ConfigError, StateError

__all__ = ["EpochStart", "UserBatches", "digest_of", "read_start"]

_logger = logging.getLogger("kd_pipeline")


@dataclass(frozen=True, slots=True)
class EpochStart:
    """Where in an epoch the user's loader starts; at its beginning without a saved state."""

    epoch: int
    batch: int = 0
    row: int = 0
    """Rows in the batches before `batch`."""
    inner: Any = None
    """`state_dict()` of the user's loader after the batches before `batch`; None if it has none."""
    torch_rng: Tensor | None = None
    """torch's random state when the epoch began; a `DataLoader` draws its order from it."""


class UserBatches:
    """Any iterable of batches that can be iterated again."""

    def __init__(self, batches: Iterable[Any]) -> None:
        """Wrap `batches`.

        Raises:
            ConfigError: it gives single samples, can be iterated only once, or not at all.
        """
        _check_iterable(batches)
        self.batches = batches
        self._keeps_position = callable(getattr(batches, "state_dict", None)) and callable(
            getattr(batches, "load_state_dict", None)
        )

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch; None if the loader does not say."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # also of a DataLoader over a stream
            return None

    @property
    def batch_size(self) -> int | None:
        """Rows in a full batch; None if the loader does not say."""
        for owner in (self.batches, getattr(self.batches, "batch_sampler", None)):
            size = getattr(owner, "batch_size", None)
            if isinstance(size, int):
                return size
        return None

    @property
    def num_own_rows(self) -> int | None:
        """Rows of this process in an epoch that no other has; None if that is not known.

        A `DistributedSampler` gives as many to each: without `drop_last`, some read one of the first samples again.
        """
        sampler = getattr(self.batches, "sampler", None)
        if type(sampler) is not DistributedSampler or sampler.drop_last:  # what is derived from it may give others
            return None
        length = _length(sampler.dataset)
        return None if length is None else len(range(sampler.rank, length, sampler.num_replicas))

    def state(self) -> Any:
        """The loader's own position; None if it keeps none."""
        return self.batches.state_dict() if self._keeps_position else None  # type: ignore[attr-defined]

    def start(self, start: EpochStart) -> Iterator[Any]:
        """Iterate over the rest of an epoch from `start` on.

        Raises:
            StateError: the loader does not have as many batches as were returned before.
        """
        self._set_epoch(start.epoch)
        if start.batch == 0:
            return iter(self.batches)
        if start.inner is not None:
            self.batches.load_state_dict(start.inner)  # type: ignore[attr-defined]
            return iter(self.batches)
        _logger.info(
            "%s keeps no position of its own: the first %d batches of epoch %d are read again and dropped, and the "
            "rest is exact only if it gives the same batches again",
            *(type(self.batches).__qualname__, start.batch, start.epoch + 1),
        )
        return self._skipped(start)

    def facts(self) -> dict[str, Any]:
        """What is known of the loader without reading a batch; nothing about the content."""
        batches = self.batches
        dataset, sampler = getattr(batches, "dataset", None), getattr(batches, "sampler", None)
        return {
            "loader": _type_name(batches),
            "dataset": None if dataset is None else _type_name(dataset),
            "num_samples": _length(dataset),
            "sampler": None if sampler is None else _type_name(sampler),
            "num_batches": self.num_batches,
            "batch_size": self.batch_size,
        }

    def gives_all_to_each_rank(self) -> bool:
        """Whether this is a torch loader of which every process would read all samples."""
        batches = self.batches
        if not isinstance(batches, torch.utils.data.DataLoader) or isinstance(batches.dataset, IterableDataset):
            return False
        known = (torch.utils.data.RandomSampler, torch.utils.data.SequentialSampler)
        is_usual = type(batches.batch_sampler) in (torch.utils.data.BatchSampler, type(None))
        return is_usual and isinstance(batches.sampler, known)

    def _skipped(self, start: EpochStart) -> Iterator[Any]:
        """The batches from `start` on, of the order that was drawn from the random state of the epoch's beginning."""
        now = torch.get_rng_state()
        if start.torch_rng is not None:
            torch.set_rng_state(start.torch_rng)
        try:
            iterator = iter(self.batches)
            for number in range(start.batch):
                if next(iterator, _END) is _END:
                    raise StateError(
                        f"the position is after batch {start.batch} of epoch {start.epoch + 1}, and the loader gave "
                        f"{number}; resume with the loader that it was saved with"
                    )
        finally:
            torch.set_rng_state(now)
        return iterator

    def _set_epoch(self, epoch: int) -> None:
        """Tell all parts that have an epoch, such as a `DistributedSampler` or a streamed data set."""
        batches, sampler = self.batches, getattr(self.batches, "batch_sampler", None)
        parts = (
            batches,
            getattr(batches, "dataset", None),
            getattr(batches, "sampler", None),
            sampler,
            getattr(sampler, "sampler", None),
        )
        for part in {id(part): part for part in parts}.values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)


_END = object()


def read_start(state: Any, *, version: int) -> EpochStart:
    """The position in a saved state.

    Raises:
        StateError: this is no such state.
    """
    found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if type(found) is not int or found != version or not {"inner", "torch_rng", "loader"} <= state.keys():
        raise StateError(f"this is no state of a BatchLoader, found {found!r}; pass what its state_dict() gave")
    numbers = {name: state.get(name) for name in ("epoch", "batch", "row")}
    for name, number in numbers.items():
        if type(number) is not int or number < 0:
            raise StateError(f"the loader state is damaged: {name} is {number!r}; pass what state_dict() gave")
    return EpochStart(state["epoch"], state["batch"], state["row"], state["inner"], state["torch_rng"])


def digest_of(facts: Mapping[str, Any]) -> str:
    """Hex digest of plain values."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def _check_iterable(batches: Any) -> None:
    name = type(batches).__qualname__
    if isinstance(batches, Iterator):
        raise ConfigError(
            f"a {name} can be iterated once, and a run iterates in every epoch; pass what it is made of: a DataLoader, "
            "a list of batches, or an object whose __iter__ starts again"
        )
    is_samples = isinstance(batches, Dataset) and not isinstance(batches, IterableDataset)
    if is_samples or name == "Dataset":
        raise ConfigError(
            f"{name} gives single samples; pass batches: torch.utils.data.DataLoader(dataset, batch_size=64), with "
            'dataset.with_format("torch") for one of Hugging Face'
        )
    if isinstance(batches, str | bytes | Mapping | Tensor) or not hasattr(batches, "__iter__"):
        raise ConfigError(
            f"a loader is an iterable of batches, got {name}; pass a DataLoader, a list of batches, or an object with "
            "__iter__"
        )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None
