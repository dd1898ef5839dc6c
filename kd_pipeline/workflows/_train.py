"""A run from a config: one stage after the other, each in a folder that says all about it."""

import logging
import math
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.config.config import Config
from kd_pipeline.data.settings import DataSettings, Untaught
from kd_pipeline.data.sources.base import open_source
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate, open_metrics
from kd_pipeline.evaluation.probe import probe_teacher
from kd_pipeline.loader.loader import KDDataLoader, sample_images
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.report.curves import save_confusion, save_curves
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import matched
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.teachers.tensorrt.parity import Samples
from kd_pipeline.training.checkpoint import SaveLastAndBest, atomic_checkpoint_io, check_same_run, load_checkpoint
from kd_pipeline.training.distributed import (
    is_first,
    join_processes,
    num_machines,
    num_processes,
    num_processes_here,
    use_cores,
)
from kd_pipeline.training.early_stopping import StopEarly
from kd_pipeline.training.loggers import log_outcome, log_settings, open_loggers
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.sharding import is_sharded, whole_weights
from kd_pipeline.training.signals import StopOnSignal
from kd_pipeline.workflows.exported import export_student
from kd_pipeline.workflows.teacher import open_run_teacher, refuse_adapter, with_trained_weights

__all__ = ["Outcome", "Stage", "train"]

_logger = logging.getLogger("kd_pipeline")
_lightning = require("lightning", extra="train")

Stage = Literal["teacher", "baseline", "distill"]

_PURE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions in which the student's very weights are kept."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a stage."""

    stage: Stage
    folder: Path
    figures: Mapping[str, Evaluation]
    """Of the exported network, by validation set."""


def train(config: Config, *, plugins: Collection[str] = ()) -> Outcome:
    """Do the stage that `config` names, going on where an earlier run in its folder was stopped.

    `distill` writes into `run_dir`, `teacher` and `baseline` into folders of these names below it.

    Args:
        config: the whole run.
        plugins: modules that factories and losses in the config may come from.

    Returns:
        What came of the last stage.

    Raises:
        ConfigError: the config is not enough for this stage.
        StateError: the folder holds a run on other data, with another teacher or student.
        DataError, TeacherError: the data or the teacher is not what the config says.
        SystemExit: a signal stopped the run, which was saved: 143 for SIGTERM and SIGUSR1, 130 for Ctrl-C.
    """
    stages: tuple[Stage, ...] = ("teacher", "distill") if config.stage == "all" else (config.stage,)
    for stage in stages:
        with _Run(config, stage, plugins) as run:
            outcome = run.do()
    return outcome


