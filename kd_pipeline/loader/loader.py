"""`KDDataLoader`: runs DALI's graph and the teacher ahead of the consumer, and keeps the position of a run."""

import hashlib
import logging
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.paths import argument_path
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.bad_samples import BadSample
from kd_pipeline.data.dali import DecodeMode, GraphSettings
from kd_pipeline.data.decode import Decoding, resolve_decode
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import LastBatch, Plan, Shard
from kd_pipeline.data.reader import Reader
from kd_pipeline.data.settings import LoaderOptions, LoaderSettings
from kd_pipeline.data.sources import Source, open_source, save_classes
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.uniform import UniformCounter
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader.position import BatchSampler, Consumer, Position
from kd_pipeline.loader.prepare import PendingBatch, Preparation
from kd_pipeline.loader.process import NotATorchLoaderError, OwnProcess, refuse_copy
from kd_pipeline.loader.shards import OwnShard
from kd_pipeline.loader.state import check_fingerprint, check_position, read_position
from kd_pipeline.loader.streams import open_stream_sync
from kd_pipeline.loader.verify_recording import check_pixels, check_stream, cut_of_mixed_batch
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording, open_recording
from kd_pipeline.teachers.settings import StudentPrecision, is_recording

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["EACH_IMAGE_ONCE", "KDDataLoader", "LoaderArguments", "open_config_teacher", "sample_images"]

_STATE_VERSION = 1

_logger = logging.getLogger("kd_pipeline")


class LoaderArguments(LoaderOptions, total=False):
    """The arguments of `KDDataLoader` that a config has, which `from_config` can change."""

    mix: MixSettings | None
    batch_size: int
    seed: int
    shuffle: bool
    last_batch: LastBatch | None
    repeats: int
    run_dir: Path | str | None


EACH_IMAGE_ONCE: dict[str, Any] = {"mix": None, "repeats": 1, "last_batch": "keep", "run_dir": None}
"""Arguments of `from_config` for every image of a split once, unmixed, without writing into the run's folder."""


