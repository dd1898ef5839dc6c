"""The student and its loss as a Lightning module; the teacher is nowhere in it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.optional import require
from kd_pipeline.batch import KDBatch
from kd_pipeline.evaluation._evaluate import Evaluation, images_for
from kd_pipeline.losses.distillation import Distillation, LossTerms
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.training.ema import StudentEma
from kd_pipeline.training.optimizers import build_optimizer
from kd_pipeline.training.schedules import build_schedule
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.training.sharding import is_sharded, shard, whole

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
            steps_per_epoch: steps of the optimizer in an epoch.
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

    def configure_model(self) -> None:
        """Share out student and projectors where the strategy is to do so; Lightning calls it ahead of the rest."""
        if self.device_mesh is not None and not is_sharded(self.student):
            for module in (self.student, *self.distillation.projectors):
                if any(True for _ in module.parameters()):
                    shard(module, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over student and projectors, and its schedule in steps."""
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
        """Start counting; the time of validation and checkpoints is not the loader's."""
        self._clock.restart()
        self._num_right = self._num_valid = None

    def on_train_batch_start(self, batch: KDBatch, number: int) -> None:
        """Note how long the loader took."""
        self._clock.waited()

    def training_step(self, batch: KDBatch, number: int) -> Tensor:
        """The loss of one batch; nothing here waits for the device."""
        student = self._compiled[0] if self._compiled else self.student
        with self.distillation.student_features(self.student) as features:
            logits = student(images_for(self.student, batch.images))
        epoch = self._batches_done(number) / self.trainer.num_training_batches
        terms = self.distillation(logits, features, batch, epoch=epoch, epochs=self._settings.epochs)
        self._count(logits.detach(), batch)
        share = self._share(batch)
        if self._is_logged():
            self._log_terms(terms, share)
        total: Tensor = terms.total * share
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, before it is clipped."""
        if self._settings.log_gradient_norm and self._is_logged():
            norms = [whole(parameter.grad.norm()) for parameter in self.parameters() if parameter.grad is not None]
            self.log("train/gradient_norm", torch.stack(norms).norm())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Follow the student with its moving average; here, as checkpoints are written before the batch ends."""
        self._clock.is_due = self._is_logged()
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.student)

    def on_train_batch_end(self, outputs: Any, batch: KDBatch, number: int) -> None:
        """Note how long the step took."""
        self._clock.worked(len(batch))
        if self._clock.is_due:
            self._clock.is_due = False
            for name, figure in self._clock.figures().items():
                self.log(f"train/{name}", figure)

    def on_train_epoch_end(self) -> None:
        """Validate; checkpoints and early stopping look at these numbers next."""
        if self._num_right is not None and self._num_valid is not None:
            right = self.trainer.strategy.reduce(self._num_right.float(), reduce_op="sum")
            valid = self.trainer.strategy.reduce(self._num_valid.float(), reduce_op="sum")
            self.log("train/top1", right / valid.clamp(min=1))
        for name, value in self._figures().items():
            self.log(name, value, prog_bar=name.endswith("/top1"))
        self.student.train()
        if self.trainer.progress_bar_callback is not None:
            # Lightning has drawn the epoch's last state before it called us, with the figures of the epoch before.
            self.trainer.progress_bar_callback.on_train_epoch_end(self.trainer, self)

    def validate_now(self) -> Mapping[str, float]:
        """Validate in the middle of an epoch, log it at once, and return the figures by name."""
        self._agree_on_buffers()
        figures = self._figures()
        for logger in self.trainer.loggers:
            # The row of the step that has just been taken; Lightning counts them from 0.
            logger.log_metrics(figures, step=self.trainer.global_step - 1)
            logger.save()
        self._clock.restart()
        return figures

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average, and what identifies the run."""
        checkpoint["run"] = dict(self._facts)
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def _figures(self) -> dict[str, float]:
        self._agree_on_buffers()
        return {
            f"{name}/{figure}": value
            for name, evaluation in self._validate(self.model).items()
            for figure, value in evaluation.figures().items()
        }

    def _share(self, batch: KDBatch) -> Tensor | float:
        """What this rank's mean over its valid rows counts, as the gradients of the ranks are averaged.

        With it their average is that of the mean over all valid rows, whose numbers may differ in a last batch.
        """
        if self.trainer.world_size == 1:
            return 1.0
        num_here = batch.valid.sum(dtype=torch.float32)
        num_mean: Tensor = self.trainer.strategy.reduce(num_here.clone(), reduce_op="mean")
        return num_here / num_mean.clamp(min=1 / self.trainer.world_size)

    def _agree_on_buffers(self) -> None:
        """Take the first rank's, such as the statistics of BatchNorm, which each rank's last batch has changed."""
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _batches_done(self, number: int) -> int:
        done: int = self.current_epoch * self.trainer.num_training_batches + number
        return done

    def _is_logged(self) -> bool:
        return bool((self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0)

    def _count(self, logits: Tensor, batch: KDBatch) -> None:
        if batch.labels is None:
            return
        labels = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
        num_right, num_valid = (logits.argmax(1).eq(labels) & batch.valid).sum(), batch.valid.sum()
        self._num_right = num_right if self._num_right is None else self._num_right + num_right
        self._num_valid = num_valid if self._num_valid is None else self._num_valid + num_valid

    def _log_terms(self, terms: LossTerms, share: Tensor | float) -> None:
        """The loss and its terms as means over the valid rows of all ranks, and what else the step went by."""
        for name, value in {"loss": terms.total, **terms.terms}.items():
            self.log(f"train/{name}", value.detach() * share, prog_bar=name == "loss", sync_dist=True)
        for name, weight in terms.weights.items():
            self.log(f"train/{name}_weight", float(weight))
        if terms.temperature is not None:
            self.log("train/temperature", float(terms.temperature))
        self.log("train/lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        if self.device.type == "cuda":
            self.log("train/memory_gib", torch.cuda.max_memory_allocated(self.device) / 2**30)


class _Clock:
    """Wall-clock seconds of the host between one log line and the next: how fast, and what took how much of it."""

    def __init__(self, teacher: Teacher | None) -> None:
        self._teacher = teacher
        self._wait_s = self._work_s = self._taught_s = 0.0
        self._num_images = 0
        self.is_due = False
        """Whether the batch ends with a step of the optimizer that gets a line in the log."""
        self.restart()

    def restart(self) -> None:
        """What has passed since the last batch counts as nothing, and so does what the teacher did meanwhile."""
        self._last = time.perf_counter()
        self._last_busy_s = self._busy_s()

    def waited(self) -> None:
        """The loader has handed over a batch."""
        self._wait_s += self._lap()

    def worked(self, num_images: int) -> None:
        """The step on it has been queued, or on a CPU is done."""
        self._work_s += self._lap()
        self._num_images += num_images

    def figures(self) -> dict[str, float]:
        """Since the last call: images per second, and the shares of the loader with its teacher, and of the teacher."""
        total_s = max(self._wait_s + self._work_s, 1e-9)
        figures = {"images_per_s": self._num_images / total_s, "loader_share": self._wait_s / total_s}
        if self._teacher is not None:
            figures["teacher_share"] = self._taught_s / total_s
        self._wait_s = self._work_s = self._taught_s = 0.0
        self._num_images = 0
        return figures

    def _lap(self) -> float:
        """Seconds since the last call; those of the teacher's among them are added up."""
        last, last_busy_s = self._last, self._last_busy_s
        self.restart()
        self._taught_s += self._last_busy_s - last_busy_s
        return self._last - last

    def _busy_s(self) -> float:
        return 0.0 if self._teacher is None else self._teacher.busy_s
