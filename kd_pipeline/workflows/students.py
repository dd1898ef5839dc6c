"""Several students of a run: each trains as in a run of its own, in turn with the others, on the same batches."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from kd_pipeline._core.progress import one_status_line
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.terminal_log import log_line
from kd_pipeline._core.text import printable
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import save_classes
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.shared import LoaderView, SharedLoader, Wanted, choose
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.once_per_batch import OncePerBatch
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.distributed import on_rank_zero
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.signals import Signals
from kd_pipeline.training.student_outcomes import StudentOutcomes
from kd_pipeline.training.turns import Served, Turns
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.resume import SavedRun
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.stage import Stage, check_config, stage_dir
from kd_pipeline.workflows.stage_run import StageRun
from kd_pipeline.workflows.teacher import with_trained_weights
from kd_pipeline.workflows.train_result import TrainResult

__all__ = ["train_students"]

_logger = logging.getLogger("kd_pipeline")

_OBJECTS = ("student", "train_batches", "validation", "distillation", "optimizer", "callbacks", "loggers")
"""Arguments of `train` that are of one student, or whose batches follow from the random state of its run."""


def train_students(
    config: Config,
    stage: Stage,
    parts: Parts,
    plugins: Collection[str],
    trust_engines: Collection[str],
    report: Callable[[str], object] | None,
) -> TrainResult:
    """Run `stage` for each of the students of `config`; the arguments are those of `train`.

    A student that fails ends alone. If all fail, the error is that of the first.
    """
    if given := [name for name in _OBJECTS if getattr(parts, name) is not None and getattr(parts, name) != ()]:
        raise ConfigError(
            f"{', '.join(given)}: objects are of one student, and the config has students; describe each student in "
            "the config, with a factory of your own if need be, or train each in a run of its own"
        )
    config = _with_trained_teacher(config, stage)
    configs = {name: config.for_student(name) for name in config.students}
    for name, each in configs.items():
        try:
            check_config(each, stage, parts)
        except ConfigError as exc:
            raise ConfigError(f"students.{name}: {exc}") from None
    assert config.run_dir is not None  # the check has found it
    folder = RunFolder(config.run_dir)
    with ExitStack() as stack:
        title = f"train, stage {stage}, students {', '.join(configs)}"
        on_rank_zero(lambda: stack.enter_context(folder.session(title)))
        run = _StudentsRun(config, stage, parts, stack, plugins, trust_engines)
        outcomes = run.run(configs)
        folders = {name: stage_dir(each, stage) for name, each in configs.items()}
        result = _result(stage, folder.path, folders, outcomes)
        if is_rank_zero():
            folder.write_log("\n".join(result.lines))
            for line in result.lines:
                (report or log_line)(line)
    return result


def _with_trained_teacher(config: Config, stage: Stage) -> Config:
    """`config` with the teacher that `stage: teacher` has trained in the run's folder, as students have their own."""
    if stage != "distill" or not isinstance(config.teacher, TeacherSettings):
        return config
    layers = [each.student_from_teacher for each in config.single_runs.values()]
    needs_layers = config.model_copy(update={"student_from_teacher": next(filter(None, layers), {})})
    return config.model_copy(update={"teacher": with_trained_weights(needs_layers, config.teacher)})


def _result(stage: Stage, folder: Path, folders: Mapping[str, Path], outcomes: Mapping[str, Any]) -> TrainResult:
    """The result of all students, of which each has a folder and an outcome.

    Raises:
        SystemExit: a signal stopped them.
        Exception: all have failed.
    """
    failed = {name: each for name, each in outcomes.items() if isinstance(each, BaseException)}
    for each in failed.values():
        if not isinstance(each, Exception):
            raise each
    if len(failed) == len(outcomes):
        raise next(iter(failed.values()))
    failures = {name: _failure_text(folders[name], each) for name, each in failed.items()}
    done = {name: each for name, each in outcomes.items() if name not in failed}
    return TrainResult(stage, folder, {}, done, failures)


def _failure_text(folder: Path, error: BaseException) -> str:
    reason = printable(_reason(error).partition("\n")[0])
    return (
        f"{reason}; {folder / 'train.log'} has all of it. The same command tries it again from its last checkpoint; to "
        "start it again from the beginning, give it another name in students (--fresh starts all of them)"
    )


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, KDPipelineError) else f"{type(error).__name__}: {error}"


