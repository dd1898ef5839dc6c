"""One stage of a run, from opening its data to exporting its network."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.ranks import is_rank_zero, world_size
from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.terminal_log import log_line
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, KDPipelineError, StateError, TeacherError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._metrics import open_metrics
from kd_pipeline.evaluation.probe import FirstBatches, probe_teacher
from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import LOGITS
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
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.distributed import on_rank_zero, set_num_threads
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.evidence import StartLine, describe_machine
from kd_pipeline.training.first_batch import DrawFirstBatch
from kd_pipeline.training.keep_evidence import KeepEvidence
from kd_pipeline.training.loggers import log_results, log_settings, open_loggers
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.sharding import is_sharded, load_full_state_dict
from kd_pipeline.training.signals import Signals
from kd_pipeline.training.teacher_probe import ProbeTeacher
from kd_pipeline.training.trainer import PURE_PRECISIONS, build_trainer, check_lightning, set_deterministic
from kd_pipeline.training.unreached import unreached_parameters
from kd_pipeline.workflows.check_images import key_of
from kd_pipeline.workflows.distill_module import build_distillation, build_module, own_outputs
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan, own_defaults, select_best
from kd_pipeline.workflows.exported import ENGINE, WEIGHTS, OwnNetwork
from kd_pipeline.workflows.own_teacher import open_own_teacher
from kd_pipeline.workflows.own_validation import OwnEvaluator, open_validate
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.pixel_pictures import draw_predictions
from kd_pipeline.workflows.prediction_tables import media_of, prediction_tables, write_tables
from kd_pipeline.workflows.results import read_evaluations, results_digest, write_results
from kd_pipeline.workflows.resume import Change, SavedRun, unusable_checkpoint
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.sample_digests import digest_samples
from kd_pipeline.workflows.stage import (
    Stage,
    check_config,
    network_of,
    normalization_of,
    num_classes_for,
    num_classes_of,
    stage_dir,
)
from kd_pipeline.workflows.story import tell_start
from kd_pipeline.workflows.teacher import check_recording, open_run_teacher, saved_runtimes
from kd_pipeline.workflows.teacher_layers import copy_teacher_layers
from kd_pipeline.workflows.train_result import TrainResult
from kd_pipeline.workflows.validation import StageEvaluator, check_probed

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
        self._validated: _Validated | None = None
        self._own_is_headless: bool | None = None
        self._signals: Signals | None = None
        """Those that are received, where something else handles them."""
        self._unsharded: nn.Module | None = None
        """A copy of the user's student as it was."""

    def run(self) -> TrainResult:
        """Train unless that is done, then export and evaluate the best student unless that is done."""
        config, folder = self._config, self._folder
        on_rank_zero(self._enter_folder)
        self._prepare()
        torch.manual_seed(config.seed % 2**63)  # for the order of a user's loader, whose first batch is looked at
        self._data = self._open_data()
        saved = None if folder.last_checkpoint is None else SavedRun.load(folder.last_checkpoint)
        teacher = self._open_teacher(saved) if self._stage == "distill" else None
        self._plan_evaluation()
        config = self._config
        identity = self._identity(teacher)
        if saved is not None:
            saved.check(identity, config, folder.path)  # before the loader writes the class list
        loader = self._data.open_training(teacher)
        identity["stream"] = stream_of(loader)
        changes = [] if saved is None else saved.check(identity, config, folder.path)
        finished = None if saved is None else saved.finished_line(config.train)
        if saved is not None and finished is not None:
            _logger.info("%s", finished)
            for change in changes:
                _logger.info("changed since the training: %s", change.line_of_finished_run)
            if folder.has_results(results_digest(config, identity, saved.step)):
                try:
                    evaluations = read_evaluations(folder.result)
                except StateError as exc:
                    _logger.warning("%s; the results are made again", exc)
                else:
                    if self._parts.student is not None:
                        self._give_weights(read_checkpoint(folder.path / "exported" / WEIGHTS))
                    return self._show(evaluations)
        else:
            self._check_keeps_teacher(saved)
            self._probe_teacher(loader)
        torch.manual_seed(config.seed % 2**63)  # for the initial weights of the student
        if config.train.strategy == "fsdp":
            self._unsharded = copy.deepcopy(self._parts.student)
        module = self._build_module(self._open_student(loader), loader, identity)
        if saved is not None and finished is not None:
            step = saved.step
            loggers = open_loggers(config.train.loggers, folder, step) if is_rank_zero() else []
        else:
            trainer = self._fit(module, loader, saved, changes)
            loggers, step, changes = trainer.loggers, trainer.global_step, []
        known = self._known_evaluations(module, step)
        student, distillation = (module.model, module.distillation) if known else self._best_student(module, loader)
        evaluations = known | self._missing_evaluations(student.to(loader.device), distillation, known)
        self._give_weights(trunk_of(student).state_dict())
        tables = prediction_tables(self._evaluator.predictions, self._data.loader)
        try:
            if is_rank_zero():
                write_tables(folder.path, tables)
                self._write_results(student, loader, evaluations)
                folder.record_results(results_digest(config, identity, step), step, [str(change) for change in changes])
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
            check_folder(folder.path / "exported" / ENGINE, otherwise="set a different run_dir")
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

    def _plan_evaluation(self) -> None:
        """Decide what is measured, and by what the best student is selected, which is then part of the config."""
        config, data = self._config, self._data
        if self._validate_by is not None:
            self._plan = EvaluationPlan.of_function(data.validated)
        else:
            self._plan = EvaluationPlan.of(
                config,
                self._stage,
                labeled=data.labeled,
                masked=data.masked if self._may_be_of_pixels else (),
                has_reference=self._reference is not None,
                validated=data.validated,
                is_headless=self._is_headless,
            )
        self._config = select_best(config, self._stage, self._plan)
        self._evaluator: StageEvaluator | OwnEvaluator
        if self._validate_by is not None:
            self._evaluator = OwnEvaluator(self._validate_by, data.loader)
        else:
            self._evaluator = StageEvaluator(
                self._config,
                self._plan,
                data.evaluation_loader,
                metrics=self._metrics,
                reference=self._reference,
                is_headless=self._is_headless,
                view=data.view,
            )

    @property
    def _is_headless(self) -> bool:
        """Whether the student has no logits, as far as its settings or a run on zeros say."""
        if self._network is not None:
            return self._network.is_headless
        if self._own_is_headless is None:
            assert self._parts.student is not None
            self._own_is_headless = LOGITS not in own_outputs(self._parts.student, self._data.example())
        return self._own_is_headless

    @property
    def _may_be_of_pixels(self) -> bool:
        """Whether the student may have logits of pixels, as far as its settings or a run on zeros say."""
        if self._network is not None:
            return self._network.is_of_pixels is not False
        assert self._parts.student is not None
        logits = own_outputs(self._parts.student, self._data.example()).get(LOGITS)
        return logits is not None and logits.ndim == 4

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

    def _probe_teacher(self, loader: AnyLoader) -> None:
        """Judge the teacher by the first batches of the training if they show enough, or else now."""
        config, teacher = self._config, loader.teacher
        if teacher is None or (settings := config.probe) is None:
            return
        if (source := self._data.source) is None or isinstance(loader, BatchLoader):
            if is_rank_zero() and "probe" in config.model_fields_set:
                _logger.info("teacher probe: left out, as it takes images of the config")
            return
        if (first_batches := FirstBatches.of_run(loader, settings)) is not None:
            self._callbacks.append(ProbeTeacher(first_batches))
            return
        can_probe = source.labels is not None and any(map(is_logits, teacher.outputs))
        if is_rank_zero() and isinstance(teacher, Teacher) and can_probe:
            _logger.info("teacher probe: running it on training images, for about %g s", settings.max_seconds)
        # One rank decides: in the same time, each may see a different number of images.
        plugins = self._plugins
        on_rank_zero(lambda: probe_teacher(config, teacher, settings, training=source, plugins=plugins))

    def _check_keeps_teacher(self, saved: SavedRun | None) -> None:
        """Refuse to train a teacher of which a student learns already, as a part of `stage: all`.

        Raises:
            StateError: the student could not resume with the new teacher.
        """
        if self._stage != "teacher" or not self._is_one_of_all:
            return
        for config in self._config.single_runs.values():
            student = RunFolder(stage_dir(config, "distill"))
            if student.last_checkpoint is not None:
                raise StateError(
                    f"stage: all would train the teacher {'further' if saved else 'first'}, and the run in "
                    f"{student.path} has begun to learn from the teacher as it was; set stage=distill to resume that, "
                    "or start both again with --fresh (in Python fresh=True), or set a different run_dir"
                )

    def _fit(self, module: DistillModule, loader: AnyLoader, saved: SavedRun | None, changes: Sequence[Change]) -> Any:
        """Train to the end, and return the trainer. From here on, the folder says that it was done with this config."""
        config, folder = self._config, self._folder
        if world_size() > 1:
            module.unreached = unreached_parameters(
                module.student, module.distillation, example=loader.example(self._data.view)
            )
            if module.unreached and is_rank_zero():
                names = first_few(module.unreached)
                _logger.info("no term of the loss reaches these of the student, which do not change: %s", names)
        if saved is None:
            path, transform = folder.path / "first_batch.png", getattr(loader, "transform", None)
            drawn = DrawFirstBatch(path, view=self._data.view, transform=transform, classes=loader.classes)
            self._callbacks.append(drawn)
        trainer = build_trainer(
            config.train,
            module,
            folder,
            device=loader.device,
            has_validation=any(split != "test" for split in self._evaluated),
            sparse_metrics=self._plan.sparse,
            resume_step=None if saved is None else saved.step,
            callbacks=[*self._callbacks, *self._evidence(module, loader), *self._parts.callbacks],
            loggers=self._parts.loggers if is_rank_zero() else (),
            default_metrics=own_defaults() if self._plan.is_own else None,
            signals=self._signals,
        )
        on_rank_zero(lambda: self._record_start(trainer, saved, changes))
        if is_rank_zero():
            log_settings(trainer.loggers, config, run_id=folder.run_id)
            evaluated = {split: self._data.loader(split) for split in self._data.splits if split != "train"}
            resumed = "" if saved is None else f"from {folder.last_checkpoint} {saved.place(config.train.epochs)}"
            tell_start(self._stage, config, module, loader, evaluated, folder=folder, resumed=resumed)
        try:
            trainer.fit(module, loader, ckpt_path=folder.last_checkpoint)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
            is_about_checkpoint = saved is not None and not module.has_begun
            if not is_about_checkpoint or isinstance(exc, KDPipelineError | torch.OutOfMemoryError):
                raise
            raise unusable_checkpoint(folder.last_checkpoint, exc) from exc
        if is_rank_zero():
            folder.record_end("trained")
        return trainer

    def _evidence(self, module: DistillModule, loader: AnyLoader) -> list[KeepEvidence]:
        """What keeps the evidence of the run, on rank zero."""
        if not is_rank_zero():
            return []
        identity = {name: value for name, value in module.identity.items() if name not in ("config", "classes")}
        source = self._data.source

        def start(step: int) -> StartLine:
            self._folder.start_evidence()
            return StartLine(
                step=step,
                config=shown_settings(self._config),
                identity=identity,
                machine=describe_machine(loader.device),
                processes=world_size(),
                samples=digest_samples(source) if step == 0 and source is not None else None,
            )

        return [KeepEvidence(self._folder.add_evidence, seed=self._config.seed, start=start)]

    def _record_start(self, trainer: Any, saved: SavedRun | None, changes: Sequence[Change]) -> None:
        config, folder = self._config, self._folder
        first_step = 0 if saved is None else saved.step
        if saved is None:
            folder.set_aside_leftovers()
        elif unchecked := [*self._parts.unchecked, *([note] if (note := self._data.resume_note) else [])]:
            _logger.info("not checked: %s", "; ".join(unchecked))
        for change in changes:
            _logger.info("changed since the last start: %s", change.line)
        folder.write_config(config)
        folder.record_start(
            lambda: max(first_step, trainer.global_step),
            stage=self._stage,
            epochs_done=0 if saved is None else saved.epochs_done,
            epochs=config.train.epochs,
            processes=world_size(),
            changes=[str(change) for change in changes],
            data={"train": self._data.training.fingerprint, **self._data.fingerprints},
        )

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
        return result

    def _open_teacher(self, saved: SavedRun | None) -> Teacher | Recording | None:
        teacher, is_ours = self._find_teacher(None if saved is None else saved_runtimes(saved.run))
        if teacher is not None and is_ours:
            self.callback(teacher.close)
        if isinstance(teacher, Teacher):
            self._data.teacher_views = teacher.views
            self._check_evaluates(teacher)
            self._reference = teacher
        elif teacher is not None:
            check_recording(self._config, teacher)
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

    def _check_evaluates(self, teacher: Teacher) -> None:
        """Refuse what would fail in the evaluation after the training: images, or a comparison of logits without them.

        Raises:
            ConfigError: `compare_with_teacher` compares logits that the teacher does not have.
            TeacherError: the teacher, opened for the images of the training, cannot take those of a split.
        """
        compares_logits = self._config.train.compare_with_teacher and not self._is_headless
        if compares_logits and "logits" not in teacher.outputs:
            raise ConfigError(
                "train.compare_with_teacher compares the student's logits with the teacher's, which returns "
                f"{', '.join(map(repr, teacher.outputs))}; set it to false"
            )
        if self._validate_by is not None:
            return
        if len(teacher.inputs) != len(teacher.views):  # several inputs are the user's own in all splits
            return
        for split in self._data.splits:
            for view, takes in zip(teacher.views, teacher.inputs.values(), strict=True):
                example = next(iter(self._data.teacher_example(view, split).values()))
                spec = TensorSpec((None, *example.shape[1:]), example.dtype)
                if takes.accepts((1, *example.shape[1:]), example.dtype):
                    continue
                if self._data.is_own(split):
                    raise TeacherError(
                        f"validation {split!r} gives {spec}, and the teacher, which is evaluated on it too, takes what "
                        f"the training gives, {takes}; give both the same shape and dtype"
                    )
                path = "transform" if view == IMAGES else f"views.{view}"
                raise TeacherError(
                    f"{key_of(split)}.{path} makes images {spec}, and the teacher, which is evaluated on them too, "
                    f"takes those of the training, {takes}; give {key_of(split)}.{path} the size and dtype of "
                    f"data.train.{path}"
                )

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
        if self._plan.probed:
            check_probed(student, self._data.example())
        return student.to(PURE_PRECISIONS.get(self._config.train.precision, torch.float32))

    def _build_module(self, student: nn.Module, loader: AnyLoader, identity: Mapping[str, Any]) -> DistillModule:
        module: DistillModule = build_module(
            DistillModule,
            self._config,
            student,
            loader,
            loader.teacher if self._stage == "distill" else None,
            plugins=self._plugins,
            identity=identity,
            validate=lambda model: self._validate(model, module),
            loss=self._parts.distillation,
            optimizer=self._parts.optimizer,
        )
        return module

    def _validate(self, model: nn.Module, module: DistillModule) -> dict[str, Evaluation]:
        """Validate while training; the features are judged at the end of an epoch only."""
        trainer, settings = module.trainer, self._config.feature_probe
        epoch = trainer.current_epoch + 1
        with_probe = (
            settings is not None
            and trainer.is_last_batch
            and (epoch % settings.every == 0 or epoch == self._config.train.epochs)
        )
        splits = [split for split in self._evaluated if split != "test"]
        found = self._evaluator.evaluate(
            model,
            module.distillation,
            splits,
            compare=self._config.train.compare_with_teacher,
            with_probe=with_probe,
            bar=progress_bar,
        )
        self._validated = _Validated(trainer.global_step, with_probe, splits, found)
        return found

    def _known_evaluations(self, module: DistillModule, step: int) -> dict[str, Evaluation]:
        """The last validation, if it was that of the best student, and measured all that is known of it."""
        last = self._validated
        if last is None or last.step != step or is_sharded(module.model):
            return {}
        lacks_teacher = self._reference is not None and not self._config.train.compare_with_teacher
        if not self._plan.is_own and lacks_teacher and not self._is_headless:
            return {}
        if self._plan.probed and not last.with_probe:
            return {}
        is_best = is_rank_zero() and self._is_best(module.model)
        # Rank zero decides for all, which evaluate together.
        return last.evaluations if module.trainer.strategy.broadcast(is_best) else {}

    def _is_best(self, model: nn.Module) -> bool:
        """Whether these are the weights of the best student, bit by bit; without one they are those of the last."""
        if not self._best_file.is_file():
            return True
        weights, best = model.state_dict(), read_checkpoint(self._best_file)
        return weights.keys() == best.keys() and all(torch.equal(weights[name].cpu(), best[name]) for name in weights)

    def _missing_evaluations(
        self, student: nn.Module, distillation: Distillation, known: Collection[str]
    ) -> dict[str, Evaluation]:
        """The metrics of the exported network on the splits that are not in `known`."""
        validated = self._validated.splits if known and self._validated is not None else ()
        missing = [split for split in self._evaluated if split not in (*known, *validated)]
        return self._evaluator.evaluate(student, distillation, missing, compare=True, with_probe=True)

    @property
    def _evaluated(self) -> tuple[str, ...]:
        """Splits that the exported network is evaluated on."""
        tests = ("test",) if self._data.has_test else ()
        return tuple(dict.fromkeys((*self._plan.validated, *self._plan.probed, *tests)))

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
        is_selected = self._config.train.select_by is not None or self._plan.is_own
        has_best = is_selected and self._best_file.is_file()
        path = self._best_file.parent / ("best.ckpt" if has_best else "last.ckpt")
        try:
            saved = load_checkpoint(path)
            state = saved["state_dict"]
            if has_best:
                weights = read_checkpoint(self._best_file)
            else:
                weights = saved["ema"]["student"] if module.ema else module.network_state(state)
            student.load_state_dict(weights)
            distillation.load_state_dict({name: state[f"distillation.{name}"] for name in distillation.state_dict()})
        except (AttributeError, LookupError, RuntimeError, TypeError) as exc:
            raise unusable_checkpoint(path, exc) from exc
        return student, distillation.to(loader.device)


@dataclass(frozen=True, slots=True)
class _Validated:
    """The results of the last validation."""

    step: int
    """Optimizer step after which it was."""
    with_probe: bool
    splits: Sequence[str]
    evaluations: dict[str, Evaluation]


def folder_of(config: Config, stage: Stage) -> RunFolder:
    """The folder that `stage` writes into."""
    path = stage_dir(config, stage)
    return RunFolder(path, is_named=path == config.run_dir)


def stream_of(loader: AnyLoader) -> dict[str, Any]:
    """What the stream of batches depends on, without what the identity of a run has anyway."""
    state = loader.state_dict()
    fingerprint = state["loader"] if isinstance(loader, BatchLoader) else state["fingerprint"]
    return {name: value for name, value in fingerprint.items() if name not in ("source", "teacher")}
