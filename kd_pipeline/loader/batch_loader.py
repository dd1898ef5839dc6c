"""`BatchLoader`: any loader of the user's own, with the teacher's outputs for its batches."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import getLogger
from typing import Any, Self

import torch
from torch import Tensor

from kd_pipeline._core.constants import IGNORE_INDEX, IMAGES
from kd_pipeline._core.device import resolve_device
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.plan import Shard, check_whole
from kd_pipeline.errors import ConfigError, DataError, StateError
from kd_pipeline.loader.batch_epoch import OpenEpoch, ReadyBatch
from kd_pipeline.loader.batch_fields import FieldNames, InputNames, Key
from kd_pipeline.loader.batch_preparation import AnyTeacher, BatchPreparation
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.position import UNKNOWN_LENGTH, BatchSampler, Consumer, InEpochs, Position
from kd_pipeline.loader.state import check_fingerprint
from kd_pipeline.loader.streams import open_stream_sync
from kd_pipeline.loader.user_batches import EpochStart, UserBatches, digest_of, read_start
from kd_pipeline.teachers.base import Teacher

__all__ = ["AnyLoader", "BatchLoader"]

_STATE_VERSION = 1

_logger = getLogger("kd_pipeline")


class BatchLoader(InEpochs):
    """Iterates over the batches of any loader, with teacher outputs; one `for` loop is one epoch.

        loader = BatchLoader(DataLoader(dataset, batch_size=64, shuffle=True), teacher_module)
        for batch in loader:
            student(batch.input), batch.labels, batch.teacher["logits"]

    Loops, `peek`, `set_epoch` and `state_dict` mean the same as those of `KDDataLoader`. The batches and their order
    are those of the user's loader: it is iterated once for each epoch, in the thread of the caller, and draws from
    torch's random state what it would draw in a loop of its own. A batch that was shown by `peek` or `example` is the
    first of the first epoch.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        teacher: AnyTeacher | None = None,
        *,
        inputs: InputNames | None = None,
        labels: Key | None = None,
        masks: Key | None = None,
        index: Key | None = None,
        valid: Key | None = None,
        prepare: Callable[[KDBatch], KDBatch] | None = None,
        device: torch.device | str = "auto",
        ahead: int | None = None,
        batch_size: int | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        ignore_index: int = IGNORE_INDEX,
        name: str = "",
    ) -> None:
        """Wrap `batches`; the first one is read when it is needed.

        Args:
            batches: a torch `DataLoader`, a list, or any other iterable that can be iterated again, of tuples,
                mappings or `KDBatch`. The first field of a tuple is the input, the second the labels or masks. Of a
                mapping, the labels are called `labels` or `label`, masks `masks`, `mask` or as labels, and the input is
                `images`, `pixel_values` or the only other tensor. Arrays become tensors.
            teacher: an open teacher, which stays open; or a module, of which a frozen copy is made at the first batch,
                or settings, which are opened then.
            inputs: what networks are called with: a field, several (then as keywords), or `{keyword: field}`. Fields
                of tuples are positions; names are given to them in their order.
            labels: the field of the labels: integers `[N]`, or floats `[N, K]`.
            masks: the field of the masks, the class of each pixel: integers `[N, H, W]`.
            index: the field of each sample's number; by default they are counted in each epoch.
            valid: the field `[N]` that is false for rows to ignore; by default there are none, but for the samples that
                a `DistributedSampler` repeats to give each process as many.
            prepare: changes each batch, on the device, before the teacher sees it.
            device: of what is returned; `"auto"` is the GPU if there is one.
            ahead: batches that are prepared before they are asked for; defaults to 1 on a GPU and to 0 on a CPU.
            batch_size: rows in a full batch; defaults to what the loader says, else to the rows of the first one.
            num_classes: of the labels or masks; defaults to the number of `classes`, or of columns of `[N, K]`.
            classes: names in label order.
            ignore_index: class in masks of the pixels that have none.
            name: of the data, for messages.

        Raises:
            ConfigError: `batches` cannot be iterated again, or a value is out of range.
        """
        _check_numbers(ahead=(ahead, 0), batch_size=(batch_size, 1), num_classes=(num_classes, 1))
        check_whole("ignore_index", ignore_index)
        if None not in (classes, num_classes) and len(classes or ()) != num_classes:
            raise ConfigError(
                f"num_classes is {num_classes}, and classes has {len(classes or ())} names; leave one out"
            )
        self._user = UserBatches(batches)
        self.batches = batches
        """The user's own loader."""
        self.device = resolve_device(device)
        self.classes = None if classes is None else tuple(classes)
        """Class names in label order; None if they are unknown."""
        self.ignore_index = ignore_index
        """Class in masks of the pixels that have none."""
        self.name = name
        self._batch_size, self._num_classes = batch_size, num_classes
        self._num_ahead = (1 if self.device.type == "cuda" else 0) if ahead is None else ahead
        self._sync = open_stream_sync(self.device, ahead=self._num_ahead)
        names = FieldNames(inputs, labels, masks, index, valid)
        self._preparation = BatchPreparation(
            names,
            teacher,
            prepare,
            classes=self.classes,
            num_own_rows=self._user.num_own_rows,
            device=self.device,
            sync=self._sync,
            reads_ahead=self._num_ahead > 0,
        )
        self._position = Position(self._user.num_batches or UNKNOWN_LENGTH)
        self._started: OpenEpoch | None = None
        """The epoch that the next loop continues, as its first batch was shown."""
        self._loaded = self._last = EpochStart(0)
        """The position that was loaded, and that after the last batch that was returned."""
        self._is_looping = self._is_closed = self._has_checked_ranks = False

    def __len__(self) -> int:
        """Number of batches in an epoch.

        Raises:
            TypeError: the user's loader does not say.
        """
        if (found := self._user.num_batches) is None:
            raise TypeError(
                f"{type(self.batches).__qualname__} has no length; give it a __len__, or limit the run "
                "(train.limit_train_batches) or the evaluation (max_batches)"
            )
        return found

    def __bool__(self) -> bool:
        """True; not the length, which may be unknown."""
        return True

    @property
    def teacher(self) -> Teacher | None:
        """The open teacher; one that is opened for the first batch is opened now."""
        if self._preparation.owns_teacher:
            self._first()
        return self._preparation.teacher

    @property
    def batch_size(self) -> int:
        """Rows in a full batch: as given, as the loader says, or else of the first batch."""
        if found := self._batch_size or self._user.batch_size:
            return found
        self._first()
        return self._preparation.num_first_rows

    @property
    def shard(self) -> Shard:
        """This process among those of the process group; what it reads is up to the user's loader."""
        return self._preparation.shard

    @property
    def num_classes(self) -> int | None:
        """Classes of the labels or masks; None if they are unknown."""
        if self._num_classes is not None or self.classes is not None:
            return self._num_classes or len(self.classes or ())
        first = self._first()
        return first.labels.shape[1] if first.labels is not None and self.labels_are_soft else None

    @property
    def has_labels(self) -> bool:
        """Whether batches have labels."""
        return self._first().labels is not None

    @property
    def has_masks(self) -> bool:
        """Whether batches have masks."""
        return self._first().masks is not None

    @property
    def labels_are_soft(self) -> bool:
        """Whether labels are weights `[N, K]`."""
        labels = self._first().labels
        return labels is not None and labels.is_floating_point() and labels.ndim == 2

    def sample_name(self, index: int) -> str:
        """The name in messages of the sample at `index`."""
        return f"sample {index} of {self.name}" if self.name else f"sample {index}"

    def example(self, view: str = IMAGES) -> dict[str, Tensor]:
        """Inputs of two rows by name on the CPU, for a trial run of a network: those of the first batch.

        Raises:
            ConfigError: it has no such view.
        """
        try:
            inputs = self._first().of_view(view).inputs
        except KeyError as exc:
            raise ConfigError(f"view: {exc.args[0]}") from None
        return {name: tensor.clone() for name, tensor in inputs.items()}

    @property
    def fingerprint(self) -> str:
        """Hex digest of what is known about the data: types, lengths, batch size, names, ranks and dtypes of fields.

        It does not cover the content: other data of the same kind has the same one.
        """
        first = self._first()
        fields = {
            name: (tensor.ndim, str(tensor.dtype))
            for name, tensor in {**first.inputs, "labels": first.labels, "masks": first.masks}.items()
            if tensor is not None
        }
        return digest_of({**self._user.facts(), "fields": fields})

    @property
    def batch_sampler(self) -> BatchSampler:
        """Lightning calls `set_epoch` on its sampler."""
        return BatchSampler(self._position)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`, counted from 0, and end this one; the user's loader is told when it starts.

        Raises:
            ConfigError: this is no epoch.
        """
        self._position.set_epoch(epoch)

    def attach_teacher(self, teacher: Teacher) -> None:
        """Run `teacher` on every batch from the next loop on, as if the loader had been made with it.

        Raises:
            StateError: there is a teacher already.
            TeacherError: it is on another device or has other classes.
        """
        if self._preparation.has_teacher:
            raise StateError("the loader has a teacher already; make a new one")
        self._preparation.attach(teacher)
        if self._started is not None:
            self._started.complete(self._preparation.completed)

    def peek(self) -> KDBatch:
        """A copy of the batch that the next loop returns first. Nothing moves, and that batch is not read again.

        Raises:
            ConfigError, DataError, StateError, TeacherError: as a loop would.
        """
        ready = self._peek()
        self._sync.hand_over(ready.event, ready.tensors)
        batch = ready.batch.clone()
        self._sync.keep_until_used(ready.raw)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was returned, and with it that of the user's loader if it has one.

        Without one, it holds torch's random state at the beginning of the epoch.
        """
        epoch, batch = self._position.to_save()
        place = EpochStart(epoch) if batch == 0 else self._last
        return {
            "version": _STATE_VERSION,
            "epoch": epoch,
            "batch": batch,
            "row": place.row,
            "inner": place.inner,
            "torch_rng": None if place.inner is not None else place.torch_rng,
            "loader": self._user.facts(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Continue with the batch after the last one before `state` was taken.

        The user's loader loads its own state where it has one. If not, the batches before are read and dropped.

        Args:
            state: `state_dict()` of a loader of the same kind.
            allow: facts about the user's loader that may differ.

        Raises:
            StateError: this is no state, or one of another loader; names each fact that differs, old → new.
        """
        self._check_usable()
        place = read_start(state, version=_STATE_VERSION)
        check_fingerprint(state["loader"], self._user.facts(), allow=allow)
        if self._started is not None:
            self._started.drop(self._sync.keep_until)
        self._started = None
        self._loaded = self._last = place
        self._position.move_to(place.epoch, place.batch)

    def close(self) -> None:
        """Drop what was read ahead, and close the teacher if it was opened here. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._position.loop += 1
        if self._preparation.process.is_foreign:
            return  # a forked child, where the teacher's threads are not
        try:
            self._sync.close()
        finally:  # a GPU that has failed raises
            self._started = None
            self._preparation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[KDBatch]:
        """Yield an epoch, or the rest of one after `load_state_dict`."""
        self._check_usable()
        return self._iterate()

    def _iterate(self) -> Iterator[KDBatch]:
        self._check_usable()
        position, consumer = self._position, Consumer()
        loop = position.begin()
        place = position.here
        epoch = self._take(place)
        self._is_looping = True
        try:
            while (ready := self._next(epoch)) is not None:
                self._sync.hand_over(ready.event, ready.tensors)
                if position.num_returned == position.num_batches:
                    position.num_batches = UNKNOWN_LENGTH  # the loader has more than it says
                self._last = ready.after
                position.advance()
                consumer.take(sys._getframe().f_back)
                try:
                    yield ready.batch
                finally:
                    if not self._preparation.process.is_foreign:
                        self._sync.keep_until_used(ready.raw)
                if loop != position.loop:
                    raise StateError(
                        "this loop has lost its place: the loader was closed, was moved by load_state_dict or "
                        "set_epoch, or is in another loop; run one loop at a time"
                    )
        except GeneratorExit:
            if loop == position.loop and not sys.is_finalizing():
                position.drop(consumer.how_dropped(sys._getframe().f_back))
                if position.next_loop == place and ready is not None:  # it was only a look
                    epoch.put_back(ready)
                    self._started = epoch
            raise
        finally:
            self._is_looping = False
            if self._started is not epoch and not self._preparation.process.is_foreign:
                epoch.drop(self._sync.keep_until)
        position.finish()

    def _next(self, epoch: OpenEpoch) -> ReadyBatch | None:
        self._preparation.process.check()
        return epoch.take()

    def _take(self, place: tuple[int, int]) -> OpenEpoch:
        """The epoch from `place` on, of which `peek` may have read a batch."""
        started, self._started = self._started, None
        if started is not None and started.place == place:
            return started
        self._check_ranks()
        loaded = self._loaded
        start = loaded if place == (loaded.epoch, loaded.batch) else EpochStart(*place)
        return OpenEpoch(self._user, start, self._preparation.prepare, num_ahead=self._num_ahead)

    def _peek(self) -> ReadyBatch:
        self._check_usable()
        if self._is_looping:
            raise StateError("a loop over the loader is open; peek before it starts, or after it has ended")
        self._started = epoch = self._take(self._position.next_loop)
        if (ready := epoch.take()) is None:
            raise DataError("no batch is left in this epoch to look at; loop over the loader to begin the next one")
        epoch.put_back(ready)
        return ready

    def _first(self) -> KDBatch:
        """Two rows of the first batch that was ever read."""
        if self._preparation.first is None:
            self._peek()
        assert self._preparation.first is not None
        return self._preparation.first

    def _check_ranks(self) -> None:
        """Warn if all processes would read the same samples."""
        num_ranks = self.shard.world_size
        if num_ranks > 1 and not self._has_checked_ranks and self._user.gives_all_to_each_rank():
            _logger.warning(
                "each of %d processes reads all samples of its DataLoader; give it a sampler="
                "torch.utils.data.DistributedSampler(dataset), so that each reads its own part",
                num_ranks,
            )
        self._has_checked_ranks = True

    def _check_usable(self) -> None:
        if self._is_closed:
            raise StateError("the loader is closed; make a new one")
        self._preparation.process.check()


def _check_numbers(**given: tuple[int | None, int]) -> None:
    """Refuse what is no whole number of at least what stands beside it; None is fine."""
    for name, (value, low) in given.items():
        if value is not None:
            check_whole(name, value, low)


AnyLoader = KDDataLoader | BatchLoader
"""A loader of images by DALI, or of anything else."""
