"""`KDDataLoader`: run the graph, teach ahead, hand over, remember the position."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.bad_samples import BadSamplePolicy
from kd_pipeline.data.dali import DecodeWay, GraphSettings
from kd_pipeline.data.decode import Decode, resolve_decode
from kd_pipeline.data.mixing import MixSettings, mix_images, mix_labels
from kd_pipeline.data.plan import LastBatch, Plan, Shard
from kd_pipeline.data.reader import INDEX, LABEL, MIXING, VALID, Read, Reader
from kd_pipeline.data.settings import SPLITS, DataSettings, Untaught
from kd_pipeline.data.sources.base import Source, open_source, save_classes
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader.state import check_fingerprint, check_position, read_position
from kd_pipeline.loader.streams import open_lane
from kd_pipeline.loader.verify_recording import check_pixels, check_stream, cut_of_mixed_batch
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import matched
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings

__all__ = ["KDDataLoader", "LoaderConfig", "resolve_device", "sample_images"]

_STATE_VERSION = 1


class LoaderConfig(Protocol):
    """What `from_config` reads of a config; `kd_pipeline.config.config.Config` has it."""

    @property
    def seed(self) -> int:
        """Order and views follow from it."""

    @property
    def run_dir(self) -> Path | None:
        """Where the run writes."""

    @property
    def data(self) -> DataSettings:
        """The splits, and how they are read."""

    @property
    def teacher(self) -> TeacherSettings | EnsembleSettings | None:
        """What answers in training."""


@dataclass(frozen=True, slots=True)
class _Taught:
    """A batch that the teacher has answered, or on a GPU will have answered at its mark."""

    batch: KDBatch
    buffer: object
    """DALI's own handle of the images."""
    torch_owned: list[Tensor]
    """The batch's tensors whose memory torch allocated: everything but the images, and these too where mixed."""
    mark: Any
    """Where the teacher's stream must have come to."""


