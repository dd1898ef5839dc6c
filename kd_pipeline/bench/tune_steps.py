"""Real steps of a run, timed under one choice of settings after the other, in one process."""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.files import open_regular
from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.measure import round_up, wait_until_idle
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.sources import Source, masks_of, open_source
from kd_pipeline.data.views import Views
from kd_pipeline.loader.config_teacher import sample_images
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.parity import CalibrationSet, ParityReference, check_parity, make_reference
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings, is_recording
from kd_pipeline.training.distributed import set_num_threads
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.trainer import PURE_PRECISIONS, build_trial_trainer, set_deterministic
from kd_pipeline.workflows.distill_module import build_module
from kd_pipeline.workflows.stage import Stage, network_of, normalization_of, num_classes_for, view_of
from kd_pipeline.workflows.teacher import open_run_teacher, starts_without_teacher

__all__ = ["Part", "RunSteps", "Runtime", "Trial", "Values", "with_values"]

Values = tuple[tuple[str, Any], ...]
"""Settings by their dotted keys, such as `data.num_threads`, that replace those of the config; sorted by key."""

Part = Literal["all", "no loader", "no teacher", "student"]
"""What is timed: the whole step; without loading, from batches in memory; without running the teacher, with outputs in
memory; or with both in memory."""

_NUM_IMAGES = 2048
"""Of a larger dataset so many images are used, or eight batches. They fit into the page cache, so no choice of settings
finds more of them there than another."""
_WARM_PAGES_S = 8.0
"""How long to read files before the first step at most."""
_NUM_RESIDENT = 4
"""Batches that are kept in memory."""
_WARM_UP_S = 1.0
"""A loader's queue gets into a steady state within so long; the queue of a slower step is full anyway."""
_LEARNING_RATE = 1e-12


class Trial(NamedTuple):
    """What is timed."""

    values: Values = ()
    part: Part = "all"


class Runtime(NamedTuple):
    """How a teacher runs; see `Teacher`."""

    backend: str
    precision: str
    fingerprint: str


