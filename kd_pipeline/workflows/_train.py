"""Train from a config: run its stages, each in a folder of its own that can be resumed and reproduced."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.ranks import is_rank_zero, world_size
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.config.config import Config
from kd_pipeline.data.settings import DataSettings
from kd_pipeline.data.sources import open_source
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, MissingPackageError
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate, open_metrics
from kd_pipeline.evaluation.probe import probe_teacher
from kd_pipeline.loader.loader import KDDataLoader, sample_images
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.report.plots import plot_confusion, plot_curves
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.teachers.tensorrt.parity import CalibrationSet
from kd_pipeline.training.checkpoint import check_same_run, load_checkpoint
from kd_pipeline.training.distributed import init_distributed, set_num_threads
from kd_pipeline.training.loggers import log_results, log_settings
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.sharding import is_sharded
from kd_pipeline.training.trainer import PURE_PRECISIONS, build_trainer
from kd_pipeline.workflows.exported import export_student
from kd_pipeline.workflows.teacher import check_no_input_adapter, open_run_teacher, with_trained_weights

__all__ = ["Stage", "TrainResult", "train"]

_logger = logging.getLogger("kd_pipeline")

Stage = Literal["teacher", "baseline", "distill"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The outcome of a stage."""

    stage: Stage
    folder: Path
    evaluations: Mapping[str, Evaluation]
    """Of the exported network, by validation split, and `test` if there is one."""


def train(config: Config, *, plugins: Collection[str] = ()) -> TrainResult:
    """Run the stage that `config` names, or resume it from the last checkpoint in its folder.

    `distill` writes into `run_dir`, `teacher` and `baseline` into subfolders of these names.

    Args:
        config: the whole run.
        plugins: modules that factories and losses in the config may come from.

    Returns:
        The result of the last stage.

    Raises:
        ConfigError: the config lacks something that this stage needs.
        StateError: the folder holds a run with a different dataset, teacher or student.
        DataError, TeacherError: the data or the teacher does not match the config.
        SystemExit: a signal stopped the run, which was saved: 143 for SIGTERM and SIGUSR1, 130 for Ctrl-C.
    """
    stages: tuple[Stage, ...] = ("teacher", "distill") if config.stage == "all" else (config.stage,)
    for stage in stages:
        with _StageRun(config, stage, plugins) as run:
            result = run.run()
    return result