class KDDataLoader:
    """Iterates batches of images, labels and teacher outputs; one `for` loop is one epoch.

        with KDDataLoader(source, TrainTransform(size=224), teacher, batch_size=256) as loader:
            for epoch in range(loader.epoch, num_epochs):
                for batch in loader:
                    ...

    Order and views depend on seed, epoch and dataset only. `state_dict()` describes the position behind the batch
    last handed out; a new loader that loads it continues with the very next one. After the last batch of an epoch
    that is the first batch of the next epoch. A loop that is left early is not taken up again: the next one runs the
    next epoch.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform | EvalTransform,
        teacher: Teacher | None = None,
        *,
        mix: MixSettings | None = None,
        # Which samples, in what order
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        shard: Shard | None = None,
        last_batch: LastBatch = "keep",
        repeats: int = 1,
        # Where and how fast
        device: torch.device | str = "auto",
        num_threads: int | None = None,
        prefetch: int = 2,
        ahead: int = 1,
        decode: Decode = "auto",
        hw_decoder_load: float = 0.0,
        # What to do about unreadable samples
        on_bad_sample: Literal["raise", "substitute"] = "raise",
        max_bad_fraction: float = 0.001,
        max_pixels: int = 89_478_485,
        run_dir: Path | str | None = None,
    ) -> None:
        """Plan the stream; DALI starts with the first batch.

        Args:
            source: which samples there are.
            transform: what is done to an image.
            teacher: answers for every batch, or None; the loader does not close it.
            mix: how images of a batch are mixed before the teacher sees them, or None; makes the labels float weights.
            batch_size: images in a batch of this process; a multiple of `2 * repeats` where images are mixed.
            seed: 0 to 2**64 - 1; equal on all ranks.
            shuffle: a new order every epoch, or the dataset's own.
            shard: this process among those that share the epoch; by default what `torch.distributed` says, where it
                is initialized, or else what `torchrun` has said, or else the only one.
            last_batch: see `LastBatch`.
            repeats: how often in a row an epoch shows a sample; see `Plan`.
            device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
            num_threads: CPU threads for DALI; by default the cores this process may use.
            prefetch: batches, or groups of small ones, in DALI's queue; with 1 nothing is decoded ahead.
            ahead: batches for which the teacher has been started ahead of the one handed out.
            decode: "window" decodes only the crop's window of a file, "full" the whole image, which is cut
                afterward; "auto" is "window" on a CPU, and on a GPU what a short trial finds to work there.
            hw_decoder_load: share of a batch's JPEG images for a GPU's hardware decoder; with any but 0, the last bits
                of an image depend on the batch that it is in.
            on_bad_sample: "raise", or "substitute" the next readable sample with `valid=False`.
            max_bad_fraction: part of the dataset that may be substituted.
            max_pixels: larger images count as unreadable and are never decoded.
            run_dir: gets `bad_samples.jsonl`; no file is written without it.

        Raises:
            ConfigError: a value is out of range, or the GPU decodes pictures in neither way.
            DataError: there is not one batch.
            TeacherError: the teacher takes other images, or knows other classes.
            StateError: a recorded teacher has answered for other images.
        """
        _check_range("prefetch", prefetch, 1)
        _check_range("ahead", ahead, 0)
        _check_range("num_threads", 1 if num_threads is None else num_threads, 1)
        _check_range("max_pixels", max_pixels, 1)
        _check_range("max_bad_fraction", max_bad_fraction, 0, 1)
        _check_range("hw_decoder_load", hw_decoder_load, 0, 1)
        _check_choice("on_bad_sample", on_bad_sample, ("raise", "substitute"))
        _check_choice("decode", decode, ("auto", "window", "full"))
        self.source, self.transform, self.teacher, self.mix = source, transform, teacher, mix
        self.device = resolve_device(device)
        self._ahead = ahead
        self._plan = Plan(
            num_samples=len(source),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            shard=shard or _current_shard(),
            last_batch=last_batch,
            repeats=repeats,
        )
        if mix is not None and batch_size % (2 * repeats):
            raise ConfigError(
                f"batch_size must be a multiple of {2 * repeats} where images are mixed and repeats is {repeats}, so "
                f"that partners are in one batch, got {batch_size}"
            )
        if not len(self._plan):
            raise DataError(
                f"{len(source)} samples make no whole batch of {batch_size} on {self.shard.world_size} rank(s), and "
                "last_batch is 'drop'; lower batch_size, or set last_batch to 'keep' or 'pad'"
            )
        if teacher is not None:
            _check_teacher(teacher, self)
        self._policy = BadSamplePolicy(
            on_bad_sample=on_bad_sample,
            max_bad_fraction=max_bad_fraction,
            max_pixels=max_pixels,
            record=None if run_dir is None else Path(run_dir) / "bad_samples.jsonl",
        )
        self._settings = GraphSettings(
            max_batch=batch_size,
            device_id=self.device.index,
            num_threads=num_threads or num_cores(),
            prefetch=prefetch,
            max_pixels=max_pixels,
            decode=resolve_decode(
                decode if source.stores == "files" else "window",
                device_id=self.device.index,
                hw_decoder_load=hw_decoder_load,
            ),
            hw_decoder_load=hw_decoder_load,
        )
        self._reader = Reader(source, transform, self._plan, self._settings, self._policy, mix)
        self._lane = open_lane(self.device, ahead=ahead)
        self._owns_teacher = False
        self._is_closed = False
        if isinstance(teacher, RecordedTeacher):
            self._check_recording(teacher)

        self._epoch, self._batch = 0, 0
        self._is_fresh = True
        """Whether nothing was handed out since the position was set, so that a loop begins right there."""
        self._loop = 0
        """Number of the loop that may hand out batches; an older one has lost its place."""

    @classmethod
    def from_config(
        cls,
        config: LoaderConfig,
        split: str = "train",
        *,
        shard: Shard | None = None,
        teacher: Teacher | None = None,
        training: Source | None = None,
    ) -> Self:
        """The loader that `config` describes for one of its splits: `train`, `val`, `test`, or a name under `more`.

        The teacher of the config is opened for the split `train`, brought to the data's order of classes, and closed
        with the loader; `teacher`, if given, answers instead, for any split, and stays open. The other splits take the
        class order of `train`, which is also saved as `classes.json` in the config's `run_dir`.

        Args:
            config: the whole of it.
            split: which of its splits.
            shard: as for a loader.
            teacher: what answers instead of the config's.
            training: the source of the split `train`, where it is open already; listing a large one takes its time.

        Raises:
            ConfigError: the config has no such split, or its parts do not fit together.
            DataError, TeacherError: the data or the teacher is not what the config says.
        """
        data = config.data
        settings = data.split(split)
        is_training = split == "train"
        if training is None and data.train is not None:
            training = open_source(data.train.source)
        if is_training:
            assert training is not None  # as data.split has seen
            source = training
        else:
            source = open_source(settings.source, classes=None if training is None else training.classes)
        if is_training and config.run_dir is not None and source.classes is not None:
            save_classes(config.run_dir / "classes.json", source.classes)
        opened = None
        if is_training and teacher is None and config.teacher is not None:
            size = settings.transform.size
            dtype = getattr(torch, settings.transform.dtype)
            opened = open_teacher(
                config.teacher,
                image_shape=(3, size, size),
                device=resolve_device(data.device),
                dtype=dtype,
                batch_size=data.batch_size,
                samples=lambda: sample_images(config),
                normalization=Normalization(settings.transform.mean, settings.transform.std),
            )
        try:
            if opened is not None:
                opened = matched(opened, source.classes)
            loader = cls(
                source,
                settings.transform,
                teacher or opened,
                mix=settings.mix,
                seed=config.seed,
                shuffle=is_training if settings.shuffle is None else settings.shuffle,
                shard=shard,
                last_batch=settings.last_batch or ("drop" if is_training else "keep"),
                repeats=settings.repeats,
                run_dir=config.run_dir,
                **data.model_dump(exclude={*SPLITS, "more"}),
            )
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        loader._owns_teacher = opened is not None
        return loader

    def __len__(self) -> int:
        """Number of batches in an epoch, equal on every rank and in every epoch."""
        return len(self._plan)

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process."""
        return self._plan.batch_size

    @property
    def shard(self) -> Shard:
        """This process among those that share an epoch."""
        return self._plan.shard

    @property
    def plan(self) -> Plan:
        """Which sample comes when."""
        return self._plan

    @property
    def decode(self) -> DecodeWay:
        """How files are decoded: the setting, or what `auto` has turned out to be."""
        return self._settings.decode

    @property
    def stream_fingerprint(self) -> dict[str, Any]:
        """Everything that the image at a place of an epoch depends on: not the teacher, nor batch size and ranks."""
        fields = self._fingerprint()
        for name in ("teacher", "global_batch_size", "last_batch"):
            del fields[name]
        return {**fields, "cut_of_mixed_batch": cut_of_mixed_batch(self._plan, self.mix)}

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in label order, where the source knows them."""
        return self.source.classes

    @property
    def epoch(self) -> int:
        """The epoch that is running or, at its end, that the next `for` loop will run."""
        return self._epoch

    @property
    def batch_sampler(self) -> "_EpochSetter":
        """Where Lightning looks for `set_epoch`; it does not load our state when it resumes at the end of an epoch."""
        return _EpochSetter(self)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run `epoch`, from its start unless the loader stands within it already."""
        if self._normalized(self._epoch, self._batch)[0] != epoch:
            self._stand_before(epoch, 0)
            self._loop += 1

    @property
    def bad_samples(self) -> list[int]:
        """Positions of the samples that turned out to be unreadable so far."""
        return self._reader.bad_samples.known

    def __iter__(self) -> Iterator[KDBatch]:
        """The rest of the epoch at which the loader stands; a whole new one after a loop that was left early."""
        self._check_open()
        return self._iterate()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the batch last handed out: plain numbers, strings, lists and dicts."""
        epoch, batch = self._normalized(self._epoch, self._batch)
        return {
            "version": _STATE_VERSION,
            "epoch": epoch,
            "batch": batch,
            "bad_samples": self._reader.bad_samples.known,
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        """Continue behind the batch that was handed out last when `state` was taken.

        Args:
            state: what `state_dict()` of a loader of the same data, transform, teacher and global batch returned,
                on any rank.
            allow: names of fingerprint fields that may differ.

        Raises:
            StateError: the state is none, or was taken from a loader with another stream; names each field that
                differs, old → new.
        """
        self._check_open()
        epoch, batch, bad_samples, fingerprint = read_position(state, version=_STATE_VERSION)
        check_fingerprint(fingerprint, self._fingerprint(), allow=allow)
        check_position(epoch, batch, bad_samples, num_batches=len(self), num_samples=len(self.source))
        self._reader.stop()
        self._reader.bad_samples.learn(bad_samples)
        self._stand_before(epoch, batch)
        self._loop += 1

    def close(self) -> None:
        """Stop DALI, drop everything that was read ahead, close the config's teacher; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._loop += 1
            self._reader.close()
            self._lane.close()
            if self._owns_teacher and self.teacher is not None:
                self.teacher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _iterate(self) -> Iterator[KDBatch]:
        self._check_open()  # again, as this runs at the first `next`
        if not self._is_fresh:
            self._stand_before(self._epoch + 1, 0)
        self._loop += 1
        loop = self._loop
        ahead: deque[_Taught] = deque()
        failure: Exception | None = None
        for number in range(self._batch, len(self)):
            while failure is None and len(ahead) <= self._ahead and number + len(ahead) < len(self):
                try:
                    ahead.append(self._teach(number + len(ahead)))
                except Exception as exc:
                    failure = exc  # its turn comes when the good batches before it have been handed out
            if failure is not None and not ahead:
                raise failure
            taught = ahead.popleft()
            self._lane.hand_over(taught.mark, taught.torch_owned)
            self._batch = number + 1
            self._is_fresh = False
            try:
                yield taught.batch
            finally:
                self._lane.take_back(taught.buffer)
            if loop != self._loop:
                raise StateError(
                    "this loop has lost its place: the loader was closed, was moved by load_state_dict, or is in "
                    "another loop; run one loop at a time"
                )
        self._stand_before(self._epoch + 1, 0)

    def _stand_before(self, epoch: int, batch: int) -> None:
        """Let the next loop begin with `batch` of `epoch`; behind the last batch is before the next epoch."""
        self._epoch, self._batch = self._normalized(epoch, batch)
        self._is_fresh = True

    def _normalized(self, epoch: int, batch: int) -> tuple[int, int]:
        return (epoch, batch) if batch < len(self) else (epoch + 1, 0)

    def _teach(self, number: int) -> _Taught:
        """Take a batch of this epoch from DALI and start the teacher on it."""
        read = self._reader.read(self._epoch, number, self._lane.stream)
        with self._lane.teaching():
            pixels, facts = self._lane.view(read.images)[read.rows], self._lane.upload(read.facts)
            labels = None if self.source.labels is None else facts[LABEL]
            if self.mix is not None:
                pixels, labels = self._mixed(self.mix, pixels, labels, facts[MIXING].T)
            batch = KDBatch(
                images=pixels,
                labels=labels,
                index=facts[INDEX],
                valid=facts[VALID].bool(),
                teacher=self._answers(pixels, read),
            )
            owned = [batch.index, batch.valid, *batch.teacher.values(), *([] if labels is None else [labels])]
            if self.mix is not None:
                owned.append(pixels)
            return _Taught(batch, read.images, owned, self._lane.taught())

    def _answers(self, images: Tensor, read: Read) -> Mapping[str, Tensor]:
        """The teacher's outputs for a batch of this epoch."""
        match self.teacher:
            case None:
                return {}
            case RecordedTeacher() as recorded:
                return recorded.replay(self._epoch, read.plan.place, read.facts[INDEX])
            case teacher:
                return teacher(images)

    def _check_recording(self, recorded: RecordedTeacher) -> None:
        """Refuse at once a recording of other images."""
        check_stream(recorded, self.stream_fingerprint)
        check_pixels(
            recorded,
            self.source,
            self.transform,
            self._plan,
            self.mix,
            settings=self._settings,
            policy=self._policy,
            lane=self._lane,
        )

    def _mixed(
        self, mix: MixSettings, images: Tensor, labels: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Images in a tensor of torch's own, and labels as weights; the teacher's stream is the current one."""
        num_classes, size = self.source.num_classes, self.transform.size
        if labels is not None and num_classes is not None:
            smoothing = mix.label_smoothing
            labels = mix_labels(labels, columns, num_classes=num_classes, label_smoothing=smoothing, size=size)
        return mix_images(images, columns), labels

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that the stream of batches depends on; threads, prefetch and `ahead` are not among it.

        What came with a later release is None where it is not used, which is what an older state says of it.
        """
        depends_on_decoder = self.device.type == "cuda" and self.source.stores == "files"
        return {
            "source": self.source.fingerprint,
            "num_samples": len(self.source),
            "transform": self.transform.model_dump(mode="json"),
            "mix": None if self.mix is None else self.mix.model_dump(mode="json"),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "seed": self._plan.seed,
            "shuffle": self._plan.shuffle,
            "global_batch_size": self._plan.global_batch_size,
            "last_batch": self._plan.last_batch,
            "repeats": self._plan.repeats if self._plan.repeats > 1 else None,
            "on_bad_sample": self._policy.on_bad_sample,
            "max_pixels": self._policy.max_pixels,
            "device": self.device.type,
            # On a CPU both ways give the same pixels; a GPU's decoder may round windows and whole images differently.
            "decode": self._settings.decode if depends_on_decoder else None,
            "hw_decoder_load": self._settings.hw_decoder_load or None,
            "dali": require("nvidia.dali", extra="cpu").__version__,
        }

    def _check_open(self) -> None:
        if self._is_closed:
            raise StateError("the loader is closed; make a new one")


def sample_images(config: LoaderConfig, split: str = "train", *, num_images: int = 64) -> Tensor:
    """The first images of a split as the teacher gets them, but not mixed: `[num_images, 3, H, W]` float32 on the CPU.

    There are fewer where the split has fewer. They depend on seed and dataset alone, whoever asks.

    Raises:
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    # No batch is larger than what is asked for, however large the run's are.
    data = config.data.model_copy(update={"batch_size": min(config.data.batch_size, num_images)})
    untaught = Untaught.of(config.seed, data, split)
    images: list[Tensor] = []
    with KDDataLoader.from_config(untaught, split, shard=Shard()) as loader:
        for batch in loader:
            images.append(batch.images[batch.valid].float().cpu())
            if sum(map(len, images)) >= num_images:
                break
    return torch.cat(images)[:num_images]


@dataclass(frozen=True, slots=True)
class _EpochSetter:
    """Something that has a `sampler` with `set_epoch`, as PyTorch's batch samplers have."""

    sampler: KDDataLoader


def _current_shard() -> Shard:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Shard(distributed.get_rank(), distributed.get_world_size())
    # Processes of torchrun's that have not met yet, as where a loader is made before `Accelerator()` or a `Trainer`.
    return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _check_range(name: str, number: float, least: float, most: float = math.inf) -> None:
    if not least <= number <= most:
        limits = f"at least {least}" if most == math.inf else f"in {least}..{most}"
        raise ConfigError(f"{name} must be {limits}, got {number}")


def _check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, got {choice!r}")


def _check_teacher(teacher: Teacher, loader: KDDataLoader) -> None:
    """Refuse at once what would fail, or be silently wrong, at the first batch."""
    size = loader.transform.size
    teacher.check_fits((loader.batch_size, 3, size, size), getattr(torch, loader.transform.dtype), loader.device)
    ours, theirs = loader.classes, teacher.classes
    if ours is not None and theirs is not None and ours != theirs:
        differing = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
        raise TeacherError(
            f"the teacher's {len(theirs)} classes are not the data's {len(ours)} in the same order: where the data has "
            f"{differing[0]!r} the teacher has {differing[1]!r}; give the source the teacher's order as `classes`"
        )
