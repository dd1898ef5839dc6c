"""Lightning's `Trainer` for a run: devices, strategy, callbacks, loggers and checkpoints from the settings."""

import logging
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from kd_pipeline._core.optional import require
from kd_pipeline._core.ranks import local_world_size, num_nodes, world_size
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO, SaveLastAndBest
from kd_pipeline.training.early_stopping import StopEarly
from kd_pipeline.training.loggers import open_loggers
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_story import RunStory
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.training.sharding import full_state_dict
from kd_pipeline.training.signals import Signals, StopOnSignal

__all__ = ["PURE_PRECISIONS", "build_trainer", "build_trial_trainer", "check_lightning", "set_deterministic"]

_lightning = require("lightning", extra="train")
_environments = require("lightning.fabric.plugins.environments", extra="train")

PURE_PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions that the student's weights are stored in."""


def set_deterministic(is_deterministic: bool) -> None:
    """Refuse operations whose result may differ from run to run, or allow them; call it before the teacher is opened.

    torch reads cuBLAS's setting at the first matrix product of the process, and Lightning makes it after that of the
    teacher.
    """
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_deterministic)


def check_lightning(callbacks: Iterable[object], loggers: Iterable[object]) -> None:
    """Check that these are Lightning's.

    Raises:
        ConfigError: one is not.
    """
    kinds = require("lightning.pytorch.callbacks", extra="train"), require("lightning.pytorch.loggers", extra="train")
    for name, parts, kind in (("callbacks", callbacks, kinds[0].Callback), ("loggers", loggers, kinds[1].Logger)):
        for part in parts:
            if not isinstance(part, kind):
                raise ConfigError(
                    f"{name} should be lightning.pytorch.{name}.{kind.__name__} objects, got "
                    f"{type(part).__qualname__}; take those of the package lightning, not of pytorch_lightning"
                )


def build_trainer(
    settings: TrainSettings,
    module: DistillModule,
    folder: RunFolder,
    *,
    device: torch.device,
    has_validation: bool,
    resume_step: int | None,
    sparse_metrics: Collection[str] = (),
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Any] = (),
    default_metrics: Mapping[str, Literal["max", "min"]] | None = None,
    signals: Signals | None = None,
) -> Any:
    """A `lightning.Trainer` for `module`; several processes must have been initialized by `init_distributed`.

    Args:
        settings: how to train.
        module: what to train.
        folder: where checkpoints and logs go.
        device: of the batches.
        has_validation: whether `module` has validation sets.
        resume_step: the step that the run resumes from, or None.
        sparse_metrics: names of those that not every validation measures.
        callbacks: more of Lightning's callbacks, which come before those that stop and save.
        loggers: more of Lightning's loggers.
        default_metrics: metrics with their modes of which the first that is measured selects the best student, if the
            settings name none.
        signals: those that are received, if the caller handles them.
    """
    _silence_lightning()
    if settings.average_best is not None and settings.select_by is None and default_metrics is None:
        raise ConfigError(
            "train.average_best averages the students after the best validations, and no metric says which these are; "
            "add a validation set, or remove it"
        )

    def is_measured(metric: str) -> bool:
        return metric not in sparse_metrics or metric in module.measured

    checkpoints = SaveLastAndBest(
        folder.checkpoints,
        student=lambda: full_state_dict(module.model),
        monitor=settings.select_by,
        mode=settings.select_mode or "max",
        defaults=default_metrics,
        every_n_steps=settings.save_every_steps,
        validate=module.validate_now if has_validation else None,
        validate_every_n_steps=settings.validate_every_steps,
        is_measured=is_measured,
        average_best=settings.average_best,
    )
    stopping = settings.early_stopping
    early_stopping = [] if stopping is None else [StopEarly(stopping, is_measured=is_measured)]
    # Left to itself, Lightning would detect SLURM and set the processes up again, differently.
    is_distributed = world_size() > 1
    # Without a launcher, its variables are left over, and Lightning would start processes of its own.
    devices = local_world_size() if is_distributed else _own_device(device)
    environment = _environments.TorchElasticEnvironment() if is_distributed else _environments.LightningEnvironment()
    return _lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        num_nodes=num_nodes(),
        strategy=_strategy(settings.strategy, has_unreached=bool(module.unreached)) if is_distributed else "auto",
        sync_batchnorm=settings.sync_batchnorm,
        # With a pure precision Lightning would convert whole batches, mixed labels and teacher outputs included.
        precision="32-true" if settings.precision in PURE_PRECISIONS else settings.precision,
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        deterministic=settings.deterministic,
        limit_train_batches=settings.limit_train_batches or 1.0,
        log_every_n_steps=settings.log_every_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=[*open_loggers(settings.loggers, folder, resume_step), *loggers],
        enable_progress_bar=any(isinstance(each, _progress_bar_kind()) for each in callbacks),
        callbacks=[
            *callbacks,
            *early_stopping,
            checkpoints,
            RunStory(checkpoints, epochs=settings.epochs),
            StopOnSignal(checkpoints.save_last, signals),
        ],
        plugins=[AtomicCheckpointIO(), environment],
        default_root_dir=folder.path,
    )


def build_trial_trainer(settings: TrainSettings, *, device: torch.device) -> Any:
    """A `lightning.Trainer` that takes the steps of a run on `device` in this process, and writes and shows nothing.

    It trains for one epoch of what it is given, without checkpoints, loggers, progress or early stopping.
    """
    _silence_lightning()
    return _lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=_own_device(device),
        precision="32-true" if settings.precision in PURE_PRECISIONS else settings.precision,
        max_epochs=1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        deterministic=settings.deterministic,
        log_every_n_steps=settings.log_every_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        plugins=[_environments.LightningEnvironment()],
    )


def _own_device(device: torch.device) -> list[int] | int:
    """Lightning's `devices` for this process alone."""
    return [device.index or 0] if device.type == "cuda" else 1


def _progress_bar_kind() -> type:
    """Lightning's progress bars, of which a user may give one."""
    kind: type = require("lightning.pytorch.callbacks", extra="train").ProgressBar
    return kind


def _strategy(name: Literal["ddp", "fsdp"], *, has_unreached: bool) -> Any:
    if name == "ddp":
        # It waits for the gradient of every parameter, unless it looks in each step for those that get none.
        return _lightning.pytorch.strategies.DDPStrategy(find_unused_parameters=has_unreached)
    # One full checkpoint file, from which any number of processes can resume.
    return _lightning.pytorch.strategies.ModelParallelStrategy(
        data_parallel_size=world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _silence_lightning() -> None:
    """Keep Lightning's warnings but not its tips, about other products and about loaders that are not ours."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
    # DDP's, about projectors that are 1x1 convolutions, whose two orders are the same in memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
