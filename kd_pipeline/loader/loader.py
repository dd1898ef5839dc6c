"""`KDDataLoader`: runs DALI's graph and the teacher ahead of the consumer, and keeps the position of a run."""

import logging
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.bad_samples import BadSample
from kd_pipeline.data.dali import DecodeMode, GraphSettings
from kd_pipeline.data.decode import resolve_decode
from kd_pipeline.data.mixing import MixSettings, mix_images, mix_labels
from kd_pipeline.data.plan import LastBatch, Plan, Shard
from kd_pipeline.data.reader import INDEX, LABEL, MIXING, VALID, ReadBatch, Reader
from kd_pipeline.data.settings import LoaderOptions, LoaderSettings
from kd_pipeline.data.sources import Source, open_source, save_classes
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.uniform import UniformCounter
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader.state import check_fingerprint, check_position, read_position
from kd_pipeline.loader.streams import open_stream_sync
from kd_pipeline.loader.verify_recording import check_pixels, check_stream, cut_of_mixed_batch
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording, open_recording
from kd_pipeline.teachers.settings import is_recording

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["EACH_IMAGE_ONCE", "KDDataLoader", "LoaderArguments", "open_config_teacher", "sample_images"]

_STATE_VERSION = 1
_MANY_UNIFORM = 0.01
"""Share of an epoch's images above which those of a single color are reported."""

_logger = logging.getLogger("kd_pipeline")


class LoaderArguments(LoaderOptions, total=False):
    """The arguments of `KDDataLoader` that a config has, which `from_config` can change."""

    mix: MixSettings | None
    batch_size: int
    seed: int
    shuffle: bool
    last_batch: LastBatch
    repeats: int
    run_dir: Path | str | None


EACH_IMAGE_ONCE: dict[str, Any] = {"mix": None, "repeats": 1, "last_batch": "keep", "run_dir": None}
"""Arguments of `from_config` for every image of a split once, unmixed, without writing into the run's folder."""


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    """A batch whose teacher outputs are complete, or on a GPU will be at its event."""

    batch: KDBatch
    buffer: object
    """DALI's handle of the images."""
    torch_owned: list[Tensor]
    """The tensors whose memory torch allocated: all but the images, and these too if mixed."""
    event: Any


