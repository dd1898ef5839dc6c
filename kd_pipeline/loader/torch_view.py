"""What libraries look for in a torch `DataLoader`: a dataset, and a sampler of batches that can be skipped."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.batch import KDBatch
from kd_pipeline.loader.position import BatchSampler

if TYPE_CHECKING:
    from kd_pipeline.data.sources import Source
    from kd_pipeline.loader.batch_stream import BatchStream

__all__ = ["BatchNumbers", "SampleView", "as_it_is"]

T = TypeVar("T")


def as_it_is(value: T) -> T:
    """`value`; a batch is collated already."""
    return value


class SampleView:
    """The samples of a loader as a dataset of torch's.

    A torch `DataLoader` of it with the loader's `batch_sampler` and `collate_fn`, as `accelerate.skip_first_batches`
    makes one, yields the loader's batches from one on: those before it are not read.
    """

    def __init__(self, loader: "BatchStream") -> None:
        self._loader = loader
        self._open: tuple[Iterator[KDBatch], int] | None = None
        """A loop of the loader, and the number of its next batch."""

    @property
    def source(self) -> "Source":
        """Where the samples come from."""
        return self._loader.source

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._loader.source)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int | None]:
        """All pixels `[H, W, 3]` of a sample, before the transform, and its label.

        Raises:
            IndexError: there is no such sample.
            RuntimeError: its file cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)}")
        index %= len(self)
        labels = self.source.labels
        return self._loader.pixels(index), None if labels is None else int(labels[index])

    def __getitems__(self, number: Any) -> KDBatch:
        """Batch `number` of the current epoch, as `BatchNumbers` asks for them."""
        if not isinstance(number, _BatchNumber):
            raise TypeError(
                "a DataLoader of loader.dataset takes batch_sampler=loader.batch_sampler and "
                "collate_fn=loader.collate_fn; or iterate over the loader itself"
            )
        if self._open is None or self._open[1] != number:
            self.stop()
            self._loader.position.move_to(number.epoch, number)
            self._open = iter(self._loader), number
        batches, _ = self._open
        self._open = batches, number + 1
        return next(batches)

    def stop(self) -> None:
        """End the loop, and its epoch if all batches were taken."""
        if self._open is not None:
            (batches, number), self._open = self._open, None
            if number == self._loader.position.num_batches:
                next(batches, None)
            del batches

    def __repr__(self) -> str:
        return f"the samples of {self.source!r}"


class _BatchNumber(int):
    """The number of a batch in an epoch."""

    epoch: int


@dataclass(frozen=True)
class BatchNumbers(BatchSampler):
    """The numbers of the batches in the next loop, which accelerate can skip."""

    loader: "BatchStream"

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[int]:
        """Numbers that only `loader.dataset` understands."""
        num_batches = len(self.loader)
        epoch, first = self.position.next_loop
        try:
            for number in range(first, num_batches):
                batch = _BatchNumber(number)
                batch.epoch = epoch
                yield batch
        finally:
            self.loader.dataset.stop()