class _Run(ExitStack):
    """One stage, from opening the data to the exported network; leaving it closes what was opened."""

    def __init__(self, config: Config, stage: Stage, plugins: Collection[str]) -> None:
        super().__init__()
        if config.run_dir is None:
            raise ConfigError("a run needs a folder: set run_dir, such as run_dir: runs/mine")
        if config.data.train is None:
            raise ConfigError("a run needs images to train on: set data.train")
        self._run_dir = config.run_dir
        self._folder = RunFolder(config.run_dir if stage == "distill" else config.run_dir / stage)
        self._config = config.model_copy(update={"stage": stage})
        self._stage, self._plugins = stage, plugins
        self._metrics = open_metrics(config.train.metrics, plugins=plugins)
        if (engine := config.train.export.engine) is not None:
            open_tensorrt(engine.runtime)  # a package that is missing is told now and not after the last epoch
        self._loaders: dict[str, KDDataLoader] = {}
        _quiet()
        self._model = _model_settings(config, stage)
        _check_batchnorm(config)
        _check_figures(self._config)

    def do(self) -> Outcome:
        """Train, then export and evaluate the best."""
        config = self._config
        join_processes()
        use_cores(config.train.num_threads)
        if is_first():
            self._folder.prepare(config)
            self.enter_context(self._folder.logging())
        torch.use_deterministic_algorithms(config.train.deterministic)
        assert config.data.train is not None  # as __init__ has seen
        self._source = open_source(config.data.train.source)
        loader = self._open_loader("train", self._open_teacher() if self._stage == "distill" else None)
        if loader.teacher is not None and config.probe is not None:
            probe_teacher(config, loader.teacher, config.probe, training=self._source)
        torch.manual_seed(config.seed % 2**63)  # the weights that the student begins with
        student, settings = self._open_student(loader)
        facts = {
            "stage": self._stage,
            "student": settings.model_dump(mode="json", exclude={"checkpoint", "pretrained", "reset"}),
            "teacher": None if loader.teacher is None else loader.teacher.fingerprint,
            "classes": None if loader.classes is None else list(loader.classes),
            "data": loader.source.fingerprint,
        }
        last = self._folder.last
        step = None if last is None else _step_of(last, facts)
        module = self._module(student, loader, facts)
        trainer = self._trainer(module, step)
        if is_first():
            log_settings(trainer.loggers, config)
        trainer.fit(module, loader, ckpt_path=last)
        outcome = self._finish(module, settings, loader)
        if is_first():
            log_outcome(trainer.loggers, config, outcome.figures, trainer.global_step)
        return outcome

    def _open_teacher(self) -> Teacher:
        train = self._config.train
        opened = open_run_teacher(self._config, plugins=self._plugins)
        self.callback(opened.close)
        if isinstance(opened, RecordedTeacher):
            if opened.num_epochs < train.epochs:
                raise ConfigError(
                    f"train.epochs is {train.epochs} and the recording in {opened.path} has {opened.num_epochs} whole "
                    "epochs; train for fewer, or record more with kd-pipeline record, which goes on where it stopped"
                )
            if train.compare_with_teacher:
                raise ConfigError(
                    "train.compare_with_teacher asks the teacher about validation images, and a recorded teacher has "
                    "answers for training images alone; set it to false"
                )
        return opened

    def _open_loader(self, split: str, teacher: Teacher | None) -> KDDataLoader:
        config = Untaught(self._config.seed, self._config.data, self._folder.path)
        if teacher is not None:
            teacher = matched(teacher, self._source.classes)
        return self.enter_context(KDDataLoader.from_config(config, split, teacher=teacher, training=self._source))

    def _open_student(self, loader: KDDataLoader) -> tuple[nn.Module, ModelSettings]:
        settings = self._model
        if settings.num_classes is None and settings.factory is None:
            settings = settings.model_copy(update={"num_classes": _num_classes(loader)})
        student = open_model(settings, plugins=self._plugins)
        if self._config.student_from_teacher and self._stage == "distill":
            self._copy_layers(student)
        return student.to(_PURE.get(self._config.train.precision, torch.float32)), settings

    def _copy_layers(self, student: nn.Module) -> None:
        """Start layers of the student with the weights of layers of the teacher."""
        teacher = self._config.teacher
        if not isinstance(teacher, TeacherSettings) or teacher.model is None:
            raise ConfigError("student_from_teacher copies weights of a network: give the teacher as teacher.model")
        model = with_trained_weights(self._config, teacher).model
        assert model is not None
        weights = open_model(model, plugins=self._plugins).state_dict()
        own = student.state_dict()
        for to, source in self._config.student_from_teacher.items():
            found = {
                f"{to}{name.removeprefix(source)}": weight
                for name, weight in weights.items()
                if name.startswith(f"{source}.")
            }
            wanted = {name: weight.shape for name, weight in own.items() if name.startswith(f"{to}.")}
            if not wanted or {name: weight.shape for name, weight in found.items()} != wanted:
                raise ConfigError(
                    f"student_from_teacher: the student's layer {to!r} ({len(wanted)} tensors) is not built like the "
                    f"teacher's layer {source!r} ({len(found)} tensors)"
                )
            own.update(found)
        student.load_state_dict(own)

    def _module(self, student: nn.Module, loader: KDDataLoader, facts: Mapping[str, Any]) -> DistillModule:
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
            facts=facts,
            validate=lambda model: self._evaluate(model, teacher if config.train.compare_with_teacher else None),
        )

    def _evaluate(self, model: nn.Module, teacher: Teacher | None) -> dict[str, Evaluation]:
        """On every split but the training and the test images."""
        limit = self._config.train.limit_val_batches
        return {
            name: evaluate(
                model, self._validation_loader(name), reference=teacher, metrics=self._metrics, max_batches=limit
            )
            for name in self._config.data.validated
        }

    def _validation_loader(self, name: str) -> KDDataLoader:
        if name not in self._loaders:
            self._loaders[name] = self._open_loader(name, None)
        return self._loaders[name]

    def _trainer(self, module: DistillModule, step: int | None) -> Any:
        """Lightning's, which goes on from `step` where there is one."""
        train, folder = self._config.train, self._folder
        has_figures = bool(self._config.data.validated)
        keep = SaveLastAndBest(
            folder.checkpoints,
            student=lambda: whole_weights(module.model),
            monitor=train.select_by if has_figures else None,
            mode=train.select_mode,
            every_n_steps=train.save_every_steps,
            validate=module.validate_now if has_figures else None,
            validate_every_n_steps=train.validate_every_steps,
        )
        stopping = [] if train.early_stopping is None else [StopEarly(train.early_stopping)]
        return _lightning.Trainer(
            accelerator="gpu" if _device(self._config).type == "cuda" else "cpu",
            devices=num_processes_here(),
            num_nodes=num_machines(),
            strategy=_strategy(train.strategy),
            sync_batchnorm=train.sync_batchnorm,
            # Lightning converts whole batches for these, the labels' weights and the teacher's answers among them.
            precision="32-true" if train.precision in _PURE else train.precision,
            max_epochs=train.epochs,
            accumulate_grad_batches=train.accumulate,
            gradient_clip_val=train.clip,
            deterministic=train.deterministic,
            limit_train_batches=train.limit_train_batches or 1.0,
            log_every_n_steps=train.log_every_steps,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=True,
            logger=open_loggers(train.loggers, folder, step),
            callbacks=[*stopping, keep, StopOnSignal(keep.save_last)],
            plugins=[atomic_checkpoint_io(), _cluster()],
            default_root_dir=folder.path,
        )

    def _finish(self, module: DistillModule, settings: ModelSettings, loader: KDDataLoader) -> Outcome:
        """Export the best student, or the last one where nothing was measured, and say how good it is."""
        student: nn.Module = module.model
        best = self._folder.checkpoints / "best_student.pt"
        if is_sharded(student):
            student, _ = self._open_student(loader)
            last = load_checkpoint(self._folder.checkpoints / "last.ckpt")["state_dict"]
            mine = {name: last[f"student.{name}"] for name in student.state_dict()}
            student.load_state_dict(mine)
        if best.is_file():
            student.load_state_dict(torch.load(best, "cpu", weights_only=True))
        # A recorded teacher has no answers for these images.
        reference = None if isinstance(loader.teacher, RecordedTeacher) else loader.teacher
        figures = self._evaluate(student.to(loader.device), reference)
        if self._config.data.test is not None:
            figures["test"] = evaluate(
                student, self._validation_loader("test"), reference=reference, metrics=self._metrics
            )
        if is_first():
            split, transform = _evaluation_split(self._config.data)
            self._folder.write_result({name: each.to_dict() for name, each in figures.items()})
            save_curves(self._folder.metrics, self._folder.path / "curves.png")
            for name, each in figures.items():
                if each.confusion is not None:
                    save_confusion(each.confusion, each.classes, self._folder.path / f"confusion_{name}.png")
            export_student(
                student.float().cpu().eval(),
                settings,
                self._folder.exported,
                classes=loader.classes,
                transform=transform,
                samples=lambda: Samples(sample_images(self._config, split), f"the split {split} of the run"),
                wanted=self._config.train.export,
            )
        return Outcome(self._stage, self._folder.path, figures)