class RunSteps(ExitStack):
    """The loaders, teachers and networks of a run, opened when a trial first asks for them.

    Nothing is written to the run's folder, and only initial weights are read. They stay as they are: the learning rate
    is next to nothing, so no choice of settings lets the loss diverge. Leaving the context closes everything.
    """

    def __init__(
        self, config: Config, stage: Stage, *, plugins: Collection[str] = (), trust_engines: Collection[str] = ()
    ) -> None:
        """Open the training images, and read some of their files.

        Raises:
            ConfigError, DataError: as a training would.
        """
        super().__init__()
        self._stage, self._plugins, self._trust_engines = stage, plugins, trust_engines
        set_num_threads(None)
        self.default_threads = torch.get_num_threads()
        """torch's threads where `train.num_threads` is not set."""
        source = open_source(config.data.split("train").source, plugins=plugins)
        self._all_images = source
        num_images = max(_NUM_IMAGES, 8 * config.data.batch_size)
        self.source: Source = source if is_recording(config.teacher) else _Subset(source, num_images)
        self.has_random_teacher = stage == "distill" and _lacks_weights(config)
        if self.has_random_teacher:
            config = self._with_random_weights(config)
        self._config = config.model_copy(update={"stage": stage})
        self._teachers: dict[Values, Teacher | Recording | None] = {}
        self._loaders: dict[tuple[Values, Values | None], _OpenLoader] = {}
        self._modules: dict[Values, _TimedModule] = {}
        self._resident: list[KDBatch] = []
        self._step_s: dict[Trial, float] = {}
        self._reference: ParityReference | None = None
        self.callback(self.keep, ())
        _warm_pages(self.source)

    def rate(self, trial: Trial, *, seconds: float) -> float:
        """Images per second in steps that take about so many seconds together, at least one; more come before them.

        Raises:
            KDPipelineError, RuntimeError: these settings do not work here.
        """
        step_s = self._step_s.get(trial)
        if step_s is None:  # the first step is slower: kernels are chosen, memory is allocated
            timed = self._run(trial, 1, 1)
            step_s = self._step_s[trial] = timed.step_s
            if step_s > seconds:
                return timed.images_per_s
        num_steps, num_warm_up = max(1, round(seconds / step_s)), 1
        if trial.part in ("all", "no teacher"):
            data = with_values(self._config, trial.values).data
            at_once = group_size(  # batches that become ready together
                data.batch_size,
                Views.of(data.split("train").transform, data.split("train").views).only(_shown_views(self._config)),
                num_threads=data.num_threads or num_cores(),
                on_gpu=resolve_device(data.device).type == "cuda",
            )
            if num_steps > at_once:
                num_steps = round_up(num_steps, at_once)
            num_queued = at_once * (data.prefetch + 1) + (data.ahead or 0)
            num_warm_up = min(num_queued, max(1, round(_WARM_UP_S / step_s)))
        timed = self._run(trial, num_steps, num_warm_up)
        self._step_s[trial] = timed.step_s
        return timed.images_per_s

    def keep(self, choices: Collection[Values]) -> None:
        """Close the loaders and teachers that none of these choices of settings needs."""
        loaders = {(_of("data", values), _of("teacher", values)) for values in choices}
        for key in [key for key in self._loaders if key not in loaders]:
            self._loaders.pop(key).loader.close()
        teachers = {_of("teacher", values) for values in choices}
        for values in [values for values in self._teachers if values not in teachers]:
            if (teacher := self._teachers.pop(values)) is not None:
                teacher.close()

    def runtime(self, values: Values) -> Runtime:
        """How the teacher runs under these settings.

        Raises:
            KDPipelineError: it cannot be opened.
        """
        teacher = self._live_teacher(values)
        return Runtime(teacher.backend, teacher.precision, teacher.fingerprint)

    def settings(self, values: Values) -> Config:
        """The config under these settings, with the teacher that is measured."""
        return with_values(self._config, values)

    @property
    def num_images(self) -> int:
        """Images of the whole training."""
        return len(self._all_images) * self._config.train.epochs

    def check_agreement(self, values: Values) -> None:
        """Compare the teacher under these settings with float32 on images of the run, as an engine is.

        Raises:
            EngineError: it is too far from float32.
            KDPipelineError: one of the two cannot be opened.
        """
        teacher = self._live_teacher(values)
        if self._reference is None:
            found = sample_images(self._config, training=self._all_images, view=teacher.view)
            images = CalibrationSet(found, "the training split")
            exact = self._live_teacher((("teacher.precision", "fp32"),))
            self._reference = make_reference(_from_cpu(exact), images)
        precision: Any = teacher.precision
        sizes = (min(self._config.data.batch_size, teacher.max_batch),)
        check_parity(self._reference, _from_cpu(teacher), batch_sizes=sizes, precision=precision)

    def _run(self, trial: Trial, num_steps: int, num_warm_up: int) -> "_Timed":
        """Take steps, and time the last `num_steps` of them."""
        config = with_values(self._config, trial.values)
        set_deterministic(config.train.deterministic)
        teacher = self._teacher(trial.values)
        opened = self._loader(config, trial, teacher)
        torch.set_num_threads(config.train.num_threads or self.default_threads)
        clock = _Clock(opened.loader.device, num_warm_up, num_steps)
        batches = _Batches(self._batches(trial.part, opened, teacher), num_warm_up + num_steps, opened.loader)
        if self._stage == "distill" and config.student is None:
            wait_until_idle()
            for number, batch in enumerate(batches):
                clock.tick(number, len(batch))
            return clock.timed
        module = self._module(config, trial.values, opened.loader, teacher)
        module.clock = clock
        trainer = build_trial_trainer(config.train, device=opened.loader.device)
        wait_until_idle()
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, batches)
        except SystemExit:  # what Lightning makes of Ctrl-C
            if not trainer.interrupted:
                raise
            raise KeyboardInterrupt from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
        return clock.timed

    def _batches(self, part: Part, opened: "_OpenLoader", teacher: Teacher | Recording | None) -> Iterator[KDBatch]:
        if part == "all":
            return opened.batches
        if not self._resident:
            self._resident = [_copied(next(opened.batches), teacher) for _ in range(_NUM_RESIDENT)]
        if part == "no teacher":
            first = self._resident[0]
            outputs = {"teacher": first.teacher, "teacher_views": first.teacher_views}
            return (batch.replace(**outputs) for batch in opened.batches)
        if part == "no loader" and isinstance(teacher, Teacher):
            return (teacher.with_outputs(batch) for batch in cycle(self._resident))
        return cycle(self._resident)

    def _live_teacher(self, values: Values) -> Teacher:
        teacher = self._teacher(values)
        assert isinstance(teacher, Teacher)  # a recording has nothing to choose
        return teacher

    def _teacher(self, values: Values) -> Teacher | Recording | None:
        key = _of("teacher", values)
        if key not in self._teachers:
            config = with_values(self._config, values)
            teacher = None
            if self._stage == "distill" and config.teacher is not None:
                teacher = open_run_teacher(
                    config,
                    classes=self.source.classes,
                    plugins=self._plugins,
                    trust_engines=self._trust_engines,
                    training=self._all_images,
                )
            self._teachers[key] = teacher
        return self._teachers[key]

    def _loader(self, config: Config, trial: Trial, teacher: Teacher | Recording | None) -> "_OpenLoader":
        is_taught = trial.part == "all" or (isinstance(teacher, Recording) and not self._resident)
        key = _of("data", trial.values), _of("teacher", trial.values) if is_taught else None
        if key not in self._loaders:
            loader = KDDataLoader.from_config(
                config,
                teacher=teacher if is_taught else None,
                shard=Shard(),
                training=self.source,
                plugins=self._plugins,
                run_dir=None,
                shown_views=_shown_views(config),
            )
            self._loaders[key] = _OpenLoader(loader, _without_end(loader))
        return self._loaders[key]

    def _module(
        self, config: Config, values: Values, loader: KDDataLoader, teacher: Teacher | Recording | None
    ) -> "_TimedModule":
        key = tuple(pair for pair in _of("train", values) if pair[0] != "train.num_threads")
        if key not in self._modules:
            network, train = network_of(config, self._stage), config.train
            num_classes = num_classes_for(network, loader.source, teacher)
            student = open_model(
                network,
                plugins=self._plugins,
                num_classes=num_classes,
                is_trained=True,
                images=normalization_of(loader, view_of(config, config.stage)),
            )
            student = student.to(PURE_PRECISIONS.get(train.precision, torch.float32))
            optimizer = train.optimizer.model_copy(update={"lr": _LEARNING_RATE})
            config = config.model_copy(update={"train": train.model_copy(update={"optimizer": optimizer})})
            self._modules[key] = build_module(
                _TimedModule,
                config,
                student,
                loader,
                teacher,
                plugins=self._plugins,
                identity={},
                validate=lambda model: {},
            )
        return self._modules[key]

    def _with_random_weights(self, config: Config) -> Config:
        """Speed does not depend on the weights: those of a teacher that is not trained yet are drawn at random."""
        teacher = config.teacher
        assert isinstance(teacher, TeacherSettings) and teacher.model is not None
        model = teacher.model.model_copy(
            update={"checkpoint": None, "checkpoint_key": None, "checkpoint_match": "all", "reset": ()}
        )
        torch.manual_seed(0)
        network = open_model(model, plugins=self._plugins, num_classes=self.source.num_classes)
        folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="tune-")))
        torch.save(trunk_of(network).state_dict(), folder / "random.pt")
        model = model.model_copy(update={"checkpoint": folder / "random.pt"})
        return config.model_copy(update={"run_dir": None, "teacher": teacher.model_copy(update={"model": model})})


