"""One stage of a run, from opening its data to exporting its network."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.ranks import is_rank_zero, world_size
from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import ConfigError, KDPipelineError, StateError, TeacherError
from kd_pipeline.evaluation._evaluate import Evaluation, open_metrics
from kd_pipeline.evaluation.probe import FirstBatches, probe_teacher
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.models.input_adapter import unadapted
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.tensorrt.output import check_folder, make_folders
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.distributed import on_rank_zero, set_num_threads
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.loggers import log_results, log_settings, open_loggers
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.sharding import is_sharded
from kd_pipeline.training.teacher_probe import ProbeTeacher
from kd_pipeline.training.trainer import PURE_PRECISIONS, build_trainer, set_deterministic
from kd_pipeline.training.unreached import unreached_parameters
from kd_pipeline.workflows.check_images import key_of
from kd_pipeline.workflows.distill_module import build_distillation, build_module
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan, select_best
from kd_pipeline.workflows.exported import ENGINE
from kd_pipeline.workflows.results import evaluation_split, read_evaluations, results_digest, write_results
from kd_pipeline.workflows.resume import Change, SavedRun, unusable_checkpoint
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

__all__ = ["StageRun", "folder_of"]

_logger = logging.getLogger("kd_pipeline")


class _TrainLoader(KDDataLoader):
    """The loader of a run, which resumes with the changes that `check_resume` has applied."""

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        super().load_state_dict(state, allow=(*allow, "on_bad_sample"))


class StageRun(ExitStack):
    """One stage, from opening the data to exporting the student. Leaving the context closes what it opened."""

    def __init__(
        self,
        config: Config,
        stage: Stage,
        plugins: Collection[str],
        trust_engines: Collection[str],
        report: Callable[[str], object],
    ) -> None:
        super().__init__()
        self._config = config.model_copy(update={"stage": stage})
        self._stage, self._plugins, self._trust_engines = stage, plugins, trust_engines
        self._report = report
        self._is_one_of_all = config.stage == "all"
        self._folder = folder_of(config, stage)
        self._best_file = self._folder.checkpoints / "best_student.pt"
        self._val_loaders: dict[str, KDDataLoader] = {}
        self._callbacks: list[ProbeTeacher] = []
        self._reference: Teacher | None = None
        """The teacher for validation images; None for a recording, which has no outputs for them."""
        self._validated: _Validated | None = None

    def run(self) -> TrainResult:
        """Train unless that is done, then export and evaluate the best student unless that is done."""
        config, folder = self._config, self._folder
        on_rank_zero(self._enter_folder)
        self._prepare()
        self._source = open_source(config.data.split("train").source, plugins=self._plugins)
        saved = None if folder.last_checkpoint is None else SavedRun.load(folder.last_checkpoint)
        teacher = self._open_teacher(saved) if self._stage == "distill" else None
        self._plan_evaluation()
        config = self._config
        identity = self._identity(teacher)
        if saved is not None:
            saved.check(identity, config, folder.path)  # before the loader writes the class list
        loader = self._open_loader("train", teacher)
        identity["stream"] = _stream(loader)
        changes = [] if saved is None else saved.check(identity, config, folder.path)
        finished = None if saved is None else saved.finished_line(config.train)
        if saved is not None and finished is not None:
            _logger.info("%s", finished)
            for change in changes:
                _logger.info("changed since the training: %s", change.line_of_finished_run)
            if folder.has_results(results_digest(config, identity, saved.step)):
                try:
                    return self._show(read_evaluations(folder.result))
                except StateError as exc:
                    _logger.warning("%s; the results are made again", exc)
        else:
            self._check_keeps_teacher(saved)
            self._probe_teacher(loader)
        torch.manual_seed(config.seed % 2**63)  # for the initial weights of the student
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
        try:
            if is_rank_zero():
                write_results(folder, config, student, self._network, self._source, evaluations, plugins=self._plugins)
                folder.record_results(results_digest(config, identity, step), step, [str(change) for change in changes])
                log_results(loggers, config, evaluations, step)
        finally:
            result = self._show(evaluations)  # the last thing that is seen, also of an export that failed
        return result

    def _enter_folder(self) -> None:
        folder = self._folder
        if self._config.train.export.engine is not None:  # it is refused where others can write, whatever the umask
            check_folder(folder.path / "exported" / ENGINE, otherwise="set a different run_dir")
            make_folders(folder.path)
        self.enter_context(folder.session(f"train, stage {self._stage}"))

    def _prepare(self) -> None:
        """Everything that can fail before the data is opened, rather than after the first epoch."""
        config = self._config
        check_config(config, self._stage)
        self._network = network_of(config, self._stage)
        self._metrics = open_metrics(config.train.metrics, plugins=self._plugins)
        if (engine := config.train.export.engine) is not None:
            open_tensorrt(engine.runtime)
        if is_rank_zero():
            for remark in config.remarks:
                _logger.warning("%s", remark)
        set_num_threads(config.train.num_threads)
        set_deterministic(config.train.deterministic)

    def _plan_evaluation(self) -> None:
        """Decide what is measured, and by what the best student is selected, which is then part of the config."""
        config = self._config
        sources = {"train": self._source} | {
            split: self._val_loader(split).source for split in config.data.splits if split != "train"
        }
        labeled = [split for split, source in sources.items() if source.labels is not None]
        self._plan = EvaluationPlan.of(config, self._stage, labeled=labeled, has_reference=self._reference is not None)
        self._config = select_best(config, self._stage, self._plan)
        self._evaluator = StageEvaluator(
            self._config, self._plan, self._evaluation_loader, metrics=self._metrics, reference=self._reference
        )

    def _identity(self, teacher: Teacher | Recording | None) -> dict[str, Any]:
        """What a checkpoint holds about its run, in plain values."""
        source = self._source
        splits = (name for name in self._config.data.splits if name != "train")
        return {
            "config": shown_settings(self._config),
            "teacher": None if teacher is None else teacher.fingerprint,
            "teacher_runtimes": None if teacher is None else list(teacher.runtimes),
            "classes": None if source.classes is None else list(source.classes),
            "data": source.fingerprint,
            "num_classes": num_classes_of(source, teacher),
            "validation": {name: self._val_loader(name).source.fingerprint for name in splits},
        }

    def _probe_teacher(self, loader: KDDataLoader) -> None:
        """Judge the teacher by the first batches of the training if they show enough, or else now."""
        config, teacher = self._config, loader.teacher
        if teacher is None or (settings := config.probe) is None:
            return
        if (first_batches := FirstBatches.of_run(loader, settings)) is not None:
            self._callbacks.append(ProbeTeacher(first_batches))
            return
        can_probe = self._source.labels is not None and any(map(is_logits, teacher.outputs))
        if is_rank_zero() and isinstance(teacher, Teacher) and can_probe:
            _logger.info("teacher probe: running it on training images, for about %g s", settings.max_seconds)
        # One rank decides: in the same time, each may see a different number of images.
        on_rank_zero(lambda: probe_teacher(config, teacher, settings, training=self._source))

    def _check_keeps_teacher(self, saved: SavedRun | None) -> None:
        """Refuse to train a teacher of which a student learns already, as a part of `stage: all`.

        Raises:
            StateError: the student could not resume with the new teacher.
        """
        student = RunFolder(stage_dir(self._config, "distill"))
        if self._stage == "teacher" and self._is_one_of_all and student.last_checkpoint is not None:
            raise StateError(
                f"stage: all would train the teacher {'further' if saved else 'first'}, and the run in {student.path} "
                "has begun to learn from the teacher as it was; set stage=distill to resume that, or start both again "
                "with --fresh (in Python fresh=True), or set a different run_dir"
            )

    def _fit(
        self, module: DistillModule, loader: KDDataLoader, saved: SavedRun | None, changes: Sequence[Change]
    ) -> Any:
        """Train to the end, and return the trainer. From here on, the folder says that it was done with this config."""
        config, folder = self._config, self._folder
        if world_size() > 1:
            module.unreached = unreached_parameters(module.student, module.distillation, example=loader.example())
            if module.unreached and is_rank_zero():
                names = first_few(module.unreached)
                _logger.info("no term of the loss reaches these of the student, which do not change: %s", names)
        trainer = build_trainer(
            config.train,
            module,
            folder,
            device=loader.device,
            has_validation=any(split != "test" for split in self._evaluated),
            sparse_metrics=self._plan.sparse,
            resume_step=None if saved is None else saved.step,
            callbacks=self._callbacks,
        )
        on_rank_zero(lambda: self._record_start(trainer, saved, changes))
        if is_rank_zero():
            log_settings(trainer.loggers, config)
            tell_start(self._stage, config, module, loader, self._val_loaders, folder=folder.path)
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

    def _record_start(self, trainer: Any, saved: SavedRun | None, changes: Sequence[Change]) -> None:
        config, folder = self._config, self._folder
        first_step = 0 if saved is None else saved.step
        if saved is None:
            folder.set_aside_leftovers()
        else:
            where = f"step {saved.step}, {saved.epochs_done} of {config.train.epochs} epochs done"
            _logger.info("resuming from %s: %s", folder.last_checkpoint, where)
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
        )

    def _show(self, evaluations: Mapping[str, Evaluation]) -> TrainResult:
        """Report the results and write them to the log."""
        result = TrainResult(self._stage, self._folder.path, evaluations)
        if is_rank_zero():
            self._folder.write_log("\n".join(result.lines) or "there is no validation set, so no results")
            for line in result.lines:
                self._report(line)
        return result

    def _open_teacher(self, saved: SavedRun | None) -> Teacher | Recording:
        teacher = open_run_teacher(
            self._config,
            classes=self._source.classes,
            plugins=self._plugins,
            trust_engines=self._trust_engines,
            training=self._source,
            begun_with=None if saved is None else saved_runtimes(saved.run),
        )
        self.callback(teacher.close)
        if isinstance(teacher, Teacher):
            self._check_evaluates(teacher)
            self._reference = teacher
        else:
            check_recording(self._config, teacher)
        return teacher

    def _check_evaluates(self, teacher: Teacher) -> None:
        """Refuse what would fail in the evaluation after the training: images, or a comparison of logits without them.

        Raises:
            ConfigError: `compare_with_teacher` compares logits that the teacher does not have.
            TeacherError: the teacher, opened for the images of the training, cannot take those of a split.
        """
        compares_logits = self._config.train.compare_with_teacher and not self._network.is_headless
        if compares_logits and "logits" not in teacher.outputs:
            raise ConfigError(
                "train.compare_with_teacher compares the student's logits with the teacher's, which returns "
                f"{', '.join(map(repr, teacher.outputs))}; set it to false"
            )
        for split, settings in self._config.data.splits.items():
            transform = settings.transform
            size, dtype = transform.size, getattr(torch, transform.dtype)
            if not teacher.images.accepts((1, 3, size, size), dtype):
                key = key_of(split)
                raise TeacherError(
                    f"{key}.transform makes images {TensorSpec((None, 3, size, size), dtype)}, and the teacher, which "
                    f"is evaluated on them too, takes those of the training, {teacher.images}; give {key}.transform "
                    "the size and dtype of data.train.transform"
                )

    def _open_loader(self, split: str, teacher: Teacher | Recording | None) -> KDDataLoader:
        return self.enter_context(
            _TrainLoader.from_config(
                self._config,
                split,
                teacher=teacher,
                training=self._source,
                plugins=self._plugins,
                run_dir=self._folder.path,
            )
        )

    def _val_loader(self, split: str) -> KDDataLoader:
        """The loader of a split other than `train`."""
        if split not in self._val_loaders:
            self._val_loaders[split] = self._open_loader(split, None)
        return self._val_loaders[split]

    def _evaluation_loader(self, split: str) -> KDDataLoader:
        """The loader of a split for evaluation: of `train` too, whose images are then not augmented."""
        if split == "train" and split not in self._val_loaders:
            data = self._config.data
            train = data.split("train").model_copy(update={"transform": evaluation_split(data)[1]})
            config = self._config.model_copy(update={"data": data.model_copy(update={"train": train})})
            options = {**EACH_IMAGE_ONCE, "shuffle": False, "last_batch": None}
            loader = KDDataLoader.from_config(config, teacher=None, training=self._source, **options)
            self._val_loaders[split] = self.enter_context(loader)
        return self._val_loader(split)

    def _open_student(self, loader: KDDataLoader) -> nn.Module:
        network = self._network
        num_classes = num_classes_for(network, loader.source, loader.teacher)
        student = open_model(
            network, plugins=self._plugins, num_classes=num_classes, is_trained=True, images=normalization_of(loader)
        )
        if num_classes is not None:
            self._network = network.model_copy(update={"num_classes": num_classes})
        if self._config.student_from_teacher and self._stage == "distill":
            copy_teacher_layers(self._config, unadapted(student), plugins=self._plugins)
        if self._plan.probed:
            check_probed(student, loader.example())
        return student.to(PURE_PRECISIONS.get(self._config.train.precision, torch.float32))

    def _build_module(self, student: nn.Module, loader: KDDataLoader, identity: Mapping[str, Any]) -> DistillModule:
        module: DistillModule = build_module(
            DistillModule,
            self._config,
            student,
            loader,
            loader.teacher,
            plugins=self._plugins,
            identity=identity,
            validate=lambda model: self._validate(model, module),
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
        found = self._evaluator.evaluate(
            model,
            module.distillation,
            [split for split in self._evaluated if split != "test"],
            compare=self._config.train.compare_with_teacher,
            with_probe=with_probe,
            bar=progress_bar,
        )
        self._validated = _Validated(trainer.global_step, with_probe, found)
        return found

    def _known_evaluations(self, module: DistillModule, step: int) -> dict[str, Evaluation]:
        """The last validation, if it was that of the best student, and measured all that is known of it."""
        last = self._validated
        if last is None or last.step != step or is_sharded(module.model):
            return {}
        lacks_teacher = self._reference is not None and not self._config.train.compare_with_teacher
        if (lacks_teacher and not self._network.is_headless) or (self._plan.probed and not last.with_probe):
            return {}
        is_best = is_rank_zero() and self._is_best(module.model)
        # Rank zero decides for all, which evaluate together.
        return last.evaluations if module.trainer.strategy.broadcast(is_best) else {}

    def _is_best(self, model: nn.Module) -> bool:
        """Whether these are the weights of the best student, bit by bit."""
        if not self._best_file.is_file():
            return False
        weights, best = model.state_dict(), read_checkpoint(self._best_file)
        return weights.keys() == best.keys() and all(torch.equal(weights[name].cpu(), best[name]) for name in weights)

    def _missing_evaluations(
        self, student: nn.Module, distillation: Distillation, known: Collection[str]
    ) -> dict[str, Evaluation]:
        """The metrics of the exported network on the splits that are not in `known`."""
        missing = [split for split in self._evaluated if split not in known]
        return self._evaluator.evaluate(student, distillation, missing, compare=True, with_probe=True)

    @property
    def _evaluated(self) -> tuple[str, ...]:
        """Splits that the exported network is evaluated on."""
        tests = () if self._config.data.test is None else ("test",)
        return tuple(dict.fromkeys((*self._plan.validated, *self._plan.probed, *tests)))

    def _best_student(self, module: DistillModule, loader: KDDataLoader) -> tuple[nn.Module, Distillation]:
        """The best student, or the last one if none was selected, unsharded, with the projectors that it had."""
        student: nn.Module = module.model
        distillation = module.distillation
        if is_sharded(module.student):
            student = self._open_student(loader)
            distillation = build_distillation(self._config, student, loader, loader.teacher, plugins=self._plugins)
        has_best = self._config.train.select_by is not None and self._best_file.is_file()
        path = self._folder.checkpoints / ("best.ckpt" if has_best else "last.ckpt")
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
    evaluations: dict[str, Evaluation]


def folder_of(config: Config, stage: Stage) -> RunFolder:
    """The folder that `stage` writes into."""
    path = stage_dir(config, stage)
    return RunFolder(path, is_named=path == config.run_dir)


def _stream(loader: KDDataLoader) -> dict[str, Any]:
    """What the stream of batches depends on, without what the identity of a run has anyway."""
    fingerprint: dict[str, Any] = loader.state_dict()["fingerprint"]
    return {name: value for name, value in fingerprint.items() if name not in ("source", "teacher")}
