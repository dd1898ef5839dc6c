"""The batches that a loader yields: DALI's graph and the teacher run ahead of them, and their position is kept."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.constants import IGNORE_INDEX, IMAGES
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.paths import argument_path
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.bad_samples import BadSample
from kd_pipeline.data.decode import Decoding, resolve_decode
from kd_pipeline.data.graph_settings import DecodeMode, GraphSettings
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import Shuffle, read_shuffle, shuffle_fields
from kd_pipeline.data.own_ops_trial import try_own_ops
from kd_pipeline.data.plan import LastBatch, Plan, Shard
from kd_pipeline.data.reader import Reader
from kd_pipeline.data.settings import LoaderOptions, LoaderSettings
from kd_pipeline.data.sources import Source, masks_of
from kd_pipeline.data.transforms import EvalTransform, TrainTransform, plain_fields
from kd_pipeline.data.uniform import UniformCounter
from kd_pipeline.data.views import Views, ViewSettings, fields_of_view, view_fields
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader.position import Consumer, InEpochs, Position
from kd_pipeline.loader.prepare import PendingBatch, Preparation
from kd_pipeline.loader.process import OwnProcess, refuse_copy
from kd_pipeline.loader.shards import OwnShard
from kd_pipeline.loader.state import check_fingerprint, check_position, of_common_views, read_position
from kd_pipeline.loader.streams import open_stream_sync
from kd_pipeline.loader.teacher_view import check_takes, seen_views
from kd_pipeline.loader.torch_view import BatchNumbers, SampleView, as_it_is
from kd_pipeline.loader.verify_recording import check_pixels, check_stream, cut_of_mixed_batch, require_fixed_sizes
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.models.modules import zero_images
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["BatchStream", "transform_fields"]

_STATE_VERSION = 1

_logger = logging.getLogger("kd_pipeline")


class BatchStream(InEpochs):
    """Everything that `KDDataLoader` does with an open source and teacher."""

    def __init__(
        self,
        source: Source,
        transform: TrainTransform | EvalTransform,
        teacher: Teacher | Recording | None = None,
        *,
        views: Mapping[str, ViewSettings] | None = None,
        shown_views: Collection[str] | None = None,
        teacher_view: str | None = None,
        mix: MixSettings | None = None,
        batch_size: int,
        seed: int = 0,
        shuffle: Shuffle = True,
        shard: Shard | None = None,
        last_batch: LastBatch | None = None,
        repeats: int = 1,
        run_dir: Path | str | None = None,
        prepare: Callable[[KDBatch], KDBatch] | None = None,
        plugins: Collection[str] = (),
        **options: Unpack[LoaderOptions],
    ) -> None:
        """Plan the batches; DALI starts with the first one. `KDDataLoader` describes the arguments."""
        settings = LoaderSettings.of(
            options,
            others=(
                *("views", "shown_views", "teacher_view", "mix", "batch_size", "seed", "shuffle", "last_batch"),
                *("repeats", "run_dir", "prepare", "plugins"),
            ),
        )
        self._prepare = prepare
        if prepare is not None and isinstance(teacher, Recording):
            raise ConfigError(
                "prepare changes the batch before the teacher sees it, and a recording has the outputs for batches as "
                "they were; give a live teacher, or change the batch in your loop"
            )
        self.source, self.transform, self.teacher, self.mix = source, transform, teacher, mix
        self._view_settings, self._known_views = dict(views or {}), Views.of(transform, views).opened(plugins)
        self.views = self._known_views if shown_views is None else self._known_views.only(shown_views)
        """How the views of a sample are made; `transform` describes the first."""
        self._teacher_view = teacher_view
        self.teacher_views = self._seen_by(teacher)
        """What the teacher is called with."""
        self.device = resolve_device(settings.device)
        try_own_ops(self.views, device_id=self.device.index, has_masks=self.has_masks)
        self.batch_size = batch_size
        self.classes = source.classes
        """Class names in label order; None if the source has none."""
        self._own_shard = OwnShard(shard)
        self._last_batch = last_batch
        shuffle, shard_ends = read_shuffle(shuffle), getattr(source, "shard_ends", None)
        self._order: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "shard_ends": shard_ends, "repeats": repeats}
        self._shuffle_fields = shuffle_fields(shuffle, shard_ends, len(source))
        self._plan = self._new_plan()
        self._settings = settings
        if mix is not None and batch_size % (2 * repeats):
            raise ConfigError(
                f"batch_size must be a multiple of {2 * repeats} when images are mixed and repeats is {repeats}, to "
                f"keep partners in one batch, got {batch_size}"
            )
        if mix is not None and masks_of(source) is not None:
            raise ConfigError("mix blends images, and the masks of these have one class for each pixel; leave out mix")
        decoding = Decoding("window", 0.0)  # of pixels nothing is decoded
        if source.stores != "pixels":
            decoding = resolve_decode(settings.decode, settings.hw_decoder_load, device_id=self.device.index)
        self._graph_settings = GraphSettings(
            max_batch=batch_size,
            device_id=self.device.index,
            num_threads=settings.num_threads or num_cores(),
            prefetch=settings.prefetch,
            max_pixels=settings.max_pixels,
            decode=decoding.decode,
            hw_decoder_load=decoding.hw_decoder_load,
            orientation=transform.orientation,
        )
        self._record = None if run_dir is None else argument_path(run_dir) / "bad_samples.jsonl"
        self._reader = self._new_reader()
        self._num_ahead = int(self.device.type == "cuda") if settings.ahead is None else settings.ahead
        self._sync = open_stream_sync(self.device, ahead=self._num_ahead)
        self._preparation = self._new_preparation()
        self._ahead: deque[PendingBatch] = deque()
        self._peeked: tuple[tuple[int, int], PendingBatch] | None = None
        """The batch that `peek` showed, with its position."""
        self._position = Position(len(self._plan))
        self.dataset = SampleView(self)
        """The samples, as libraries look for them in a loader of torch's: its length is their number."""
        self.batch_sampler = self.sampler = BatchNumbers(self._position, self)
        """What Lightning sets the epoch of, and accelerate skips batches of."""
        self._owns_teacher = self._is_closed = False
        self._process = OwnProcess(lambda: [self._reader, self._sync, self._ahead, self._peeked, self.teacher])
        if isinstance(teacher, Recording):
            self._check_recording(teacher)
        elif teacher is not None:
            self._check_teacher(teacher)
            self._process.use()  # most runtimes have threads
        self._uniform = UniformCounter()
        """Of the current loop."""

    def __len__(self) -> int:
        """Number of batches in an epoch, equal on every rank and in every epoch.

        Raises:
            ConfigError: the launcher's variables do not say how many processes share the data.
        """
        self._own_shard.require_known()
        num_batches = len(self.plan)
        self._own_shard.keep_size("len(loader) was asked")
        return num_batches

    def __bool__(self) -> bool:
        """True; not the length, which has to know the number of processes."""
        return True

    @property
    def shard(self) -> Shard:
        """The part of every global batch that this process reads; may change until the first batch if not given."""
        self._adopt_shard()
        return self._own_shard.current

    @property
    def plan(self) -> Plan:
        """The order of the samples of this shard."""
        self._adopt_shard()
        return self._plan

    @property
    def num_classes(self) -> int | None:
        """That of the source; None if it has no classes."""
        return self.source.num_classes

    @property
    def has_labels(self) -> bool:
        """Whether batches have labels."""
        return self.source.labels is not None

    @property
    def has_masks(self) -> bool:
        """Whether batches have masks."""
        return masks_of(self.source) is not None

    @property
    def ignore_index(self) -> int:
        """Class in masks of the pixels that have none."""
        masks = masks_of(self.source)
        return IGNORE_INDEX if masks is None else masks.ignore_index

    @property
    def labels_are_soft(self) -> bool:
        """Whether labels are weights `[N, K]`, as those of mixed images are."""
        return self.mix is not None

    def sample_name(self, index: int) -> str:
        """The name in messages of the sample at `index` of the dataset."""
        return self.source.name(index)

    @property
    def all_views(self) -> Views:
        """How all views are made that are known, whether batches have them or not."""
        return self._known_views

    @property
    def view_settings(self) -> Mapping[str, ViewSettings]:
        """The settings of all known views besides `images`."""
        return self._view_settings

    def example(self, view: str = IMAGES) -> dict[str, Tensor]:
        """Inputs of two rows by name, for a trial run of a network: a view of zeros in float32, on the CPU."""
        return zero_images(self._known_views[view].image_shape)

    def normalization(self, view: str = IMAGES) -> Normalization:
        """How a view is normalized."""
        normalize = self._known_views[view].normalize
        return Normalization(normalize.mean, normalize.std)

    @property
    def drop_last(self) -> bool:
        """Whether samples that do not fill a batch are left out."""
        return self.plan.last_batch == "drop"

    collate_fn = staticmethod(as_it_is)
    """Batches are made already; for a torch loader around `dataset` and `batch_sampler`."""
    prefetch_factor: int | None = None
    """accelerate's own default for that torch loader would be refused by torch."""

    __reduce_ex__ = refuse_copy

    @property
    def decode(self) -> DecodeMode:
        """How files are decoded: the setting, or the choice of `auto`."""
        return self._graph_settings.decode

    @property
    def fingerprint(self) -> str:
        """Hex digest of the content of the data, that of the source."""
        return self.source.fingerprint

    @property
    def stream_fingerprint(self) -> dict[str, Any]:
        """Everything that the image at a position of an epoch depends on, but not teacher, batch size and ranks.

        It is that of the view that the teacher sees.

        Raises:
            ConfigError: the teacher sees several views, or images whose size depends on the batch size.
        """
        if len(self.teacher_views) > 1:
            raise ConfigError(
                f"a recording has the outputs for one view, and the members of the teacher see "
                f"{' and '.join(self.teacher_views)}; give them one view to record them"
            )
        (view,) = self.teacher_views
        require_fixed_sizes(self._known_views, view, self.mix)
        if (count := self._known_views[view].count) is not None:
            raise ConfigError(
                f"a recording has outputs for one image of each sample, and the teacher's view {view} has "
                f"{count} copies; give it a view without count to record it"
            )
        fields = self._fingerprint()
        for name in ("teacher", "teacher_views", "views", "global_batch_size", "last_batch"):
            del fields[name]
        return {
            **fields,
            "view": fields_of_view(self.transform, self._view_settings, view),
            "cut_of_mixed_batch": cut_of_mixed_batch(self._plan, self.mix),
        }

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`, counted from 0, and end the current one.

        It is run from its start; but if it was loaded or begun within, from there.
        """
        self._position.set_epoch(epoch)

    def follow(self, plan: Plan) -> None:
        """Read the batches of `plan`, of the same samples and views, from the next loop on."""
        bad_samples = self._reader.bad_samples.indices
        self._reader.close()
        self._peeked = None
        self._plan = plan
        self._reader = self._new_reader()
        self._reader.bad_samples.restore(bad_samples)
        self._position.num_batches = len(plan)

    def attach_teacher(self, teacher: Teacher | Recording) -> None:
        """Run `teacher` on every batch from the next loop on, as if the loader had been made with it.

        Raises:
            StateError: there is a teacher already, or the recording is of different images.
            TeacherError: it takes different images, or has different classes.
        """
        if self.teacher is not None:
            raise StateError("the loader has a teacher already; make a new one")
        if self._prepare is not None and isinstance(teacher, Recording):
            raise ConfigError("prepare changes the batches, and a recording has outputs for them as they were")
        self.teacher_views = self._seen_by(teacher)
        self.teacher, self._peeked = teacher, None
        self._preparation = self._new_preparation()
        if isinstance(teacher, Recording):
            self._check_recording(teacher)
        else:
            self._check_teacher(teacher)
            self._process.use()

    def peek(self) -> KDBatch:
        """A copy of the batch that the next loop returns first. Nothing moves, and that batch is not read again.

        Raises:
            ConfigError, DataError, StateError, TeacherError: as a loop would.
        """
        self._start_reading()
        place = self._position.next_loop
        if self._peeked is None or self._peeked[0] != place:
            self._peeked = place, self._preparation.prepare(self._reader, *place)
        pending = self._peeked[1]
        self._sync.hand_over(pending.event, pending.torch_owned)
        batch = pending.batch.clone()
        self._sync.keep_until_used(pending.buffer)
        return batch

    @property
    def bad_samples(self) -> tuple[BadSample, ...]:
        """The unreadable samples that were substituted or were too many, by index in the dataset."""
        return self._reader.bad_samples.samples

    def bad_sample(self, index: int) -> BadSample | None:
        """The one of `bad_samples` at `index` of the dataset; None if that sample is not one of them."""
        return self._reader.bad_samples.at(index)

    @property
    def num_uniform(self) -> int:
        """Images of the current loop, or of the last one, that had a single color after the transform; waits for a GPU.

        A decoder that fails in silence gives such images, and so does a crop of a plain background.
        """
        return self._uniform.read()[0]

    def __iter__(self) -> Iterator[KDBatch]:
        """Yield an epoch, or the rest of one after `load_state_dict`."""
        self._check_usable()
        return self._iterate()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was returned: plain numbers, strings, lists and dicts."""
        epoch, batch = self._position.to_save()
        return {
            "version": _STATE_VERSION,
            "epoch": epoch,
            "batch": batch,
            "bad_samples": self._reader.bad_samples.indices,
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Continue with the batch after the last one before `state` was taken.

        Args:
            state: `state_dict()` of a loader with the same data, transform, teacher and global batch, from any rank.
            allow: names of fingerprint fields that may differ.

        Raises:
            StateError: this is no state, or one of a different stream; names each field that differs, old → new.
            ConfigError: the launcher's variables do not say how many processes share the data.
        """
        self._check_usable()
        self._own_shard.require_known()
        epoch, batch, bad_samples, fingerprint = read_position(state, version=_STATE_VERSION)
        might_grow = self._own_shard.might_grow()
        ours = self._fingerprint()
        check_fingerprint(*of_common_views(fingerprint, ours), allow=allow, might_grow=might_grow)
        check_position(epoch, batch, bad_samples, num_batches=len(self._plan), num_samples=len(self.source))
        self._own_shard.keep_size("a position was loaded")
        self._reader.stop()
        self._reader.bad_samples.restore(bad_samples)
        self._peeked = None
        self._position.move_to(epoch, batch)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """All pixels `[H, W, 3]` of the sample at `index` of the dataset, as they are before the transform.

        Raises:
            RuntimeError: its file cannot be read.
        """
        self._check_usable()
        return self._reader.pixels(index)

    def close(self) -> None:
        """Stop DALI, drop all batches read ahead and close the config's teacher. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._position.loop += 1
        if self._process.is_foreign:
            return  # a forked child, where the parent's threads are not
        self._peeked = None
        try:
            self._reader.close()
            self._sync.close()
        finally:  # a GPU that has failed raises
            self._ahead.clear()
            if self._owns_teacher and self.teacher is not None:
                self.teacher.close()
        self._uniform.report(wait=True)  # last, as it raises if the GPU has failed

    def __repr__(self) -> str:
        teacher = "no teacher" if self.teacher is None else f"{self.teacher.backend} teacher"
        if isinstance(self.teacher, Recording):
            teacher = "recorded teacher"
        per_epoch, (height, width) = len(self._plan), self.transform.height_width
        size = f"{height} x {width}" if self.transform.schedule is None else str(self.transform.schedule)
        return (
            f"{type(self).__name__}({self.source!r}, {size}, {teacher}, "
            f"{per_epoch} batch{'' if per_epoch == 1 else 'es'} of {self.batch_size} an epoch, {self.device})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _iterate(self) -> Iterator[KDBatch]:
        self._start_reading()
        position, consumer = self._position, Consumer()
        loop = position.begin()
        self._uniform.restart()
        try:
            for pending in self._pending(*position.here):
                self._sync.hand_over(pending.event, pending.torch_owned)
                self._uniform.add(pending.counted)
                position.advance()
                consumer.take(sys._getframe().f_back)
                try:
                    yield pending.batch
                finally:
                    if not self._process.is_foreign:
                        self._sync.keep_until_used(pending.buffer)
                self._process.check()
                if loop != position.loop:
                    raise StateError(
                        "this loop has lost its place: the loader was closed, was moved by load_state_dict or "
                        "set_epoch, or is in another loop; run one loop at a time"
                    )
        except GeneratorExit:
            if loop == position.loop and not sys.is_finalizing():
                position.drop(consumer.how_dropped(sys._getframe().f_back))
            raise
        self._uniform.end(position.epoch)
        position.finish()

    def _pending(self, epoch: int, first: int) -> Iterator[PendingBatch]:
        """The batches of `epoch` from `first` on, with the next ones in preparation."""
        ahead = self._ahead = deque()
        if self._peeked is not None and self._peeked[0] == (epoch, first):
            ahead.append(self._peeked[1])
        self._peeked = None
        failure: Exception | None = None
        num_batches = self._plan.num_batches(epoch)
        for number in range(first, num_batches):
            while failure is None and len(ahead) <= self._num_ahead and number + len(ahead) < num_batches:
                try:
                    ahead.append(self._preparation.prepare(self._reader, epoch, number + len(ahead)))
                except Exception as exc:
                    failure = exc  # raised after the good batches before it
            if failure is not None and not ahead:
                raise failure
            yield ahead.popleft()

    def _new_plan(self) -> Plan:
        shard = self._own_shard.current
        plan = Plan(
            num_samples=len(self.source),
            batch_size=self.batch_size,
            shard=shard,
            last_batch=self._last_batch or ("keep" if shard.world_size == 1 else "pad"),
            **self._order,
        )
        if not len(plan):
            raise DataError(
                f"{len(self.source)} samples do not fill a batch of {self.batch_size} on {shard.world_size} rank(s), "
                "and last_batch is 'drop'; lower batch_size, or set last_batch to 'keep' or 'pad'"
            )
        return plan

    def _new_preparation(self) -> Preparation:
        return Preparation(
            self.source,
            self.mix,
            self.teacher,
            self.teacher_views[0],
            self.device,
            self._sync,
            self._prepare,
        )

    def _new_reader(self) -> Reader:
        settings = self._graph_settings, self._settings
        return Reader(self.source, self.views, self._plan, *settings, self.mix, self._record)

    def _adopt_shard(self) -> None:
        """Plan again if this process turns out to be one of several."""
        if self._is_closed or not self._own_shard.update():
            return
        self.follow(self._new_plan())
        if isinstance(self.teacher, Recording):
            check_stream(self.teacher, self.stream_fingerprint)

    def _start_reading(self) -> None:
        self._check_usable()  # again for a loop, which starts at its first `next`
        self._adopt_shard()
        self._own_shard.keep()
        self._process.use()

    def _check_recording(self, recording: Recording) -> None:
        """Refuse a recording of different images now, rather than in the middle of an epoch."""
        recording.check_classes(self.classes)
        check_stream(recording, self.stream_fingerprint)

        views = self._known_views.only(self.teacher_views)

        def open_reader(plan: Plan) -> Reader:
            graph_settings = replace(self._graph_settings, prefetch=1)
            return Reader(self.source, views, plan, graph_settings, self._settings, self.mix)

        check_pixels(
            recording,
            self._plan,
            self.mix,
            self.teacher_views[0],
            open_reader=open_reader,
            sync=self._sync,
            name_of=self.source.name,
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that the stream of batches depends on; not threads, `prefetch` and `ahead`.

        Fields of later releases are None if unused, as in the state of an older release, which lacks them.
        """
        self._adopt_shard()
        depends_on_decoder = self.device.type == "cuda" and self.source.stores != "pixels"
        return {
            "source": self.source.fingerprint,
            "num_samples": len(self.source),
            "transform": transform_fields(self.transform),
            "views": self._fields_of_views() or None,
            "mix": None if self.mix is None else self.mix.model_dump(mode="json"),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "teacher_views": None if self.teacher_views == (IMAGES,) else list(self.teacher_views),
            "seed": self._plan.seed,
            **self._shuffle_fields,
            "global_batch_size": self._plan.global_batch_size,
            # Not the plan's: the default pads on several ranks, with the same samples as `keep` has on one.
            "last_batch": self._last_batch or "keep",
            "repeats": self._plan.repeats if self._plan.repeats > 1 else None,
            "prepare": None
            if self._prepare is None
            else getattr(self._prepare, "__qualname__", type(self._prepare).__name__),
            "on_bad_sample": self._settings.on_bad_sample,
            "max_pixels": self._settings.max_pixels,
            "device": self.device.type,
            # Both modes give the same pixels on a CPU; a GPU's decoder may round windows and whole images differently.
            "decode": self.decode if depends_on_decoder else None,
            "hw_decoder_load": self._graph_settings.hw_decoder_load or None,
            "dali": require("nvidia.dali", extra="cpu").__version__,
        }

    def _fields_of_views(self) -> dict[str, Any]:
        """What the views of the batches and of the teacher depend on; a recording's need not be in the batches."""
        names = self._known_views.only({*self.views.names, *self.teacher_views}).names
        fields = view_fields(self.transform, self._view_settings)
        return {name: fields[name] for name in names if name in fields}

    def _check_usable(self) -> None:
        if self._is_closed:
            raise StateError("the loader is closed; make a new one")
        self._process.check()

    def _seen_by(self, teacher: Teacher | Recording | None) -> tuple[str, ...]:
        return seen_views(teacher, self._teacher_view, rendered=self.views, known=self._known_views)

    def _check_teacher(self, teacher: Teacher) -> None:
        """Refuse now what would fail, or be silently wrong, at the first batch."""
        views = [self.views[name] for name in self.teacher_views]
        check_takes(teacher, views, batch_size=self.batch_size, device=self.device)
        ours = self.classes
        for name, theirs in teacher.logits.items():
            if ours is not None and theirs is not None and ours != theirs:
                ours_here, theirs_here = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
                raise TeacherError(
                    f"the teacher's {len(theirs)} classes are not the data's {len(ours)} in the same order: where the "
                    f"data has {ours_here!r} the teacher has {theirs_here!r} ({name}); give the source the teacher's "
                    "order as `classes`"
                )


def transform_fields(transform: TrainTransform | EvalTransform) -> dict[str, Any]:
    """What the images depend on, as plain values; fields of later releases are None if unused."""
    fields = plain_fields(transform)
    return fields | {"orientation": None if transform.orientation == "upright" else transform.orientation}