class KDDataLoader:
    """Iterates over batches of images, labels and teacher outputs; one `for` loop is one epoch.

        with KDDataLoader(source, TrainTransform(size=224), teacher, batch_size=256) as loader:
            for epoch in range(loader.epoch, num_epochs):
                for batch in loader:
                    ...

    Order and views depend on seed, epoch and dataset only. `state_dict()` is the position after the last batch that was
    returned; a new loader that loads it continues with the next batch, which after the last batch of an epoch is the
    first of the next epoch. A loop that was left early is not continued: the next loop runs the next epoch.
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
        last_batch: LastBatch = "keep",
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
            shard: this process among those that share an epoch; defaults to its rank in `torch.distributed` if that is
                initialized, else to that of `torchrun`, else to a single process.
            last_batch: see `LastBatch`.
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
        self.batch_size, self.shard = batch_size, shard or _current_shard()
        self.classes = source.classes
        """Class names in label order; None if the source has none."""
        self.plan = Plan(
            num_samples=len(source),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            shard=self.shard,
            last_batch=last_batch,
            repeats=repeats,
        )
        """The order of the samples."""
        self._settings = settings
        if mix is not None and batch_size % (2 * repeats):
            raise ConfigError(
                f"batch_size must be a multiple of {2 * repeats} when images are mixed and repeats is {repeats}, to "
                f"keep partners in one batch, got {batch_size}"
            )
        if not len(self.plan):
            raise DataError(
                f"{len(source)} samples do not fill a batch of {batch_size} on {self.shard.world_size} rank(s), and "
                "last_batch is 'drop'; lower batch_size, or set last_batch to 'keep' or 'pad'"
            )
        self._graph_settings = GraphSettings(
            max_batch=batch_size,
            device_id=self.device.index,
            num_threads=settings.num_threads or num_cores(),
            prefetch=settings.prefetch,
            max_pixels=settings.max_pixels,
            decode=resolve_decode(
                settings.decode if source.stores == "files" else "window",
                device_id=self.device.index,
                hw_decoder_load=settings.hw_decoder_load,
            ),
            hw_decoder_load=settings.hw_decoder_load,
            orientation=transform.orientation,
        )
        record = None if run_dir is None else Path(run_dir) / "bad_samples.jsonl"
        self._reader = Reader(source, transform, self.plan, self._graph_settings, settings, mix, record)
        self._sync = open_stream_sync(self.device, ahead=settings.ahead)
        self._owns_teacher = False
        self._is_closed = False
        if isinstance(teacher, Recording):
            self._check_recording(teacher)
        elif teacher is not None:
            _check_teacher(teacher, self)

        self._uniform = UniformCounter()
        """Of the current loop."""
        self._has_warned = False
        """Whether many images of a single color were reported."""
        self._epoch, self._batch = 0, 0
        self._is_at_start = True
        """Whether no batch was returned since the position was set, so a loop starts at it."""
        self._loop = 0
        """Number of the loop that may return batches; an older one has lost its place."""

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
            plugins: modules that the factory of the config's teacher may come from.
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
            "last_batch": settings.last_batch or ("drop" if is_training else "keep"),
            "repeats": settings.repeats,
            "run_dir": config.run_dir,
            **data.model_dump(include={*LoaderSettings.model_fields}),
            **changes,
        }
        if training is None and data.train is not None:
            training = open_source(data.train.source)
        if is_training:
            assert training is not None  # data.split found it
            source = training
        else:
            source = open_source(settings.source, classes=None if training is None else training.classes)
        if is_training and arguments["run_dir"] is not None and source.classes is not None:
            save_classes(Path(arguments["run_dir"]) / "classes.json", source.classes)
        owned = None
        if isinstance(teacher, str):
            if is_training and config.teacher is not None:
                owned = open_config_teacher(
                    config,
                    source.classes,
                    batch_size=arguments["batch_size"],
                    device=arguments["device"],
                    plugins=plugins,
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
        """Number of batches in an epoch, equal on every rank and in every epoch."""
        return len(self.plan)

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
        return {**fields, "cut_of_mixed_batch": cut_of_mixed_batch(self.plan, self.mix)}

    @property
    def epoch(self) -> int:
        """The current epoch or, after its last batch, the epoch of the next `for` loop."""
        return self._epoch

    @property
    def batch_sampler(self) -> "_BatchSampler":
        """Lightning calls `set_epoch` on its sampler; it does not load our state when it resumes after an epoch."""
        return _BatchSampler(self)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`, from its start unless the loader is within it already."""
        if self._normalized(self._epoch, self._batch)[0] != epoch:
            self._move_to(epoch, 0)
            self._loop += 1

    @property
    def bad_samples(self) -> tuple[BadSample, ...]:
        """The unreadable samples that were substituted or were too many, by index in the dataset."""
        return self._reader.bad_samples.samples

    @property
    def num_uniform(self) -> int:
        """Images of the current loop, or of the last one, that had a single color after the transform; waits for a GPU.

        A decoder that fails in silence gives such images, and so does a crop of a plain background. Batches that were
        read ahead of the current one are included.
        """
        with self._sync.on_teacher_stream():
            return self._uniform.read()[0]

    def __iter__(self) -> Iterator[KDBatch]:
        """Yield the rest of the current epoch; the whole next epoch after a loop that was left early."""
        self._check_open()
        return self._iterate()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was returned: plain numbers, strings, lists and dicts."""
        epoch, batch = self._normalized(self._epoch, self._batch)
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
        """
        self._check_open()
        epoch, batch, bad_samples, fingerprint = read_position(state, version=_STATE_VERSION)
        check_fingerprint(fingerprint, self._fingerprint(), allow=allow)
        check_position(epoch, batch, bad_samples, num_batches=len(self), num_samples=len(self.source))
        self._reader.stop()
        self._reader.bad_samples.restore(bad_samples)
        self._move_to(epoch, batch)
        self._loop += 1

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """All pixels `[H, W, 3]` of the sample at `index` of the dataset, as they are before the transform.

        Raises:
            RuntimeError: its file cannot be read.
        """
        self._check_open()
        return self._reader.pixels(index)

    def close(self) -> None:
        """Stop DALI, drop all batches read ahead and close the config's teacher. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._loop += 1
            self._reader.close()
            self._sync.close()
            if self._owns_teacher and self.teacher is not None:
                self.teacher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _iterate(self) -> Iterator[KDBatch]:
        self._check_open()  # again, as this runs at the first `next`
        if not self._is_at_start:
            self._move_to(self._epoch + 1, 0)
        self._loop += 1
        loop = self._loop
        self._uniform = UniformCounter()
        ahead: deque[_PendingBatch] = deque()
        failure: Exception | None = None
        for number in range(self._batch, len(self)):
            while failure is None and len(ahead) <= self._settings.ahead and number + len(ahead) < len(self):
                try:
                    ahead.append(self._prepare(number + len(ahead)))
                except Exception as exc:
                    failure = exc  # raised after the good batches before it
            if failure is not None and not ahead:
                raise failure
            pending = ahead.popleft()
            self._sync.hand_over(pending.event, pending.torch_owned)
            self._batch = number + 1
            self._is_at_start = False
            try:
                yield pending.batch
            finally:
                self._sync.keep_until_used(pending.buffer)
            if loop != self._loop:
                raise StateError(
                    "this loop has lost its place: the loader was closed, was moved by load_state_dict, or is in "
                    "another loop; run one loop at a time"
                )
        self._report_uniform()
        self._move_to(self._epoch + 1, 0)

    def _report_uniform(self) -> None:
        """Warn about many images of a single color in this epoch, the first time."""
        if self._has_warned:
            return
        with self._sync.on_teacher_stream():
            num_uniform, num_images = self._uniform.read()
        if num_uniform > _MANY_UNIFORM * num_images:
            self._has_warned = True
            _logger.warning(
                "%d of %d images of epoch %d had a single color after the transform: crops of a plain background, or "
                "files that are decoded wrongly; kd-pipeline check names the files that have a single color as a whole",
                num_uniform,
                num_images,
                self._epoch + 1,
            )

    def _move_to(self, epoch: int, batch: int) -> None:
        """Let the next loop start with `batch` of `epoch`."""
        self._epoch, self._batch = self._normalized(epoch, batch)
        self._is_at_start = True

    def _normalized(self, epoch: int, batch: int) -> tuple[int, int]:
        """The same position, with the end of an epoch as the start of the next."""
        return (epoch, batch) if batch < len(self) else (epoch + 1, 0)

    def _prepare(self, number: int) -> _PendingBatch:
        """Take a batch of this epoch from DALI and start the teacher on it."""
        read = self._reader.read(self._epoch, number, self._sync.stream)
        with self._sync.on_teacher_stream():
            images, metadata = self._sync.as_tensor(read.images)[read.rows], self._sync.to_device(read.metadata)
            labels, valid = None if self.source.labels is None else metadata[LABEL], metadata[VALID].bool()
            self._uniform.add(images, valid)
            if self.mix is not None:
                images, labels = self._mixed(self.mix, images, labels, metadata[MIXING].T)
            batch = KDBatch(
                images=images,
                labels=labels,
                index=metadata[INDEX],
                valid=valid,
                teacher=self._teacher_outputs(images, read),
            )
            owned = [batch.index, batch.valid, *batch.teacher.values(), *([] if labels is None else [labels])]
            if self.mix is not None:
                owned.append(images)
            return _PendingBatch(batch, read.images, owned, self._sync.record_event())

    def _mixed(
        self, mix: MixSettings, images: Tensor, labels: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images in a new tensor, and labels as weights `[N, K]`."""
        num_classes, size = self.source.num_classes, self.transform.size
        if labels is not None and num_classes is not None:
            smoothing = mix.label_smoothing
            labels = mix_labels(labels, columns, num_classes=num_classes, label_smoothing=smoothing, size=size)
        return mix_images(images, columns), labels

    def _teacher_outputs(self, images: Tensor, read: ReadBatch) -> Mapping[str, Tensor]:
        match self.teacher:
            case None:
                return {}
            case Recording() as recording:
                return recording.replay(self._epoch, read.plan.position, read.metadata[INDEX], device=self.device)
            case teacher:
                return teacher(images)

    def _check_recording(self, recording: Recording) -> None:
        """Refuse a recording of different images now, rather than in the middle of an epoch."""
        recording.check_classes(self.classes)
        check_stream(recording, self.stream_fingerprint)

        def open_reader(plan: Plan) -> Reader:
            graph_settings = replace(self._graph_settings, prefetch=1)
            return Reader(self.source, self.transform, plan, graph_settings, self._settings, self.mix)

        check_pixels(recording, self.plan, self.mix, open_reader=open_reader, sync=self._sync, name_of=self.source.name)

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that the stream of batches depends on; not threads, `prefetch` and `ahead`.

        Fields of later releases are None if unused, as in the state of an older release, which lacks them.
        """
        depends_on_decoder = self.device.type == "cuda" and self.source.stores == "files"
        return {
            "source": self.source.fingerprint,
            "num_samples": len(self.source),
            "transform": _transform_fields(self.transform),
            "mix": None if self.mix is None else self.mix.model_dump(mode="json"),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "global_batch_size": self.plan.global_batch_size,
            "last_batch": self.plan.last_batch,
            "repeats": self.plan.repeats if self.plan.repeats > 1 else None,
            "on_bad_sample": self._settings.on_bad_sample,
            "max_pixels": self._settings.max_pixels,
            "device": self.device.type,
            # Both modes give the same pixels on a CPU; a GPU's decoder may round windows and whole images differently.
            "decode": self.decode if depends_on_decoder else None,
            "hw_decoder_load": self._settings.hw_decoder_load or None,
            "dali": require("nvidia.dali", extra="cpu").__version__,
        }

    def _check_open(self) -> None:
        if self._is_closed:
            raise StateError("the loader is closed; make a new one")


def open_config_teacher(
    config: "Config",
    classes: Sequence[str] | None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    plugins: Collection[str] = (),
    split: str = "train",
) -> Teacher | Recording:
    """Open the teacher of `config` for the images of a split.

    Args:
        config: with the split and `teacher`.
        classes: those of the data, whose order the logits get.
        batch_size: images in a call; defaults to the config's.
        device: of the images; defaults to the config's.
        plugins: modules that factories in the config may come from.
        split: whose transform makes the images.

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
    transform = config.data.split(split).transform
    teacher = open_teacher(
        config.teacher,
        image_shape=(3, transform.size, transform.size),
        device=resolve_device(device or config.data.device),
        dtype=getattr(torch, transform.dtype),
        batch_size=batch_size or config.data.batch_size,
        calibration_images=lambda: sample_images(config, split),
        plugins=plugins,
        normalization=Normalization(transform.mean, transform.std),
        strict=config.probe is not None and config.probe.strict,
    )
    try:
        return match_classes(teacher, classes)
    except BaseException:
        teacher.close()
        raise