class KDDataLoader:
    """Iterates over batches of images, labels and teacher outputs; one `for` loop is one epoch.

        with KDDataLoader(source, TrainTransform(size=224), teacher, batch_size=256) as loader:
            if saved is not None:
                loader.load_state_dict(saved)
            for epoch in range(loader.epoch, num_epochs):
                for batch in loader:
                    ...

    Order and views depend on seed, epoch and dataset only. A new loader that loads the `state_dict()` of another
    continues exactly as that one would have continued:

    - Within a loop, `state_dict()` is the position after the last batch that was returned, and the first loop of a
      loader that loads it is the rest of that epoch. `num_returned` counts batches from the start of the epoch.
    - A loop that was left early, by `break` or `return`, has ended its epoch, for a saved position too. So to stop
      within an epoch, save before `break`; to stop each epoch after n batches, compare `num_returned` with n.
    - After a loop that an exception ended, such as Ctrl-C, `state_dict()` is still the position within its epoch. The
      next loop in this process runs the next epoch.
    - `peek()`, and the common `next(iter(loader))`, show the next batch and move nothing.
    - An iterator that you keep (`it = iter(loader)`) is a loop that is still open. To end its epoch, drop it or call
      `set_epoch(epoch + 1)`.

    With several processes each reads its own shard of every epoch. Where it is not given, it is that of the process
    group at the first batch, and the loader refuses to continue if that changes later.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform | EvalTransform,
        teacher: Teacher | Recording | None = None,
        *,
        mix: MixSettings | None = None,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        shard: Shard | None = None,
        last_batch: LastBatch | None = None,
        repeats: int = 1,
        run_dir: Path | str | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """Plan the batches; DALI starts with the first one.

        Args:
            source: the samples.
            transform: the transform of the images.
            teacher: a teacher to run on every batch, or its recorded outputs; the loader does not close it.
            mix: how to mix images of a batch before the teacher sees them; turns labels into float weights.
            batch_size: images in a batch of this process; with `mix`, a multiple of `2 * repeats`.
            seed: 0 to 2**64 - 1; equal on all ranks.
            shuffle: a new order in every epoch, instead of the dataset's order.
            shard: this process among those that share an epoch. Defaults to its rank in `torch.distributed` at the
                first batch or, if that is not initialized, to what `torchrun`, `srun` or `mpirun` says, else to a
                single process. Give it where not every process reads its own part: `Shard()` for the whole epoch.
            last_batch: see `LastBatch`. Defaults to `keep` for one process, and to `pad` for several, as collectives
                such as `accelerator.gather_for_metrics` need the same number of rows on each: drop the rows that are
                not `valid` afterward.
            repeats: views of a sample in a row in an epoch; see `Plan`.
            run_dir: folder for `bad_samples.jsonl`; without it no file is written.
            options: device, num_threads, prefetch, ahead, decode, hw_decoder_load, on_bad_sample, max_bad_fraction and
                max_pixels; see `LoaderSettings` for their ranges and defaults.

        Raises:
            ConfigError: a value is out of range, or the GPU cannot decode images in any mode.
            DataError: there is not a single batch.
            TeacherError: the teacher takes different images, or has different classes.
            StateError: the recording is of different images.
        """
        settings = LoaderSettings.of(options, others=LoaderArguments.__annotations__)
        self.source, self.transform, self.teacher, self.mix = source, transform, teacher, mix
        self.device = resolve_device(settings.device)
        self.batch_size = batch_size
        self.classes = source.classes
        """Class names in label order; None if the source has none."""
        self._own_shard = OwnShard(shard)
        self._last_batch = last_batch
        self._order: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "repeats": repeats}
        self._plan = self._new_plan()
        self._settings = settings
        if mix is not None and batch_size % (2 * repeats):
            raise ConfigError(
                f"batch_size must be a multiple of {2 * repeats} when images are mixed and repeats is {repeats}, to "
                f"keep partners in one batch, got {batch_size}"
            )
        decoding = Decoding("window", 0.0)  # of pixels nothing is decoded
        if source.stores == "files":
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
        self._preparation = Preparation(source, transform.size, mix, teacher, self.device, self._sync)
        self._ahead: deque[PendingBatch] = deque()
        self._peeked: tuple[tuple[int, int], PendingBatch] | None = None
        """The batch that `peek` showed, with its position."""
        self._position = Position(len(self._plan))
        self._owns_teacher = self._is_closed = self._has_warned = False
        self._process = OwnProcess(lambda: [self._reader, self._sync, self._ahead, self._peeked, self.teacher])
        if isinstance(teacher, Recording):
            self._check_recording(teacher)
        elif teacher is not None:
            _check_teacher(teacher, self)
            self._process.use()  # most runtimes have threads
        self._uniform = UniformCounter()
        """Of the current loop."""

    @classmethod
    def from_config(
        cls,
        config: "Config",
        split: str = "train",
        *,
        teacher: Teacher | Recording | Literal["config"] | None = "config",
        shard: Shard | None = None,
        training: Source | None = None,
        plugins: Collection[str] = (),
        trust_engines: Collection[str] = (),
        **changes: Unpack[LoaderArguments],
    ) -> Self:
        """The loader of one of the config's splits: `train`, `val`, `test`, or a name under `more`.

        Args:
            config: the config.
            split: name of the split.
            teacher: a teacher or recording, which stays open; None for none; or `"config"` for the config's: it is
                opened for the split `train` only, matched to the data's order of classes and closed with the loader.
            shard: as for a loader.
            training: the open source of the split `train`, to save the time of listing it. The other splits have its
                order of classes, which the loader of `train` saves as `classes.json` in the config's `run_dir`.
            plugins: modules that factories in the config may come from.
            trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
            changes: arguments of the loader that replace those of the config.

        Raises:
            ConfigError: the config has no such split, or its parts do not fit together.
            DataError, TeacherError: the data or the teacher is not what the config says.
        """
        data, settings = config.data, config.data.split(split)
        is_training = split == "train"
        arguments: dict[str, Any] = {
            "mix": settings.mix,
            "batch_size": data.batch_size,
            "seed": config.seed,
            "shuffle": is_training if settings.shuffle is None else settings.shuffle,
            "last_batch": settings.last_batch or ("drop" if is_training else None),
            "repeats": settings.repeats,
            "run_dir": config.run_dir,
            **data.model_dump(include={*LoaderSettings.model_fields}),
            **changes,
        }
        if training is None and data.train is not None:
            training = open_source(data.train.source, plugins=plugins)
        if is_training:
            assert training is not None  # data.split found it
            source = training
        else:
            classes = None if training is None else training.classes
            source = open_source(settings.source, classes=classes, plugins=plugins)
        if is_training and arguments["run_dir"] is not None and source.classes is not None:
            save_classes(argument_path(arguments["run_dir"]) / "classes.json", source.classes)
        owned = None
        if isinstance(teacher, str):
            if is_training and config.teacher is not None:
                owned = open_config_teacher(
                    config,
                    source.classes,
                    batch_size=arguments["batch_size"],
                    device=arguments["device"],
                    plugins=plugins,
                    trust_engines=trust_engines,
                    source=source,
                )
            teacher = owned
        try:
            loader = cls(source, settings.transform, teacher, shard=shard, **arguments)
        except BaseException:
            if owned is not None:
                owned.close()
            raise
        loader._owns_teacher = owned is not None
        return loader

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
    def labels_are_soft(self) -> bool:
        """Whether labels are weights `[N, K]`, as those of mixed images are."""
        return self.mix is not None

    def sample_name(self, index: int) -> str:
        """The name in messages of the sample at `index` of the dataset."""
        return self.source.name(index)

    def example(self) -> dict[str, Tensor]:
        """Inputs of two rows by name, for a trial run of a network: images of zeros in float32, on the CPU."""
        return {"images": torch.zeros(2, 3, self.transform.size, self.transform.size)}

    @property
    def dataset(self) -> NoReturn:
        """What `accelerator.skip_first_batches` looks for in a torch loader; raises what to do instead."""
        raise NotATorchLoaderError("dataset")

    __reduce_ex__ = refuse_copy

    @property
    def decode(self) -> DecodeMode:
        """How files are decoded: the setting, or the choice of `auto`."""
        return self._graph_settings.decode

    @property
    def stream_fingerprint(self) -> dict[str, Any]:
        """Everything that the image at a position of an epoch depends on, but not teacher, batch size and ranks."""
        fields = self._fingerprint()
        for name in ("teacher", "global_batch_size", "last_batch"):
            del fields[name]
        return {**fields, "cut_of_mixed_batch": cut_of_mixed_batch(self._plan, self.mix)}

    @property
    def epoch(self) -> int:
        """The epoch of the current loop or, after it has ended, of the next one."""
        return self._position.epoch

    @property
    def num_returned(self) -> int:
        """Batches of `epoch` that were returned, those before the loaded position included."""
        return self._position.num_returned

    @property
    def batch_sampler(self) -> BatchSampler:
        """Lightning calls `set_epoch` on its sampler; it does not load our state when it resumes after an epoch."""
        return BatchSampler(self._position)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`, and end the current one.

        It is run from its start; but if it was loaded or begun within, from there.
        """
        self._position.set_epoch(epoch)

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
        batch = pending.cloned()
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
        epoch, batch = self._position.here
        if self._position.left is not None and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "the loop of epoch %d was left after %d of %d batches, which ends the epoch: the saved position is the "
                "start of epoch %d. To resume within an epoch, call state_dict() before leaving the loop",
                *self._position.left,
                len(self._plan),
                epoch,
            )
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
        check_fingerprint(fingerprint, self._fingerprint(), allow=allow, might_grow=might_grow)
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
        self._reader.close()
        self._sync.close()
        if self._owns_teacher and self.teacher is not None:
            self.teacher.close()
        self._uniform.report(wait=True)  # last, as it raises if the GPU has failed

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
        for number in range(first, len(self._plan)):
            while failure is None and len(ahead) <= self._num_ahead and number + len(ahead) < len(self._plan):
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

    def _new_reader(self) -> Reader:
        settings = self._graph_settings, self._settings
        return Reader(self.source, self.transform, self._plan, *settings, self.mix, self._record)

    def _adopt_shard(self) -> None:
        """Plan again if this process turns out to be one of several."""
        if self._is_closed or not self._own_shard.update():
            return
        bad_samples = self._reader.bad_samples.indices
        self._reader.close()
        self._peeked = None
        self._plan = self._new_plan()
        self._reader = self._new_reader()
        self._reader.bad_samples.restore(bad_samples)
        self._position.num_batches = len(self._plan)
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

        def open_reader(plan: Plan) -> Reader:
            graph_settings = replace(self._graph_settings, prefetch=1)
            return Reader(self.source, self.transform, plan, graph_settings, self._settings, self.mix)

        check_pixels(
            recording, self._plan, self.mix, open_reader=open_reader, sync=self._sync, name_of=self.source.name
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that the stream of batches depends on; not threads, `prefetch` and `ahead`.

        Fields of later releases are None if unused, as in the state of an older release, which lacks them.
        """
        self._adopt_shard()
        depends_on_decoder = self.device.type == "cuda" and self.source.stores == "files"
        return {
            "source": self.source.fingerprint,
            "num_samples": len(self.source),
            "transform": _transform_fields(self.transform),
            "mix": None if self.mix is None else self.mix.model_dump(mode="json"),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "seed": self._plan.seed,
            "shuffle": self._plan.shuffle,
            "global_batch_size": self._plan.global_batch_size,
            # Not the plan's: the default pads on several ranks, with the same samples as `keep` has on one.
            "last_batch": self._last_batch or "keep",
            "repeats": self._plan.repeats if self._plan.repeats > 1 else None,
            "on_bad_sample": self._settings.on_bad_sample,
            "max_pixels": self._settings.max_pixels,
            "device": self.device.type,
            # Both modes give the same pixels on a CPU; a GPU's decoder may round windows and whole images differently.
            "decode": self.decode if depends_on_decoder else None,
            "hw_decoder_load": self._graph_settings.hw_decoder_load or None,
            "dali": require("nvidia.dali", extra="cpu").__version__,
        }

    def _check_usable(self) -> None:
        if self._is_closed:
            raise StateError("the loader is closed; make a new one")
        self._process.check()


def open_config_teacher(
    config: "Config",
    classes: Sequence[str] | None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    split: str = "train",
    source: Source | None = None,
    student_precision: StudentPrecision | None = None,
) -> Teacher | Recording:
    """Open the teacher of `config` for the images of a split.

    Args:
        config: with the split and `teacher`.
        classes: those of the data, whose order the logits get. Logits that the loss does not use and that do not match
            them are left out.
        batch_size: images in a call; defaults to the config's.
        device: of the images; defaults to the config's.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        split: whose transform makes the images.
        source: the open source of the split, to save the time of listing it, and to know how many images there are.
        student_precision: in which the student trains, if the teacher is to follow it.

    Raises:
        ConfigError: the config has no teacher that can be opened.
        TeacherError: the teacher is not what the config says, or has different classes.
    """
    if config.teacher is None:
        raise ConfigError("there is no teacher to open: set teacher")
    if is_recording(config.teacher):
        recording = open_recording(config.teacher)
        recording.check_classes(classes)
        return recording
    settings = config.data.split(split)
    transform = settings.transform
    batch_size = batch_size or config.data.batch_size
    training = source if split == "train" else None
    teacher = open_teacher(
        config.teacher,
        image_shape=(3, transform.size, transform.size),
        device=resolve_device(device or config.data.device),
        dtype=getattr(torch, transform.dtype),
        batch_size=batch_size,
        student_precision=student_precision,
        num_images=None if source is None else _num_images(config, split, source, batch_size),
        calibration_images=lambda: sample_images(config, split, training=training, plugins=plugins),
        calibration_key=None if source is None else _images_key(config, split, source),
        plugins=plugins,
        trust_engines=trust_engines,
        normalization=Normalization(transform.mean, transform.std),
        strict=config.probe is not None and config.probe.strict,
    )
    try:
        return match_classes(teacher, classes, used=config.used_outputs(teacher.outputs))
    except BaseException:
        teacher.close()
        raise


def sample_images(
    config: "Config",
    split: str = "train",
    *,
    num_images: int = 64,
    training: Source | None = None,
    plugins: Collection[str] = (),
) -> Tensor:
    """The first images of a split as the teacher sees them, but unmixed: `[num_images, 3, H, W]` float32 on the CPU.

    There are fewer if the split has fewer. They depend on seed and dataset only. `training` is the open source of the
    split `train`, to save the time of listing it, and `plugins` are the modules that sources may come from.

    Raises:
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    batch_size = min(config.data.batch_size, num_images)  # reads no more than needed
    images: list[Tensor] = []
    with KDDataLoader.from_config(
        config,
        split,
        teacher=None,
        shard=Shard(),
        training=training,
        plugins=plugins,
        batch_size=batch_size,
        **EACH_IMAGE_ONCE,
    ) as loader:
        for batch in loader:
            images.append(batch.images[batch.valid].float().cpu())
            if sum(map(len, images)) >= num_images:
                break
    return torch.cat(images)[:num_images]


def _num_images(config: "Config", split: str, source: Source, batch_size: int) -> int:
    """How many images of the split a teacher will get: in a whole training, or in one pass."""
    num_images = len(source) * config.data.split(split).repeats
    if split != "train":
        return num_images
    limit = config.train.limit_train_batches
    return config.train.epochs * (num_images if limit is None else min(num_images, limit * batch_size))


def _images_key(config: "Config", split: str, source: Source) -> str:
    """Digest of what `sample_images` depends on."""
    settings = config.data.split(split)
    facts = (source.fingerprint, _transform_fields(settings.transform), config.seed, settings.shuffle, split == "train")
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _transform_fields(transform: TrainTransform | EvalTransform) -> dict[str, Any]:
    fields = transform.model_dump(mode="json")
    return fields | {"orientation": None if transform.orientation == "upright" else transform.orientation}


def _check_teacher(teacher: Teacher, loader: KDDataLoader) -> None:
    """Refuse now what would fail, or be silently wrong, at the first batch."""
    size = loader.transform.size
    teacher.check_fits((loader.batch_size, 3, size, size), getattr(torch, loader.transform.dtype), loader.device)
    ours = loader.classes
    for name, theirs in teacher.logits.items():
        if ours is not None and theirs is not None and ours != theirs:
            ours_here, theirs_here = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
            raise TeacherError(
                f"the teacher's {len(theirs)} classes are not the data's {len(ours)} in the same order: where the data "
                f"has {ours_here!r} the teacher has {theirs_here!r} ({name}); give the source the teacher's order as "
                "`classes`"
            )
