"""The training of a stage: its trainer, and what its folder and its log say from the start on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kd_pipeline._core.ranks import is_rank_zero, world_size
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.config.config import Config
from kd_pipeline.errors import KDPipelineError
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.training.distributed import on_rank_zero
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.evidence import StartLine, describe_machine
from kd_pipeline.training.first_batch import DrawFirstBatch
from kd_pipeline.training.keep_evidence import KeepEvidence
from kd_pipeline.training.loggers import log_settings
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.signals import Signals
from kd_pipeline.training.trainer import build_trainer
from kd_pipeline.training.unreached import unreached_parameters
from kd_pipeline.workflows.evaluation_plan import own_defaults
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.resume import SavedRun, unusable_checkpoint
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.sample_digests import digest_samples
from kd_pipeline.workflows.setting_changes import Change
from kd_pipeline.workflows.stage import Stage
from kd_pipeline.workflows.stage_evaluations import StageEvaluations
from kd_pipeline.workflows.story import tell_start

__all__ = ["StageFit"]

_logger = logging.getLogger("kd_pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFit:
    """Trains a stage from its beginning or its last checkpoint."""

    config: Config
    stage: Stage
    folder: RunFolder
    data: RunData
    parts: Parts
    evaluations: StageEvaluations
    callbacks: Sequence[Any]
    """Lightning callbacks besides those of `parts`."""
    signals: Signals | None = None
    """Those that are received, where something else handles them."""

    def run(self, module: DistillModule, loader: AnyLoader, saved: SavedRun | None, changes: Sequence[Change]) -> Any:
        """Train to the end, and return the trainer. From here on, the folder says that it was done with this config.

        Args:
            module: the student and its loss.
            loader: of the training.
            saved: what the last checkpoint in the folder says; None begins.
            changes: of the settings since then.

        Raises:
            StateError: the checkpoint does not hold such a module.
        """
        if world_size() > 1:
            self._find_unreached(module, loader)
        trainer = build_trainer(
            self.config.train,
            module,
            self.folder,
            device=loader.device,
            has_validation=bool(self.evaluations.splits_of_training),
            sparse_metrics=self.evaluations.plan.sparse,
            resume_step=None if saved is None else saved.step,
            callbacks=self._all_callbacks(module, loader, saved),
            loggers=self.parts.loggers if is_rank_zero() else (),
            default_metrics=own_defaults() if self.evaluations.plan.is_own else None,
            signals=self.signals,
        )
        on_rank_zero(lambda: self._record_start(trainer, saved, changes))
        if is_rank_zero():
            self._log_start(trainer, module, loader, saved)
        try:
            trainer.fit(module, loader, ckpt_path=self.folder.last_checkpoint)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
            is_about_checkpoint = saved is not None and not module.has_begun
            if not is_about_checkpoint or isinstance(exc, KDPipelineError | torch.OutOfMemoryError):
                raise
            raise unusable_checkpoint(self.folder.last_checkpoint, exc) from exc
        if is_rank_zero():
            self.folder.record_end("trained")
        return trainer

    def _find_unreached(self, module: DistillModule, loader: AnyLoader) -> None:
        """Tell the module which parameters get no gradient, as several processes would wait for theirs."""
        example = loader.example(self.data.view)
        module.unreached = unreached_parameters(module.student, module.distillation, example=example)
        if module.unreached and is_rank_zero():
            names = first_few(module.unreached)
            _logger.info("no term of the loss reaches these of the student, which do not change: %s", names)

    def _all_callbacks(self, module: DistillModule, loader: AnyLoader, saved: SavedRun | None) -> list[Any]:
        """Those given, and those that draw the first batch of a run and keep its evidence."""
        found = [*self.callbacks]
        if saved is None:
            path, transform = self.folder.path / "first_batch.png", getattr(loader, "transform", None)
            found.append(DrawFirstBatch(path, view=self.data.view, transform=transform, classes=loader.classes))
        if is_rank_zero():
            found.append(self._evidence(module, loader))
        return [*found, *self.parts.callbacks]

    def _evidence(self, module: DistillModule, loader: AnyLoader) -> KeepEvidence:
        identity = {name: value for name, value in module.identity.items() if name not in ("config", "classes")}
        source = self.data.source

        def start(step: int) -> StartLine:
            self.folder.start_evidence()
            return StartLine(
                step=step,
                config=shown_settings(self.config),
                identity=identity,
                machine=describe_machine(loader.device),
                processes=world_size(),
                samples=digest_samples(source) if step == 0 and source is not None else None,
            )

        return KeepEvidence(self.folder.add_evidence, seed=self.config.seed, start=start)

    def _record_start(self, trainer: Any, saved: SavedRun | None, changes: Sequence[Change]) -> None:
        """Write into the folder what starts now."""
        config, folder = self.config, self.folder
        first_step = 0 if saved is None else saved.step
        if saved is None:
            folder.set_aside_leftovers()
        elif unchecked := [*self.parts.unchecked, *([note] if (note := self.data.resume_note) else [])]:
            _logger.info("not checked: %s", "; ".join(unchecked))
        for change in changes:
            _logger.info("changed since the last start: %s", change.line)
        folder.write_config(config)
        folder.record_start(
            lambda: max(first_step, trainer.global_step),
            stage=self.stage,
            epochs_done=0 if saved is None else saved.epochs_done,
            epochs=config.train.epochs,
            processes=world_size(),
            changes=[str(change) for change in changes],
            data={"train": self.data.training.fingerprint, **self.data.fingerprints},
        )

    def _log_start(self, trainer: Any, module: DistillModule, loader: AnyLoader, saved: SavedRun | None) -> None:
        """Tell the loggers and the terminal."""
        config, folder, data = self.config, self.folder, self.data
        log_settings(trainer.loggers, config, run_id=folder.run_id)
        evaluated = {split: data.loader(split) for split in data.splits if split != "train"}
        resumed = "" if saved is None else f"from {folder.last_checkpoint} {saved.place(config.train.epochs)}"
        tell_start(self.stage, config, module, loader, evaluated, folder=folder, resumed=resumed)