def _check_batchnorm(config: Config) -> None:
    if config.train.sync_batchnorm and num_processes() > 1 and _device(config).type == "cpu":
        raise ConfigError(
            f"train.sync_batchnorm: torch synchronizes BatchNorm on GPUs only, and this run is on {num_processes()} "
            "processes of a CPU; set it to false, or data.device to cuda"
        )


def _check_figures(config: Config) -> None:
    """Refuse to choose by a figure that no validation measures, before an epoch is spent on it."""
    train, splits = config.train, config.data.validated
    if any(metric.names_a_function for metric in train.metrics):
        return  # what it returns is known when it has been called
    figures = ["top1", "top5", "macro_f1", "loss", *(metric.name for metric in train.metrics)]
    if train.compare_with_teacher and config.stage == "distill":
        figures += ["agreement", "kl"]
    known = [f"{split}/{figure}" for split in splits for figure in figures]
    wanted = {"select_by": train.select_by if splits else None}
    if train.early_stopping is not None:
        wanted["early_stopping.metric"] = train.early_stopping.metric
    for key, figure in wanted.items():
        if figure is not None and not figure.startswith("train/") and figure not in known:
            raise ConfigError(f"train.{key}: nothing measures {figure!r}{suggest(figure, known)}")


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
    refuse_adapter(config.teacher)
    return config.teacher.model


def _step_of(last: Path, facts: Mapping[str, Any]) -> int:
    """The step at which the checkpoint `last` was saved, once it is known to belong to this run."""
    checkpoint = load_checkpoint(last)
    check_same_run(checkpoint.get("run", {}), facts)
    _logger.info("going on from %s", last)
    return int(checkpoint["global_step"])


def _num_classes(loader: KDDataLoader) -> int:
    """Of the data, or of the teacher where the images have no labels."""
    if loader.source.num_classes is not None:
        return loader.source.num_classes
    size = None if loader.teacher is None else loader.teacher.outputs["logits"].shape[1]
    if size is None:
        raise ConfigError("neither the data nor the teacher says how many classes there are; give the source classes")
    return size


def _evaluation_split(data: DataSettings) -> tuple[str, EvalTransform]:
    """What images are exported for: those of `val`, else of `test`, else of `train` by the usual transform."""
    for name, split in (("val", data.val), ("test", data.test)):
        if split is not None and isinstance(split.transform, EvalTransform):
            return name, split.transform
    assert data.train is not None  # as the run has seen
    train = data.train.transform
    return "train", EvalTransform(
        size=train.size, interpolation=train.interpolation, mean=train.mean, std=train.std, dtype=train.dtype
    )


def _device(config: Config) -> torch.device:
    return resolve_device(config.data.device)


def _strategy(name: Literal["ddp", "fsdp"]) -> Any:
    """Lightning's, where there is more than one process."""
    if num_processes() == 1:
        return "auto"
    if name == "ddp":
        return "ddp"
    # One file with everything in it, which any number of processes resumes from.
    return _lightning.pytorch.strategies.ModelParallelStrategy(
        data_parallel_size=num_processes(), tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _cluster() -> Any:
    """How Lightning learns of the other processes: not from SLURM, which it would ask by itself and otherwise."""
    environments = require("lightning.fabric.plugins.environments", extra="train")
    return environments.TorchElasticEnvironment() if num_processes() > 1 else environments.LightningEnvironment()


def _quiet() -> None:
    """Hear Lightning's warnings, without its advice on other products and on loaders that are not ours."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