class _StageRun(ExitStack):
    """One stage, from opening the data to exporting the student. Leaving the context closes what it opened."""

    def __init__(self, config: Config, stage: Stage, plugins: Collection[str]) -> None:
        super().__init__()
        if config.run_dir is None:
            raise ConfigError("a run needs a folder: set run_dir, such as run_dir: runs/mine")
        if config.data.train is None:
            raise ConfigError("a run needs images to train on: set data.train")
        self._config = config.model_copy(update={"stage": stage})
        self._stage, self._plugins = stage, plugins
        self._folder = RunFolder(config.run_dir if stage == "distill" else config.run_dir / stage)
        self._val_loaders: dict[str, KDDataLoader] = {}
        self._reference: Teacher | None = None
        """The teacher for validation images; None for a recording, which has no outputs for them."""
        # Everything below fails now rather than after the first epoch.
        self._metrics = open_metrics(config.train.metrics, plugins=plugins)
        if (engine := config.train.export.engine) is not None:
            open_tensorrt(engine.runtime)
        self._model_settings = _model_settings(config, stage)
        _check_sync_batchnorm(config)
        _check_metric_names(self._config)

    def run(self) -> TrainResult:
        """Train, then export and evaluate the best student."""
        config = self._config
        init_distributed()
        set_num_threads(config.train.num_threads)
        if is_rank_zero():
            self._folder.prepare(config)
            self.enter_context(self._folder.logging())
        torch.use_deterministic_algorithms(config.train.deterministic)
        self._source = open_source(config.data.split("train").source)
        loader = self._open_loader("train", self._open_teacher() if self._stage == "distill" else None)
        if loader.teacher is not None and config.probe is not None:
            probe_teacher(config, loader.teacher, config.probe, training=self._source)
        torch.manual_seed(config.seed % 2**63)  # for the initial weights of the student
        student = self._open_student(loader)
        identity = {
            "stage": self._stage,
            "student": self._model_settings.model_dump(mode="json", exclude={"checkpoint", "pretrained", "reset"}),
            "teacher": None if loader.teacher is None else loader.teacher.fingerprint,
            "classes": None if loader.classes is None else list(loader.classes),
            "data": loader.source.fingerprint,
        }
        last = self._folder.last_checkpoint
        step = None if last is None else _resume_step(last, identity)
        module = self._build_module(student, loader, identity)
        trainer = build_trainer(
            config.train,
            module,
            self._folder,
            device=loader.device,
            has_validation=bool(config.data.validated),
            resume_step=step,
        )
        if is_rank_zero():
            log_settings(trainer.loggers, config)
        trainer.fit(module, loader, ckpt_path=last)
        student = self._best_student(module, loader)
        splits = (*config.data.validated, *(() if config.data.test is None else ("test",)))
        evaluations = self._evaluate(student.to(loader.device), splits, self._reference)
        if is_rank_zero():
            self._write_results(student, loader.classes, evaluations)
            log_results(trainer.loggers, config, evaluations, trainer.global_step)
        return TrainResult(self._stage, self._folder.path, evaluations)

    def _open_teacher(self) -> Teacher | Recording:
        train = self._config.train
        teacher = open_run_teacher(self._config, classes=self._source.classes, plugins=self._plugins)
        self.callback(teacher.close)
        if isinstance(teacher, Teacher):
            self._reference = teacher
        else:
            if teacher.num_epochs < train.epochs:
                raise ConfigError(
                    f"train.epochs is {train.epochs} and the recording in {teacher.path} has {teacher.num_epochs} "
                    "complete epochs; train for fewer, or record more: kd-pipeline record resumes where it stopped"
                )
            if train.compare_with_teacher:
                raise ConfigError(
                    "train.compare_with_teacher runs the teacher on validation images, and a recording has outputs "
                    "for training images only; set it to false"
                )
        return teacher

    def _open_loader(self, split: str, teacher: Teacher | Recording | None) -> KDDataLoader:
        return self.enter_context(
            KDDataLoader.from_config(
                self._config, split, teacher=teacher, training=self._source, run_dir=self._folder.path
            )
        )

    def _open_student(self, loader: KDDataLoader) -> nn.Module:
        settings = self._model_settings
        num_classes = _num_classes(loader) if settings.num_classes is None and settings.factory is None else None
        student = open_model(settings, plugins=self._plugins, num_classes=num_classes)
        if num_classes is not None:
            self._model_settings = settings.model_copy(update={"num_classes": num_classes})
        if self._config.student_from_teacher and self._stage == "distill":
            self._copy_teacher_layers(student)
        return student.to(PURE_PRECISIONS.get(self._config.train.precision, torch.float32))

    def _copy_teacher_layers(self, student: nn.Module) -> None:
        """Initialize layers of the student with the weights of teacher layers."""
        settings = self._config.teacher
        if not isinstance(settings, TeacherSettings) or settings.model is None:
            raise ConfigError("student_from_teacher copies weights of a network: set teacher.model")
        model = with_trained_weights(self._config, settings).model
        assert model is not None
        teacher_state = open_model(model, plugins=self._plugins).state_dict()
        state = student.state_dict()
        for layer, source in self._config.student_from_teacher.items():
            copied = {
                f"{layer}{name.removeprefix(source)}": weight
                for name, weight in teacher_state.items()
                if name.startswith(f"{source}.")
            }
            shapes = {name: weight.shape for name, weight in state.items() if name.startswith(f"{layer}.")}
            if not shapes or {name: weight.shape for name, weight in copied.items()} != shapes:
                raise ConfigError(
                    f"student_from_teacher: the student's layer {layer!r} ({len(shapes)} tensors) does not match the "
                    f"teacher's layer {source!r} ({len(copied)} tensors)"
                )
            state.update(copied)
        student.load_state_dict(state)

    def _build_module(self, student: nn.Module, loader: KDDataLoader, identity: Mapping[str, Any]) -> DistillModule:
        config, teacher = self._config, loader.teacher
        size = loader.transform.size
        distillation = Distillation(
            config.distill,
            student=student,
            teacher_outputs=None if teacher is None else teacher.outputs,
            image_shape=(3, size, size),
            num_classes=_num_classes(loader),
            labels_are_soft=loader.mix is not None,
            plugins=self._plugins,
        )
        num_batches = min(len(loader), config.train.limit_train_batches or len(loader))
        return DistillModule(
            student,
            distillation,
            config.train,
            steps_per_epoch=math.ceil(num_batches / config.train.accumulate),
            teacher=teacher,
            identity=identity,
            validate=lambda model: self._evaluate(
                model, config.data.validated, self._reference if config.train.compare_with_teacher else None
            ),
        )

    def _evaluate(self, model: nn.Module, splits: Sequence[str], teacher: Teacher | None) -> dict[str, Evaluation]:
        found: dict[str, Evaluation] = {}
        for split in splits:
            if split not in self._val_loaders:
                self._val_loaders[split] = self._open_loader(split, None)
            limit = None if split == "test" else self._config.train.limit_val_batches
            loader = self._val_loaders[split]
            found[split] = evaluate(model, loader, reference=teacher, metrics=self._metrics, max_batches=limit)
        return found

    def _best_student(self, module: DistillModule, loader: KDDataLoader) -> nn.Module:
        """The best student, or the last one if there was no validation, unsharded."""
        student: nn.Module = module.model
        if is_sharded(student):
            student = self._open_student(loader)
            state = load_checkpoint(self._folder.checkpoints / "last.ckpt")["state_dict"]
            student.load_state_dict({name: state[f"student.{name}"] for name in student.state_dict()})
        best = self._folder.checkpoints / "best_student.pt"
        if best.is_file():
            student.load_state_dict(read_checkpoint(best))
        return student

    def _write_results(
        self, student: nn.Module, classes: tuple[str, ...] | None, evaluations: Mapping[str, Evaluation]
    ) -> None:
        """Write `result.json`, the plots and the exported student."""
        split, transform = _evaluation_split(self._config.data)
        self._folder.write_result({name: each.to_dict() for name, each in evaluations.items()})
        self._plot(evaluations)
        export_student(
            student.float().cpu().eval(),
            self._model_settings,
            self._folder.exported,
            classes=classes,
            transform=transform,
            calibration_set=lambda: CalibrationSet(sample_images(self._config, split), f"the split {split} of the run"),
            export=self._config.train.export,
        )

    def _plot(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Plot the curves of the run and the confusion matrix of each split, if matplotlib is installed."""
        folder = self._folder.path
        try:
            plot_curves(self._folder.metrics).savefig(folder / "curves.png")
            for name, each in evaluations.items():
                if each.confusion is not None:
                    plot_confusion(each.confusion, each.classes).savefig(folder / f"confusion_{name}.png")
        except MissingPackageError as exc:
            _logger.warning("no plots were saved: %s", exc)


def _check_sync_batchnorm(config: Config) -> None:
    if config.train.sync_batchnorm and world_size() > 1 and resolve_device(config.data.device).type == "cpu":
        raise ConfigError(
            f"train.sync_batchnorm: torch synchronizes BatchNorm on GPUs only, and this run uses {world_size()} CPU "
            "processes; set it to false, or data.device to cuda"
        )


def _check_metric_names(config: Config) -> None:
    """Refuse to select or stop by a metric that is not measured."""
    train, splits = config.train, config.data.validated
    if any(metric.is_custom for metric in train.metrics):
        return  # its names are not known before it is called
    names = ["top1", "top5", "macro_f1", "loss", *(metric.name for metric in train.metrics)]
    if train.compare_with_teacher and config.stage == "distill":
        names += ["agreement", "kl"]
    known = [f"{split}/{name}" for split in splits for name in names]
    wanted = {"select_by": train.select_by if splits else None}
    if train.early_stopping is not None:
        wanted["early_stopping.metric"] = train.early_stopping.metric
    for key, metric in wanted.items():
        if metric is not None and not metric.startswith("train/") and metric not in known:
            raise ConfigError(f"train.{key}: {metric!r} is not measured{suggest(metric, known)}")


def _model_settings(config: Config, stage: Stage) -> ModelSettings:
    """The network that this stage trains."""
    if stage != "teacher":
        if config.student is None:
            raise ConfigError("there is no student to train: set student, such as student: {timm: resnet18}")
        return config.student
    if not isinstance(config.teacher, TeacherSettings) or config.teacher.model is None:
        raise ConfigError(
            "stage: teacher trains the network of teacher.model, such as teacher: {model: {timm: resnet50}}"
        )
    check_no_input_adapter(config.teacher)
    return config.teacher.model


def _resume_step(last: Path, identity: Mapping[str, Any]) -> int:
    """The step of the checkpoint `last`, after checking that it belongs to this run."""
    checkpoint = load_checkpoint(last)
    check_same_run(checkpoint.get("run", {}), identity)
    _logger.info("resuming from %s", last)
    return int(checkpoint["global_step"])


def _num_classes(loader: KDDataLoader) -> int:
    """From the data, or from the teacher if the images have no labels."""
    num_classes = loader.source.num_classes
    if num_classes is None and loader.teacher is not None:
        num_classes = loader.teacher.outputs["logits"].shape[1]
    if num_classes is None:
        raise ConfigError("neither the data nor the teacher has a number of classes; set the classes of the source")
    return num_classes


def _evaluation_split(data: DataSettings) -> tuple[str, EvalTransform]:
    """The split whose images the export is for: `val`, else `test`, else `train` with the usual transform."""
    for name, split in (("val", data.val), ("test", data.test)):
        if split is not None and isinstance(split.transform, EvalTransform):
            return name, split.transform
    train = data.split("train").transform
    return "train", EvalTransform(
        size=train.size,
        interpolation=train.interpolation,
        mean=train.mean,
        std=train.std,
        dtype=train.dtype,
        orientation=train.orientation,
    )
