"""The batches that a loader yields: DALI's graph and the teacher run ahead of them, and their position is kept."""

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
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
from kd_pipeline.data.sources import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.uniform import UniformCounter
from kd_pipeline.data.views import ViewSettings
from kd_pipeline.errors import ConfigError, DataError, StateError
from kd_pipeline.loader.position import Consumer, InEpochs, Position
from kd_pipeline.loader.prepare import PendingBatch, Preparation
from kd_pipeline.loader.process import OwnProcess, refuse_copy
from kd_pipeline.loader.read_ahead import ReadAhead
from kd_pipeline.loader.shards import OwnShard
from kd_pipeline.loader.state import check_fingerprint, check_position, of_common_views, read_position
from kd_pipeline.loader.stream_data import StreamData
from kd_pipeline.loader.stream_facts import StreamFacts
from kd_pipeline.loader.streams import open_stream_sync
from kd_pipeline.loader.teacher_view import check_classes, check_takes, seen_views
from kd_pipeline.loader.torch_view import BatchNumbers, SampleView, as_it_is
from kd_pipeline.loader.verify_recording import check_pixels, check_stream
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["BatchStream"]

_STATE_VERSION = 1

_logger = logging.getLogger("kd_pipeline")


class BatchStream(StreamData, InEpochs):
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
        if prepare is not None and isinstance(teacher, Recording):
            raise ConfigError(
                "prepare changes the batch before the teacher sees it, and a recording has the outputs for batches as "
                "they were; give a live teacher, or change the batch in your loop"
            )
        super().__init__(source, transform, views=views, shown_views=shown_views, mix=mix, plugins=plugins)
        self.teacher, self._teacher_view, self._prepare = teacher, teacher_view, prepare
        self.teacher_views = self._seen_by(teacher)
        """What the teacher is called with."""
        self.device = resolve_device(settings.device)
        try_own_ops(self.views, device_id=self.device.index, has_masks=self.has_masks)
        self.batch_size = batch_size
        self._own_shard = OwnShard(shard)
        self._last_batch = last_batch
        shuffle, shard_ends = read_shuffle(shuffle), getattr(source, "shard_ends", None)
        self._order: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "shard_ends": shard_ends, "repeats": repeats}
        shuffled = shuffle_fields(shuffle, shard_ends, len(source))
        self._plan = self._new_plan()
        self._settings = settings
        self._check_mix(batch_size, repeats)
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
        self._facts = StreamFacts(self, settings, self._graph_settings, self.device, shuffled, last_batch, prepare)
        self._record = None if run_dir is None else argument_path(run_dir) / "bad_samples.jsonl"
        self._reader = self._new_reader()
        num_ahead = int(self.device.type == "cuda") if settings.ahead is None else settings.ahead
        self._sync = open_stream_sync(self.device, ahead=num_ahead)
        self._preparation = self._new_preparation()
        self._ahead = ReadAhead(lambda *place: self._preparation.prepare(self._reader, *place), num_ahead=num_ahead)
        self._position = Position(len(self._plan))
        self.dataset = SampleView(self)
        """The samples, as libraries look for them in a loader of torch's: its length is their number."""
        self.batch_sampler = self.sampler = BatchNumbers(self._position, self)
        """What Lightning sets the epoch of, and accelerate skips batches of."""
        self._owns_teacher = self._is_closed = False
        self._process = OwnProcess(lambda: [self._reader, self._sync, self._ahead, self.teacher])
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
    def stream_fingerprint(self) -> dict[str, Any]:
        """Everything that the image at a position of an epoch depends on, but not teacher, batch size and ranks.

        It is that of the view that the teacher sees.

        Raises:
            ConfigError: the teacher sees several views, or images whose size depends on the batch size.
        """
        return self._facts.of_teachers_images(self.plan, self.teacher, self.teacher_views)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`, counted from 0, and end the current one.

        It is run from its start; but if it was loaded or begun within, from there.

        Raises:
            ConfigError: this is no epoch.
        """
        self._position.set_epoch(epoch)

    def follow(self, plan: Plan) -> None:
        """Read the batches of `plan`, of the same samples and views, from the next loop on."""
        bad_samples = self._reader.bad_samples.indices
        self._reader.close()
        self._ahead.forget_peeked()
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
        self.teacher = teacher
        self._ahead.forget_peeked()
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
        pending = self._ahead.peek(self._position.next_loop)
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
        self._ahead.forget_peeked()
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
            for pending in self._batches_from(*position.here):
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

    def _batches_from(self, epoch: int, first: int) -> Iterator[PendingBatch]:
        return self._ahead.batches(epoch, first, self._plan.num_batches(epoch))

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
        """Everything that the stream of batches depends on."""
        return self._facts.of_batches(self.plan, self.teacher, self.teacher_views)

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
        check_classes(teacher, self.classes)
