"""The student and its loss as a Lightning module; the teacher is nowhere in it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline.batch import KDBatch
from kd_pipeline.config import TrainSettings
from kd_pipeline.distillation import Distillation
from kd_pipeline.evaluation import Evaluation
from kd_pipeline.optional import require
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.training.ema import StudentEma
from kd_pipeline.training.optimizers import build_optimizer
from kd_pipeline.training.schedules import build_schedule

__all__ = ["DistillModule"]

_lightning = require("lightning", extra="train")


class DistillModule(_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Trains a student on what a `KDDataLoader` hands out.

    What its checkpoints hold is the student, the projectors of its loss and the moving average.
    """

    def __init__(
        self,
        student: nn.Module,
        distillation: Distillation,
        settings: TrainSettings,
        *,
        steps_per_epoch: int,
        teacher: Teacher | None,
        facts: Mapping[str, Any],
        validate: Callable[[nn.Module], Mapping[str, Evaluation]],
    ) -> None:
        """Wrap `student`.

        Args:
            student: `[N, 3, H, W]` to logits `[N, K]`.
            distillation: its loss.
            settings: how to train.
            steps_per_epoch: steps of the optimiser in an epoch.
            teacher: whose share of the time is logged; it is not kept as a module.
            facts: what identifies the run, for its checkpoints.
            validate: evaluates a model on every validation set, by name.
        """
        super().__init__()
        self.student, self.distillation = student, distillation
        self.ema = None if settings.ema is None else StudentEma(student, settings.ema)
        self._settings, self._steps_per_epoch, self._validate, self._facts = settings, steps_per_epoch, validate, facts
        # In a list, so that it is no second submodule with the same weights.
        self._compiled = [torch.compile(student)] if settings.compile else []
        self._clock = _Clock(teacher)
        self._num_right: Tensor | None = None
        self._num_valid: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """What is evaluated and exported: the moving average where there is one, else the student."""
        return self.student if self.ema is None else self.ema.student

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over student and projectors, and its schedule in steps."""
        settings = self._settings
        optimizer = build_optimizer(self.student, settings.optimizer, extra=self.distillation.parameters())
        schedule = build_schedule(
            optimizer, settings.schedule, epochs=settings.epochs, steps_per_epoch=self._steps_per_epoch
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Bring the moving average to where the student is."""
        if self.ema is not None:
            self.ema.student.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Start counting; validation's time is not the loader's."""
        self._clock.restart()
        self._num_right = self._num_valid = torch.zeros((), device=self.device)

    def on_train_batch_start(self, batch: KDBatch, number: int) -> None:
        """Note how long the loader took."""
        self._clock.waited()

    def training_step(self, batch: KDBatch, number: int) -> Tensor:
        """The loss of one batch; nothing here waits for the device."""
        student = self._compiled[0] if self._compiled else self.student
        with self.distillation.student_features(self.student) as features:
            logits = student(batch.images)
        epoch = self._batches_done(number) / self.trainer.num_training_batches
        terms = self.distillation(logits, features, batch, epoch=epoch, epochs=self._settings.epochs)
        self._count(logits.detach(), batch)
        if self._is_logged():
            self._log_terms(terms, len(batch))
        total: Tensor = terms.total
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, before it is clipped."""
        if self._settings.log_gradient_norm and self._is_logged():
            norms = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
            self.log("train/gradient_norm", torch.stack(norms).norm())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Follow the student with its moving average; here, as checkpoints are written before the batch ends."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.student)

    def on_train_batch_end(self, outputs: Any, batch: KDBatch, number: int) -> None:
        """Note how long the step took."""
        self._clock.worked(len(batch))

    def on_train_epoch_end(self) -> None:
        """Validate; checkpoints and early stopping look at these numbers next."""
        if self._num_right is not None and self._num_valid is not None:
            right = self.trainer.strategy.reduce(self._num_right.float(), reduce_op="sum")
            valid = self.trainer.strategy.reduce(self._num_valid.float(), reduce_op="sum")
            self.log("train/top1", right / valid.clamp(min=1))
        for name, evaluation in self._validate(self.model).items():
            for metric, value in evaluation.figures().items():
                self.log(f"{name}/{metric}", value, prog_bar=metric == "top1")
        self.student.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average, and what identifies the run."""
        checkpoint["run"] = dict(self._facts)
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def _batches_done(self, number: int) -> int:
        done: int = self.current_epoch * self.trainer.num_training_batches + number
        return done

    def _is_logged(self) -> bool:
        return bool((self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0)

    def _count(self, logits: Tensor, batch: KDBatch) -> None:
        if batch.labels is None or self._num_right is None or self._num_valid is None:
            return
        labels = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
        self._num_right = self._num_right + (logits.argmax(1).eq(labels) & batch.valid).sum()
        self._num_valid = self._num_valid + batch.valid.sum()

    def _log_terms(self, terms: Any, batch_size: int) -> None:
        self.log("train/loss", terms.total.detach(), prog_bar=True, batch_size=batch_size)
        for name, value in terms.terms.items():
            self.log(f"train/{name}", value.detach(), batch_size=batch_size)
        for name, weight in terms.weights.items():
            self.log(f"train/{name}_weight", float(weight), batch_size=batch_size)
        if terms.temperature is not None:
            self.log("train/temperature", float(terms.temperature), batch_size=batch_size)
        self.log("train/lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]), batch_size=batch_size)
        for name, figure in self._clock.figures().items():
            self.log(f"train/{name}", figure, batch_size=batch_size)
        if self.device.type == "cuda":
            self.log("train/memory_gib", torch.cuda.max_memory_allocated(self.device) / 2**30, batch_size=batch_size)


class _Clock:
    """Wall-clock seconds of the host between one log line and the next: how fast, and what took how much of it."""

    def __init__(self, teacher: Teacher | None) -> None:
        self._teacher = teacher
        self._last = time.perf_counter()
        self._wait_s = self._work_s = 0.0
        self._taught_s = 0.0 if teacher is None else teacher.busy_s
        self._num_images = 0

    def restart(self) -> None:
        """What has passed since the last batch counts as nothing."""
        self._last = time.perf_counter()

    def waited(self) -> None:
        """The loader has handed over a batch."""
        now = time.perf_counter()
        self._wait_s += now - self._last
        self._last = now

    def worked(self, num_images: int) -> None:
        """The step on it has been queued, or on a CPU is done."""
        now = time.perf_counter()
        self._work_s += now - self._last
        self._last = now
        self._num_images += num_images

    def figures(self) -> dict[str, float]:
        """Since the last call: images per second, and the shares of the loader with its teacher, and of the teacher."""
        total_s = max(self._wait_s + self._work_s, 1e-9)
        figures = {"images_per_s": self._num_images / total_s, "loader_share": self._wait_s / total_s}
        if self._teacher is not None:
            figures["teacher_share"] = (self._teacher.busy_s - self._taught_s) / total_s
            self._taught_s = self._teacher.busy_s
        self._wait_s = self._work_s = 0.0
        self._num_images = 0
        return figures