class _StudentsRun:
    """What the students have in common: data, teacher, turns and signals."""

    def __init__(
        self,
        config: Config,
        stage: Stage,
        parts: Parts,
        stack: ExitStack,
        plugins: Collection[str],
        trust_engines: Collection[str],
    ) -> None:
        self.config, self.stage, self.parts, self.plugins = config, stage, parts, plugins
        self._stack, self._trust_engines = stack, trust_engines
        assert config.run_dir is not None
        self.data = RunData(config, Parts(), config.run_dir, stack, plugins=plugins)
        self.signals = Signals()
        self.turns: Turns[Wanted, KDBatch] = Turns(config.students)
        self.reference: Teacher | None = None
        """The teacher for validation images."""
        self.has_probed = False
        """Whether a student has had the teacher judged."""
        self._teacher: Teacher | Recording | None = None
        self._training: SharedLoader | None = None
        self._loaders: dict[int, SharedLoader] = {}
        self._outcomes = StudentOutcomes()

    def run(self, configs: Mapping[str, Config]) -> dict[str, Any]:
        """The results of the students by name, or what they raised."""
        device = self.data.device
        on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # whose random state is theirs
        works = {name: partial(self._train, each, device) for name, each in configs.items()}
        with self.signals.handled(), one_status_line(), on_gpu:
            return self.turns.run(works, self._serve, self._ended)

    def teacher(self, find: Callable[[], tuple[Teacher | Recording | None, bool]]) -> Teacher | Recording | None:
        """The teacher, which the first student finds."""
        if self._teacher is None:
            self._teacher, is_ours = find()
            if self._teacher is not None and is_ours:
                self._stack.callback(self._teacher.close)
            if isinstance(self._teacher, Teacher):
                self.data.teacher_views = self._teacher.views
                self.reference = OncePerBatch(self._teacher)
        return self._teacher

    def training_loader(self, teacher: Teacher | Recording | None) -> SharedLoader:
        """The loader of the training, which the first student opens."""
        if self._training is None:
            self._training = self.shared(self.data.open_training(teacher), is_training=True)
        return self._training

    def shared(self, loader: AnyLoader, *, is_training: bool = False) -> SharedLoader:
        """`loader`, of which each student has a view."""
        assert isinstance(loader, KDDataLoader)
        if id(loader) not in self._loaders:
            self._loaders[id(loader)] = SharedLoader(loader, is_training=is_training)
        return self._loaders[id(loader)]

    def _train(self, config: Config, device: torch.device) -> TrainResult:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        with _StudentRun(config, self, self._trust_engines) as run:
            return run.run()

    def _serve(self, wanted: Mapping[str, Wanted]) -> Served[KDBatch]:
        first, names = choose(wanted)
        return Served(names, lambda: first.loader.read(first.epoch, first.number))

    def _ended(self, name: str, error: BaseException | None) -> None:
        if isinstance(error, Exception) and is_rank_zero():
            others = len(self.turns.living)
            _logger.error("student %s failed: %s%s", name, _reason(error), "; the others go on" if others else "")
        self._outcomes.agree(name, error)


class _StudentRun(StageRun):
    """The run of one of several students."""

    def __init__(self, config: Config, shared: _StudentsRun, trust_engines: Collection[str]) -> None:
        super().__init__(config, shared.stage, shared.parts, shared.plugins, trust_engines, report=lambda line: None)
        self._shared = shared
        self._signals = shared.signals
        self._folder = RunFolder(stage_dir(config, shared.stage), is_named=False)

    def _enter_folder(self) -> None:
        assert self._config.run_dir is not None
        RunFolder(self._config.run_dir, is_named=False).refuse_links()  # above that of the stage
        super()._enter_folder()

    def _open_data(self) -> RunData:
        return _StudentData(self._config, self._shared, self._folder.path, self)

    @property
    def _shared_config(self) -> Config:
        return self._shared.config

    def _find_teacher(self, begun_with: Sequence[str] | None) -> tuple[Teacher | Recording | None, bool]:
        return self._shared.teacher(lambda: super(_StudentRun, self)._find_teacher(begun_with)), False

    def _open_teacher(self, saved: SavedRun | None) -> Teacher | Recording | None:
        teacher = super()._open_teacher(saved)
        self._reference = self._shared.reference
        return teacher

    def _probe_teacher(self, loader: AnyLoader) -> None:
        if not self._shared.has_probed:
            self._shared.has_probed = True
            super()._probe_teacher(loader)


class _StudentData(RunData):
    """Views of the loaders that all students have in common."""

    def __init__(self, config: Config, shared: _StudentsRun, run_dir: Path, stack: ExitStack) -> None:
        super().__init__(config, Parts(), run_dir, stack, source=shared.data.source, plugins=shared.plugins)
        self._shared = shared
        self._student = run_dir.name if shared.stage == "distill" else run_dir.parent.name
        self._views: dict[SharedLoader, LoaderView] = {}

    def open_training(self, teacher: Teacher | Recording | None) -> AnyLoader:
        """The loader of the training with its teacher, which the first student opens."""
        assert self.source is not None
        if self.source.classes is not None:
            save_classes(self._run_dir / "classes.json", self.source.classes)
        return self._view(self._shared.training_loader(teacher))

    def loader(self, split: str) -> AnyLoader:
        """The loader of a split, without a teacher for all but `train`."""
        return self._view(self._shared.shared(self._shared.data.loader(split)))

    def evaluation_loader(self, split: str) -> AnyLoader:
        """The loader of a split for evaluation: of `train` too, whose images are then not augmented."""
        return self._view(self._shared.shared(self._shared.data.evaluation_loader(split)))

    def _view(self, loader: SharedLoader) -> AnyLoader:
        """That of this student, which keeps its place."""
        if loader not in self._views:
            self._views[loader] = LoaderView(loader, partial(self._shared.turns.take, self._student))
        return cast(AnyLoader, self._views[loader])
