"""One stage of a run, from opening its data to exporting its network."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.terminal_log import log_line
from kd_pipeline.config.config import Config
from kd_pipeline.errors import StateError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._metrics import open_metrics
from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.models.input_adapter import unadapted
from kd_pipeline.models.modules import deployed_network
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.tensorrt.output import check_folder, make_folders
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.training.callbacks import open_callbacks
from kd_pipeline.training.distributed import on_rank_zero, set_num_threads
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.loggers import log_results, open_loggers
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.sharding import is_sharded, load_full_state_dict
from kd_pipeline.training.signals import Signals
from kd_pipeline.training.trainer import PURE_PRECISIONS, check_lightning, set_deterministic
from kd_pipeline.workflows.best_student import has_weights, load_student
from kd_pipeline.workflows.distill_module import build_distillation, build_module
from kd_pipeline.workflows.exported import ENGINE, WEIGHTS, OwnNetwork
from kd_pipeline.workflows.own_teacher import open_own_teacher
from kd_pipeline.workflows.own_validation import open_validate
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.pixel_pictures import draw_predictions
from kd_pipeline.workflows.prediction_tables import media_of, prediction_tables, write_tables
from kd_pipeline.workflows.results import read_evaluations, results_digest, write_results
from kd_pipeline.workflows.resume import SavedRun, effect_on_finished_run
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.setting_changes import Change
from kd_pipeline.workflows.stage import (
    Stage,
    check_config,
    network_of,
    normalization_of,
    num_classes_for,
    num_classes_of,
    stage_dir,
)
from kd_pipeline.workflows.stage_evaluations import StageEvaluations
from kd_pipeline.workflows.stage_fit import StageFit
from kd_pipeline.workflows.stage_teacher import (
    check_comparison,
    check_evaluation_images,
    check_no_student_yet,
    start_probe,
)
from kd_pipeline.workflows.story import no_row_of
from kd_pipeline.workflows.student_outputs import StudentOutputs
from kd_pipeline.workflows.teacher import check_recording, open_run_teacher, saved_runtimes
from kd_pipeline.workflows.teacher_layers import copy_teacher_layers
from kd_pipeline.workflows.train_result import TrainResult
from kd_pipeline.workflows.validation import check_probed

__all__ = ["StageRun", "folder_of", "stream_of"]

_logger = logging.getLogger("kd_pipeline")

_NO_RESULTS = "there is no validation set, so no results"


class StageRun(ExitStack):
    """One stage, from opening the data to exporting the student. Leaving the context closes what it opened."""

    def __init__(
        self,
        config: Config,
        stage: Stage,
        parts: Parts,
        plugins: Collection[str],
        trust_engines: Collection[str],
        report: Callable[[str], object] | None,
    ) -> None:
        super().__init__()
        self._parts = parts
        self._config = config.model_copy(update={"stage": stage})
        self._stage, self._plugins, self._trust_engines = stage, plugins, trust_engines
        self._report = report
        self._is_one_of_all = config.stage == "all"
        self._folder = folder_of(config, stage)
        self._best_file = self._folder.checkpoints / "best_student.pt"
        self._callbacks: list[Any] = []
        self._reference: Teacher | None = None
        """The teacher for validation images; None for a recording, which has no outputs for them."""
        self._recording: Recording | None = None
        self._signals: Signals | None = None
        """Those that are received, where something else handles them."""
        self._unsharded: nn.Module | None = None
        """A copy of the user's student as it was."""

    def run(self) -> TrainResult:
        """Train unless that is done, then export and evaluate the best student unless that is done."""
        folder = self._folder
        on_rank_zero(self._enter_folder)
        self._prepare()
        self._data = self._open_data()
        saved = None if folder.last_checkpoint is None else SavedRun.load(folder.last_checkpoint)
        loader, identity = self._open_training(saved)
        changes = [] if saved is None else saved.check(identity, self._config, folder.path)
        finished = None if saved is None else saved.finished_line(self._config.train)
        if saved is not None and finished is not None:
            _logger.info("%s", finished)
            for change in changes:
                _logger.info("changed since the training: %s", effect_on_finished_run(change))
            if (known := self._known_results(results_digest(self._config, identity, saved.step))) is not None:
                return self._show(known)
            module = self._new_module(loader, identity)
            loggers = open_loggers(self._config.train.loggers, folder, saved.step) if is_rank_zero() else []
            return self._finish(module, loader, saved.step, loggers, changes)
        if self._stage == "teacher" and self._is_one_of_all:
            check_no_student_yet(self._config, resumes=saved is not None)
        self._probe_teacher(loader)
        module = self._new_module(loader, identity)
        trainer = self._fit(module, loader, saved, changes)
        return self._finish(module, loader, trainer.global_step, trainer.loggers, changes=[])

    def _open_training(self, saved: SavedRun | None) -> tuple[AnyLoader, dict[str, Any]]:
        """The loader of the training with its teacher, and what identifies the run.

        Raises:
            StateError: `saved` could not resume; before the loader writes the class list.
        """
        teacher = self._open_teacher(saved) if self._stage == "distill" else None
        self._evaluations = StageEvaluations(
            self._config,
            self._data,
            self._student_outputs,
            reference=self._reference,
            validate_by=self._validate_by,
            metrics=self._metrics,
        )
        self._config = self._evaluations.config
        identity = self._identity(teacher)
        if saved is not None:
            saved.check(identity, self._config, self._folder.path)
        loader = self._data.open_training(teacher)
        identity["stream"] = stream_of(loader)
        return loader, identity

    def _known_results(self, digest: str) -> dict[str, Evaluation] | None:
        """The results of a finished run, if they are made and whole; the user's student then has its weights."""
        if not self._folder.has_results(digest):
            return None
        try:
            evaluations = read_evaluations(self._folder.result)
        except StateError as exc:
            _logger.warning("%s; the results are made again", exc)
            return None
        if self._parts.student is not None:
            self._give_weights(read_checkpoint(self._folder.exported / WEIGHTS))
        return evaluations

    def _finish(
        self, module: DistillModule, loader: AnyLoader, step: int, loggers: Sequence[Any], changes: Sequence[Change]
    ) -> TrainResult:
        """Evaluate and export the best student of a training that ended after `step`."""
        config, folder = self._config, self._folder
        known = self._known_evaluations(module, step)
        student, distillation = (module.model, module.distillation) if known else self._best_student(module, loader)
        evaluations = known | self._evaluations.missing(student.to(loader.device), distillation, known)
        self._give_weights(trunk_of(student).state_dict())
        tables = prediction_tables(self._evaluations.predictions, self._data.loader)
        try:
            if is_rank_zero():
                write_tables(folder.path, tables)
                self._write_results(student, loader, evaluations)
                digest = results_digest(config, module.identity, step)
                folder.record_results(digest, step, [str(change) for change in changes])
                media = media_of(folder.path, evaluations, tables)
                log_results(loggers, config, evaluations, step, media=media, keep_open=self._parts.loggers)
        finally:
            result = self._show(evaluations)  # the last thing that is seen, also of an export that failed
        return result

    def _open_data(self) -> RunData:
        return RunData(self._config, self._parts, self._folder.path, self, plugins=self._plugins)

    def _enter_folder(self) -> None:
        folder = self._folder
        if self._config.train.export.engine is not None:  # it is refused where others can write, whatever the umask
            check_folder(folder.exported / ENGINE, otherwise="set a different run_dir")
            make_folders(folder.path)
        self.enter_context(folder.session(f"train, stage {self._stage}"))

    def _prepare(self) -> None:
        """Everything that can fail before the data is opened, rather than after the first epoch."""
        config = self._config
        self._validate_by = open_validate(config, self._parts.validate, plugins=self._plugins)
        check_config(config, self._stage, self._parts)
        self._network = None if self._parts.student is not None else network_of(config, self._stage)
        self._metrics = open_metrics(config.train.metrics, plugins=self._plugins)
        self._callbacks += open_callbacks(config.train.callbacks, plugins=self._plugins)
        check_lightning(self._callbacks, ())
        if (engine := config.train.export.engine) is not None:
            open_tensorrt(engine.runtime)
        if is_rank_zero():
            for remark in self._shared_config.remarks:
                _logger.warning("%s", remark)
        set_num_threads(config.train.num_threads)
        set_deterministic(config.train.deterministic)
        torch.manual_seed(config.seed % 2**63)  # for the order of a user's loader, whose first batch is looked at

    @cached_property
    def _student_outputs(self) -> StudentOutputs:
        return StudentOutputs(self._network, self._parts.student, self._data.example)

    def _identity(self, teacher: Teacher | Recording | None) -> dict[str, Any]:
        """What a checkpoint holds about its run, in plain values."""
        source = self._data.training
        return {
            "config": shown_settings(self._config),
            "objects": self._parts.describe(),
            "teacher": None if teacher is None else teacher.fingerprint,
            "teacher_runtimes": None if teacher is None else list(teacher.runtimes),
            "classes": None if source.classes is None else list(source.classes),
            "data": source.fingerprint,
            "num_classes": num_classes_of(source, teacher),
            "validation": self._data.fingerprints,
        }

    def _write_results(self, student: nn.Module, loader: AnyLoader, evaluations: Mapping[str, Evaluation]) -> None:
        reference, open_loader = self._reference, self._data.loader
        draw_predictions(self._folder.path, student, reference, open_loader, evaluations, view=self._data.view)
        write_results(
            self._folder,
            self._config,
            student,
            self._network or OwnNetwork.of(student, self._data.example()),
            evaluations,
            classes=loader.classes,
            transform=self._data.transform_of_export,
            training=self._data.source,
            plugins=self._plugins,
        )

    def _give_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Let the user's student have the exported weights, such as those of the EMA, on all ranks."""
        if self._parts.student is not None:
            load_full_state_dict(trunk_of(deployed_network(self._parts.student)), weights)

    def _show(self, evaluations: Mapping[str, Evaluation]) -> TrainResult:
        """Report the results and write them to the log."""
        result = TrainResult(self._stage, self._folder.path, evaluations)
        if is_rank_zero():
            if self._report is not None:
                self._folder.write_log("\n".join(result.lines) or _NO_RESULTS)
            for line in result.lines if self._report is not None else result.lines or (_NO_RESULTS,):
                (self._report or log_line)(line)
            if self._recording is not None and evaluations and any(map(is_logits, self._recording.outputs)):
                log_line(no_row_of(self._recording, evaluations))
        return result

    def _open_teacher(self, saved: SavedRun | None) -> Teacher | Recording | None:
        teacher, is_ours = self._find_teacher(None if saved is None else saved_runtimes(saved.run))
        if teacher is not None and is_ours:
            self.callback(teacher.close)
        if isinstance(teacher, Teacher):
            self._data.teacher_views = teacher.views
            check_comparison(self._config, teacher, self._student_outputs)
            if self._validate_by is None:
                check_evaluation_images(self._data, teacher)
            self._reference = teacher
        elif teacher is not None:
            check_recording(self._config, teacher)
            self._recording = teacher
        return teacher

    def _find_teacher(self, begun_with: Sequence[str] | None) -> tuple[Teacher | Recording | None, bool]:
        """The teacher of the run, which began with these runtimes, and whether to close it."""
        permissions = {"plugins": self._plugins, "trust_engines": self._trust_engines}
        if self._data.own_training is not None or isinstance(self._parts.teacher, Teacher | nn.Module | Recording):
            return open_own_teacher(self._shared_config, self._parts, self._data, begun_with=begun_with, **permissions)
        if self._config.teacher is None and self._parts.distillation is not None:
            return None, False
        teacher = open_run_teacher(
            self._shared_config,
            classes=self._data.training.classes,
            training=self._data.source,
            begun_with=begun_with,
            **permissions,
        )
        return teacher, True

    @property
    def _shared_config(self) -> Config:
        """The config of all students that learn from the teacher."""
        return self._config

    def _open_student(self, loader: AnyLoader) -> nn.Module:
        student = self._parts.student
        if self._network is not None:
            num_classes = num_classes_for(self._network, loader, loader.teacher)
            student = open_model(
                self._network,
                plugins=self._plugins,
                num_classes=num_classes,
                is_trained=True,
                images=normalization_of(loader, self._data.view),
            )
            if num_classes is not None:
                self._network = self._network.model_copy(update={"num_classes": num_classes})
        elif student is not None and is_sharded(student):
            student = self._unsharded
        assert student is not None
        if self._config.student_from_teacher and self._stage == "distill":
            copy_teacher_layers(self._config, unadapted(student), plugins=self._plugins)
        if self._evaluations.plan.probed:
            check_probed(student, self._data.example())
        return student.to(PURE_PRECISIONS.get(self._config.train.precision, torch.float32))

    def _new_module(self, loader: AnyLoader, identity: Mapping[str, Any]) -> DistillModule:
        """The student and its loss, with initial weights that follow from the seed."""
        torch.manual_seed(self._config.seed % 2**63)
        if self._config.train.strategy == "fsdp":
            self._unsharded = copy.deepcopy(self._parts.student)
        module: DistillModule = build_module(
            DistillModule,
            self._config,
            self._open_student(loader),
            loader,
            loader.teacher if self._stage == "distill" else None,
            plugins=self._plugins,
            identity=identity,
            validate=lambda model: self._evaluations.validate(model, module),
            loss=self._parts.distillation,
            optimizer=self._parts.optimizer,
        )
        return module

    def _probe_teacher(self, loader: AnyLoader) -> None:
        probe = start_probe(self._config, loader, self._data.source, plugins=self._plugins)
        if probe is not None:
            self._callbacks.append(probe)

    def _fit(self, module: DistillModule, loader: AnyLoader, saved: SavedRun | None, changes: Sequence[Change]) -> Any:
        """Train to the end, and return the trainer."""
        fit = StageFit(
            config=self._config,
            stage=self._stage,
            folder=self._folder,
            data=self._data,
            parts=self._parts,
            evaluations=self._evaluations,
            callbacks=self._callbacks,
            signals=self._signals,
        )
        return fit.run(module, loader, saved, changes)

    def _known_evaluations(self, module: DistillModule, step: int) -> dict[str, Evaluation]:
        """The last validation, if it was that of the best student, and measured all that is known of it."""
        known = self._evaluations.complete_after(step)
        if known is None or is_sharded(module.model):
            return {}
        is_best = is_rank_zero() and has_weights(module.model, self._best_file)
        # Rank zero decides for all, which evaluate together.
        return known if module.trainer.strategy.broadcast(is_best) else {}

    def _best_student(self, module: DistillModule, loader: AnyLoader) -> tuple[nn.Module, Distillation]:
        """The best student, or the last one if none was selected, unsharded, with the projectors that it had."""
        student: nn.Module = module.model
        distillation = module.distillation
        if is_sharded(module.student):
            student = self._open_student(loader)
            distillation = build_distillation(
                self._config, student, loader, loader.teacher, plugins=self._plugins, loss=self._parts.distillation
            )
            student = deployed_network(student)
        is_selected = self._config.train.select_by is not None or self._evaluations.plan.is_own
        best = self._best_file if is_selected and self._best_file.is_file() else None
        load_student(student, distillation, module, self._best_file.parent, best=best)
        return student, distillation.to(loader.device)


def folder_of(config: Config, stage: Stage) -> RunFolder:
    """The folder that `stage` writes into."""
    path = stage_dir(config, stage)
    return RunFolder(path, is_named=path == config.run_dir)


def stream_of(loader: AnyLoader) -> dict[str, Any]:
    """What the stream of batches depends on, without what the identity of a run has anyway."""
    state = loader.state_dict()
    fingerprint = state["loader"] if isinstance(loader, BatchLoader) else state["fingerprint"]
    return {name: value for name, value in fingerprint.items() if name not in ("source", "teacher")}