def with_values(config: Config, values: Values) -> Config:
    """`config` with these settings in place of its own.

    Raises:
        ValidationError: they do not go together.
    """
    settings = config.model_dump()
    for key, value in values:
        section, _, name = key.partition(".")
        settings[section] = (settings[section] or {}) | {name: value}
    return Config.model_validate(settings)


class _OpenLoader(NamedTuple):
    loader: KDDataLoader
    batches: Iterator[KDBatch]
    """Without end."""


class _Timed(NamedTuple):
    images_per_s: float
    step_s: float


class _Clock:
    """Times `num_steps` steps after the first `num_warm_up`, of which there is at least one."""

    def __init__(self, device: torch.device, num_warm_up: int, num_steps: int) -> None:
        self._device, self._num_warm_up, self._num_steps = device, num_warm_up, num_steps
        self._num_images = 0
        self._started_s = self._ended_s = 0.0

    def tick(self, number: int, num_images: int) -> None:
        """Step `number` has ended."""
        if number >= self._num_warm_up:
            self._num_images += num_images
        if number == self._num_warm_up - 1:
            self._started_s = self._now()
        elif number == self._num_warm_up + self._num_steps - 1:
            self._ended_s = self._now()

    @property
    def timed(self) -> _Timed:
        """What the steps took, once the last one has ended."""
        elapsed_s = self._ended_s - self._started_s
        return _Timed(self._num_images / elapsed_s, elapsed_s / self._num_steps)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _TimedModule(DistillModule):
    """The module of a run, whose steps are timed."""

    clock: _Clock
    """Of the current trial."""

    def on_train_batch_end(self, outputs: Any, batch: KDBatch, number: int) -> None:
        """Time the step."""
        super().on_train_batch_end(outputs, batch, number)
        self.clock.tick(number, len(batch))


