"""One loader for several students: each batch is read once, and every student has a position of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import getLogger
from typing import Any, NamedTuple

from torch import Tensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.position import BatchSampler, InEpochs, Position

__all__ = ["LoaderView", "SharedLoader", "Wanted", "choose"]

_logger = getLogger("kd_pipeline")


class Wanted(NamedTuple):
    """A batch that a student waits for."""

    loader: "SharedLoader"
    epoch: int
    number: int


class SharedLoader:
    """A loader that one thread reads for all students, at the places that they ask for."""

    def __init__(self, loader: KDDataLoader, *, is_training: bool) -> None:
        """Share `loader`, which nobody else iterates over; `is_training` says that every student trains on it."""
        self.loader, self.is_training = loader, is_training
        self._place: tuple[int, int] | None = None
        """Epoch and number of `_batch`."""
        self._batch: KDBatch | None = None
        self._failure: Exception | None = None
        """Why there is no batch at this place."""
        self._versions: list[int] = []
        """How often each of its tensors had been changed when it was read."""
        self._gives_copies = False
        """Whether a student changes its batches in place."""
        self._batches: Iterator[KDBatch] = iter(())

    @property
    def is_random(self) -> bool:
        """Whether its images differ from epoch to epoch."""
        return self.is_training or isinstance(self.loader.transform, TrainTransform)

    def read(self, epoch: int, number: int) -> KDBatch:
        """Batch `number` of `epoch`; to ask again, or for the next one, is free.

        Raises:
            DataError, StateError, TeacherError: as a loop of the loader would.
        """
        if self._batch is not None and self._place == (epoch, number) and self._is_changed():
            _logger.info("a student changes its images in place, so each student gets a copy of them")
            self._gives_copies, self._place = True, None
        if self._place != (epoch, number):
            self._advance(epoch, number)
        if self._failure is not None:
            raise self._failure
        assert self._batch is not None
        return self._batch.clone() if self._gives_copies else self._batch

    def _advance(self, epoch: int, number: int) -> None:
        is_next = self._batch is not None and self._place == (epoch, number - 1)
        self._batch, self._place, self._failure = None, (epoch, number), None
        try:
            if not is_next:
                self._move(epoch, number)
            self._batch = next(self._batches)
            self._versions = [each._version for each in _tensors(self._batch)]
        except Exception as exc:
            self._failure = exc

    def _is_changed(self) -> bool:
        assert self._batch is not None
        return [each._version for each in _tensors(self._batch)] != self._versions

    def _move(self, epoch: int, number: int) -> None:
        """Start a loop at this place; as Lightning, which sets the epoch before every loop and so ends the last one."""
        self._batches = iter(())
        self.loader.batch_sampler.set_epoch(epoch)
        if self.loader.position.next_loop != (epoch, number):
            state = self.loader.state_dict()
            self.loader.load_state_dict({**state, "epoch": epoch, "batch": number})
            self.loader.batch_sampler.set_epoch(epoch)
        self._batches = iter(self.loader)


class LoaderView(InEpochs):
    """A shared loader as one student sees it: as if it were the student's own."""

    def __init__(self, shared: SharedLoader, take: Callable[[Wanted], KDBatch]) -> None:
        """View `shared` from its start; `take` waits for a batch of it."""
        self._shared, self._take = shared, take
        self._position = Position(shared.loader.position.num_batches)
        self.batch_sampler = self.sampler = BatchSampler(self._position)
        """What Lightning sets the epoch of."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared.loader, name)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._shared.loader)

    def __iter__(self) -> Iterator[KDBatch]:
        """Yield an epoch, or the rest of one after `load_state_dict`."""
        position = self._position
        position.num_batches = len(self._shared.loader)
        position.begin()
        epoch, first = position.here
        try:
            for number in range(first, self._shared.loader.plan.num_batches(epoch)):
                batch = self._take(Wanted(self._shared, epoch, number))
                position.advance()
                yield batch
        except GeneratorExit:
            position.drop("left")
            raise
        position.finish()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that the student has had, as of a loader of its own."""
        epoch, batch = self._position.to_save()
        return {**self._shared.loader.state_dict(), "epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Continue there; call it before any student reads.

        Raises:
            StateError: this is the state of a different stream.
        """
        self._shared.loader.load_state_dict(state, allow=allow)
        self._position.num_batches = len(self._shared.loader)
        self._position.move_to(state["epoch"], state["batch"])


def _tensors(batch: KDBatch) -> list[Tensor]:
    """What students read of a batch."""
    found = [*batch.inputs.values(), *batch.views.values(), *batch.teacher.values(), batch.valid]
    return found + [each for each in (batch.labels, batch.masks) if each is not None]


def choose(wanted: Mapping[str, Wanted]) -> tuple[Wanted, list[str]]:
    """Which batch to read next, and who gets it; `wanted` is what each student waits for.

    Validation comes before training, which waits for all, and a loop over a validation set that is under way before
    one that starts. Of the training it is the earliest batch: who has had it already waits for the others.
    """
    validated = [each for each in wanted.values() if not each.loader.is_training]
    if validated:
        first = next((each for each in validated if each.number), validated[0])
    else:
        first = min(wanted.values(), key=lambda each: each[1:])
    names = [name for name, each in wanted.items() if each.loader is first.loader and _same_images(each, first)]
    return first, names


def _same_images(one: Wanted, other: Wanted) -> bool:
    """Whether two batches of a loader hold the same images; a validation set has the same ones in every epoch."""
    return one.number == other.number and (one.epoch == other.epoch or not one.loader.is_random)
