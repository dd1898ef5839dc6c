"""A run from a config: one stage after the other, each in a folder that says all about it."""

import logging
import math
import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kd_pipeline.config import Config
from kd_pipeline.data.source import open_source
from kd_pipeline.distillation import Distillation
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation import Evaluation, evaluate
from kd_pipeline.loader import KDDataLoader, resolve_device, sample_images
from kd_pipeline.models import ModelSettings, open_model
from kd_pipeline.optional import require
from kd_pipeline.probe import probe_teacher
from kd_pipeline.report.curves import save_confusion, save_curves
from kd_pipeline.teachers import TeacherSettings, open_teacher
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.permuted import matched
from kd_pipeline.training.checkpoint import SaveLastAndBest, atomic_checkpoint_io, check_same_run, load_checkpoint
from kd_pipeline.training.export import export_student
from kd_pipeline.training.folder import RunFolder
from kd_pipeline.training.metrics import MetricsFile
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.signals import StopOnSignal
from kd_pipeline.training.train_settings import LoggerName

__all__ = ["Outcome", "Stage", "train"]

_logger = logging.getLogger("kd_pipeline")
_lightning = require("lightning", extra="train")

Stage = Literal["teacher", "baseline", "distill"]


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
        self._loaders: dict[str, KDDataLoader] = {}
        _quiet()
        self._model = _model_settings(config, stage)

    def do(self) -> Outcome:
        """Train, then export and evaluate the best."""
        config = self._config
        _join_processes()
        _share_cores(_device(config))
        if _is_first():
            self._folder.prepare(config)
            self.enter_context(self._folder.logging())
        torch.use_deterministic_algorithms(config.train.deterministic)
        loader = self._open_loader("train", self._open_teacher() if self._stage == "distill" else None)
        if loader.teacher is not None and config.probe is not None:
            probe_teacher(_untaught(config), loader.teacher, config.probe)
        torch.manual_seed(config.seed % 2**63)  # the weights that the student begins with
        student, settings = self._open_student(loader)
        facts = {
            "stage": self._stage,
            "student": settings.model_dump(mode="json", exclude={"checkpoint", "pretrained"}),
            "teacher": None if loader.teacher is None else loader.teacher.fingerprint,
            "classes": None if loader.classes is None else list(loader.classes),
            "data": loader.source.fingerprint,
        }
        last = self._folder.last
        step = None if last is None else _step_of(last, facts)
        module = self._module(student, loader, facts)
        self._trainer(module, step).fit(module, loader, ckpt_path=last)
        return self._finish(module, settings, loader)

    def _open_teacher(self) -> Teacher:
        config = self._config
        teacher = config.teacher
        if teacher is None:
            raise ConfigError("stage: distill needs a teacher: set teacher, or take stage: baseline")
        if isinstance(teacher, TeacherSettings) and teacher.model is not None:
            teacher = self._with_weights(teacher, teacher.model)
        assert config.data.train is not None
        size, dtype = config.data.train.transform.size, config.data.train.transform.dtype
        opened = open_teacher(
            teacher,
            image_shape=(3, size, size),
            device=_device(config),
            dtype=getattr(torch, dtype),
            batch_size=config.data.batch_size,
            samples=lambda: sample_images(config),
            plugins=self._plugins,
        )
        self.callback(opened.close)
        return opened

    def _with_weights(self, teacher: TeacherSettings, model: ModelSettings) -> TeacherSettings:
        """The teacher's own weights, or else those that `stage: teacher` of this run has left."""
        if model.pretrained or model.checkpoint is not None:
            return teacher
        exported = RunFolder(self._run_dir / "teacher").exported
        weights = exported / "model.safetensors"
        if not weights.is_file():
            raise ConfigError(
                "teacher.model has no weights: set its checkpoint or pretrained, or train it first with stage=teacher, "
                f"which leaves them in {weights}"
            )
        runs_modules = teacher.backend == "pytorch" or teacher.features or self._config.student_from_teacher
        if not runs_modules and (exported / "model.onnx").is_file() and _device(self._config).type == "cpu":
            return teacher.model_copy(update={"model": None, "onnx": exported / "model.onnx"})
        return teacher.model_copy(update={"model": model.model_copy(update={"checkpoint": weights})})

    def _open_loader(self, split: str, teacher: Teacher | None) -> KDDataLoader:
        config = _untaught(self._config).model_copy(update={"run_dir": self._folder.path})
        if teacher is not None:
            train = config.data.train
            assert train is not None
            teacher = matched(teacher, open_source(train.source).classes)
        return self.enter_context(KDDataLoader.from_config(config, split, teacher=teacher))

    def _open_student(self, loader: KDDataLoader) -> tuple[nn.Module, ModelSettings]:
        settings = self._model
        if settings.num_classes is None and settings.factory is None:
            settings = settings.model_copy(update={"num_classes": _num_classes(loader)})
        student = open_model(settings, plugins=self._plugins)
        if self._config.student_from_teacher and self._stage == "distill":
            self._copy_layers(student)
        return student, settings

    def _copy_layers(self, student: nn.Module) -> None:
        """Start layers of the student with the weights of layers of the teacher."""
        teacher = self._config.teacher
        if not isinstance(teacher, TeacherSettings) or teacher.model is None:
            raise ConfigError("student_from_teacher copies weights of a network: give the teacher as teacher.model")
        model = self._with_weights(teacher, teacher.model).model
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
        data = self._config.data
        names = [*(["val"] if data.val is not None else []), *data.more]
        limit = self._config.train.limit_val_batches
        return {
            name: evaluate(model, self._validation_loader(name), reference=teacher, max_batches=limit) for name in names
        }

    def _validation_loader(self, name: str) -> KDDataLoader:
        if name not in self._loaders:
            self._loaders[name] = self._open_loader(name, None)
        return self._loaders[name]

    def _trainer(self, module: DistillModule, step: int | None) -> Any:
        """Lightning's, which goes on from `step` where there is one."""
        train, folder = self._config.train, self._folder
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        has_figures = self._config.data.val is not None or self._config.data.more
        keep = SaveLastAndBest(
            folder.checkpoints,
            student=lambda: dict(module.model.state_dict()),
            monitor=train.select_by if has_figures else None,
            every_n_steps=train.save_every_steps,
        )
        callbacks: list[Any] = [keep, StopOnSignal(keep.save_last)]
        if (stopping := train.early_stopping) is not None:
            callbacks.append(
                _lightning.pytorch.callbacks.EarlyStopping(
                    stopping.metric, mode=stopping.mode, patience=stopping.patience, check_on_train_epoch_end=True
                )
            )
        return _lightning.Trainer(
            accelerator="gpu" if _device(self._config).type == "cuda" else "cpu",
            devices=num_here,
            num_nodes=max(1, _num_processes() // num_here),
            strategy="ddp" if _num_processes() > 1 else "auto",
            sync_batchnorm=train.sync_batchnorm,
            precision=train.precision,
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
            logger=_loggers(train.loggers, folder, step),
            callbacks=callbacks,
            plugins=[atomic_checkpoint_io()],
            default_root_dir=folder.path,
        )

    def _finish(self, module: DistillModule, settings: ModelSettings, loader: KDDataLoader) -> Outcome:
        """Export the best student, or the last one where nothing was measured, and say how good it is."""
        student: nn.Module = module.model
        best = self._folder.checkpoints / "best_student.pt"
        if best.is_file():
            student.load_state_dict(torch.load(best, "cpu", weights_only=True))
        size = loader.transform.size
        figures = self._evaluate(student.to(loader.device), loader.teacher)
        if self._config.data.test is not None:
            figures["test"] = evaluate(student, self._validation_loader("test"), reference=loader.teacher)
        if _is_first():
            self._folder.write_result({name: each.to_dict() for name, each in figures.items()})
            save_curves(self._folder.metrics, self._folder.path / "curves.png")
            for name, each in figures.items():
                if each.confusion is not None:
                    save_confusion(each.confusion, each.classes, self._folder.path / f"confusion_{name}.png")
            split = self._config.data.val or self._config.data.train
            assert split is not None  # as __init__ has seen
            export_student(
                student.float().cpu().eval(),
                settings,
                self._folder.exported,
                image_shape=(3, size, size),
                classes=loader.classes,
                transform=split.transform.model_dump(mode="json"),
            )
        return Outcome(self._stage, self._folder.path, figures)


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


def _device(config: Config) -> torch.device:
    return resolve_device(config.data.device)


def _untaught(config: Config) -> Config:
    return config.model_copy(update={"teacher": None})


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _join_processes() -> None:
    """Meet the other processes that `torchrun` has started, before the loader asks which shard is ours."""
    if _num_processes() > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _share_cores(device: torch.device) -> None:
    """On a CPU, leave half of the cores to DALI and the teacher.

    Threads of torch's that wait for one another keep their cores busy; beside DALI's on the same cores, a step of a
    small network takes ten times as long.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))


def _quiet() -> None:
    """Hear Lightning's warnings, without its advice on other products and on loaders that are not ours."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*litlogger.*")


def _loggers(names: Collection[LoggerName], folder: RunFolder, step: int | None) -> list[Any]:
    """Lightning's loggers by name, and our own for `metrics.csv`."""
    loggers = require("lightning.pytorch.loggers", extra="train")
    found: list[Any] = []
    for name in dict.fromkeys(names):
        match name:
            case "csv":
                metrics = MetricsFile(folder.metrics)
                if step is not None:
                    metrics.go_on_from(step)
                found.append(metrics)
            case "tensorboard":
                try:
                    found.append(loggers.TensorBoardLogger(folder.path, name="tensorboard", version=""))
                except ModuleNotFoundError:
                    _logger.info("no TensorBoard logs: pip install tensorboard")
            case "wandb":
                found.append(loggers.WandbLogger(name=folder.path.name, save_dir=folder.path))
            case "comet":
                found.append(loggers.CometLogger(name=folder.path.name))
            case "mlflow":
                found.append(
                    loggers.MLFlowLogger(run_name=folder.path.name, tracking_uri=f"file:{folder.path / 'mlruns'}")
                )
    return found