def sample_images(config: "Config", split: str = "train", *, num_images: int = 64) -> Tensor:
    """The first images of a split as the teacher sees them, but unmixed: `[num_images, 3, H, W]` float32 on the CPU.

    There are fewer if the split has fewer. They depend on seed and dataset only.

    Raises:
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    batch_size = min(config.data.batch_size, num_images)  # reads no more than needed
    images: list[Tensor] = []
    with KDDataLoader.from_config(
        config, split, teacher=None, shard=Shard(), batch_size=batch_size, **EACH_IMAGE_ONCE
    ) as loader:
        for batch in loader:
            images.append(batch.images[batch.valid].float().cpu())
            if sum(map(len, images)) >= num_images:
                break
    return torch.cat(images)[:num_images]


@dataclass(frozen=True, slots=True)
class _BatchSampler:
    """Has a `sampler` with `set_epoch`, as PyTorch's batch samplers do."""

    sampler: KDDataLoader


def _transform_fields(transform: TrainTransform | EvalTransform) -> dict[str, Any]:
    fields = transform.model_dump(mode="json")
    return fields | {"orientation": None if transform.orientation == "upright" else transform.orientation}


def _current_shard() -> Shard:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Shard(distributed.get_rank(), distributed.get_world_size())
    # Processes of torchrun that are not connected yet, if a loader is made before `Accelerator()` or a `Trainer`.
    return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _check_teacher(teacher: Teacher, loader: KDDataLoader) -> None:
    """Refuse now what would fail, or be silently wrong, at the first batch."""
    size = loader.transform.size
    teacher.check_fits((loader.batch_size, 3, size, size), getattr(torch, loader.transform.dtype), loader.device)
    ours, theirs = loader.classes, teacher.classes
    if ours is not None and theirs is not None and ours != theirs:
        ours_here, theirs_here = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
        raise TeacherError(
            f"the teacher's {len(theirs)} classes are not the data's {len(ours)} in the same order: where the data has "
            f"{ours_here!r} the teacher has {theirs_here!r}; give the source the teacher's order as `classes`"
        )