class _Batches:
    """So many batches, in place of the loader that they are from: what Lightning and the module ask it for."""

    def __init__(self, batches: Iterator[KDBatch], num_batches: int, loader: KDDataLoader) -> None:
        self._batches, self._num_batches = batches, num_batches
        self.source, self.batch_size = loader.source, loader.batch_size

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[KDBatch]:
        return islice(self._batches, self._num_batches)


class _Subset:
    """A source with some samples of another one, spread evenly over it."""

    def __init__(self, source: Source, num_samples: int) -> None:
        number = min(num_samples, len(source))
        self._index: NDArray[np.int64] = np.arange(number) * len(source) // max(number, 1)
        self._source = source
        self.labels = None if source.labels is None else source.labels[self._index]
        self.classes, self.num_classes = source.classes, source.num_classes
        self.stores, self.warnings = source.stores, source.warnings
        masks = masks_of(source)
        self.masks = None if masks is None else masks.subset(self._index)
        ends = getattr(source, "shard_ends", None)
        self.shard_ends = None if ends is None else np.searchsorted(self._index, ends)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, indices: NDArray[np.int64]) -> Any:
        return self._source.read(self._index[indices])

    def expect(self, indices: NDArray[np.int64]) -> None:
        if (expect := getattr(self._source, "expect", None)) is not None:
            expect(self._index[indices])

    def name(self, index: int) -> str:
        return self._source.name(int(self._index[index]))

    @property
    def fingerprint(self) -> str:
        return f"{len(self)} of {self._source.fingerprint}"


def _of(section: str, values: Values) -> Values:
    """The settings that a part of the run depends on; a teacher also on the precision of the student it may follow."""
    also = "train.precision" if section == "teacher" else ""
    return tuple((key, value) for key, value in values if key.startswith(f"{section}.") or key == also)


def _lacks_weights(config: Config) -> bool:
    """Whether the teacher is a network that this run trains first, and has not trained yet."""
    model = config.teacher.model if isinstance(config.teacher, TeacherSettings) else None
    if model is None or model.pretrained or (model.checkpoint is not None and not model.may_stay_random):
        return False
    return starts_without_teacher(config.model_copy(update={"stage": "all"}))


def _warm_pages(source: Source) -> None:
    """Read the files, so no choice of settings is the first to read them."""
    if source.stores == "pixels":
        return
    deadline_s = time.perf_counter() + _WARM_PAGES_S
    for index in range(min(len(source), _NUM_IMAGES)):
        if source.stores == "bytes":
            source.read(np.array([index]))
        else:
            with suppress(OSError), open_regular(Path(source.name(index))) as file:  # the loader says what is wrong
                file.read()
        if time.perf_counter() > deadline_s:
            return


def _without_end(loader: KDDataLoader) -> Iterator[KDBatch]:
    """Epoch after epoch; of a recording those that it has, again and again."""
    num_epochs = loader.teacher.num_epochs if isinstance(loader.teacher, Recording) else None
    while True:
        if loader.epoch == num_epochs:
            loader.set_epoch(0)
        yield from loader


def _shown_views(config: Config) -> Collection[str]:
    """The views that a run makes; a loop of the user's own, without a student in the config, may see all."""
    return config.seen_views if config.student_views else config.data.split("train").views


def _copied(batch: KDBatch, teacher: Teacher | Recording | None) -> KDBatch:
    """The batch in memory of its own, with outputs of the teacher."""
    copied = batch.clone()
    return teacher.with_outputs(copied) if isinstance(teacher, Teacher) else copied


def _from_cpu(teacher: Teacher) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """The teacher for images on the CPU, in the dtype that it takes."""
    dtype = teacher.images.dtype
    return lambda images: {name: output.float() for name, output in teacher(images.to(teacher.device, dtype)).items()}
