"""The student and its loss as a Lightning module. The teacher is no part of it: its outputs come with the batches."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from kd_pipeline._core.optional import require
from kd_pipeline._core.torch_compile import torch_compile
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import NonFiniteError
from kd_pipeline.evaluation._evaluate import Evaluation, images_for
from kd_pipeline.losses.distillation import Distillation, LossTerms
from kd_pipeline.losses.ramp import value_at
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.training.ema import StudentEma
from kd_pipeline.training.nonfinite import StepGuard, TrainedBatch, check_weights, gradient_norm
from kd_pipeline.training.optimizers import build_optimizer
from kd_pipeline.training.schedules import build_schedule
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.training.sharding import is_sharded, shard
from kd_pipeline.training.throughput import Throughput

__all__ = ["DistillModule"]

_lightning = require("lightning", extra="train")


class DistillModule(_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Trains a student on the batches of a `KDDataLoader`.

    Its checkpoints hold the student, the projectors of the loss and the EMA.
    """

    def __init__(
        self,
        student: nn.Module,
        distillation: Distillation,
        settings: TrainSettings,
        *,
        steps_per_epoch: int,
        teacher: Teacher | Recording | None,
        identity: Mapping[str, Any],
        validate: Callable[[nn.Module], Mapping[str, Evaluation]],
    ) -> None:
        """Wrap `student`.

        Args:
            student: maps images `[N, 3, H, W]` to logits `[N, K]`.
            distillation: the loss.
            settings: how to train.
            steps_per_epoch: optimizer steps in an epoch.
            teacher: only to log its share of the time; it is not kept as a submodule.
            identity: what identifies the run, to save in its checkpoints.
            validate: evaluates a model on every validation set, by name.
        """
        super().__init__()
        self.student, self.distillation = student, distillation
        self.ema = None if settings.ema is None else StudentEma(student, settings.ema)
        self._settings, self._steps_per_epoch, self._identity = settings, steps_per_epoch, identity
        self._validate = validate
        # In a list, so it is not a second submodule with the same weights.
        self._compiled = [torch_compile(student)] if settings.compile else []
        self._throughput = Throughput(teacher)
        self._logs_throughput = False
        """Whether the current batch ends with an optimizer step that is logged."""
        self._guard = StepGuard(
            settings.max_nonfinite_steps, sample_name=lambda index: self.trainer.train_dataloader.source.name(index)
        )
        self.has_begun = False
        """Whether all was set up and a checkpoint restored, and an epoch has begun."""
        self._num_valid: Tensor | None = None
        """Valid rows of this rank in the batches of the current optimizer step, if they are counted."""
        self._train_counts: Tensor | None = None
        """`[2]`, correct and valid rows of the epoch so far."""

    @property
    def model(self) -> nn.Module:
        """The network to evaluate and export: the EMA if there is one, else the student."""
        return self.student if self.ema is None else self.ema.student

    def configure_model(self) -> None:
        """Shard student and projectors if the strategy has a device mesh. Lightning calls this first."""
        if self.device_mesh is not None and not is_sharded(self.student):
            for module in (self.student, *self.distillation.projectors):
                if any(True for _ in module.parameters()):
                    shard(module, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer of student and projectors, and its schedule in steps."""
        settings = self._settings
        optimizer = build_optimizer(self.student, settings.optimizer, extra=self.distillation.parameters())
        schedule = build_schedule(
            optimizer, settings.schedule, epochs=settings.epochs, steps_per_epoch=self._steps_per_epoch
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the EMA to the device of the student."""
        if self.ema is not None:
            self.ema.student.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Reset the counters of the epoch."""
        self.has_begun = True
        self._throughput.restart()
        self._train_counts = None

    def on_train_batch_start(self, batch: KDBatch, number: int) -> None:
        """Time the loader."""
        self._throughput.batch_loaded()

    def training_step(self, batch: KDBatch, number: int) -> Tensor:
        """The loss of one batch, without waiting for the device."""
        if number % self._settings.accumulate == 0:
            self._guard.start_step(self.buffers())
            self._num_valid = None
        student = self._compiled[0] if self._compiled else self.student
        with self.distillation.student_features(self.student) as features:
            logits_NK = student(images_for(self.student, batch.images))
        num_done = self.current_epoch * self.trainer.num_training_batches + number
        epoch = num_done / self.trainer.num_training_batches
        terms = self.distillation(logits_NK, features, batch, epoch=epoch, epochs=self._settings.epochs)
        self._guard.watch(TrainedBatch(number, batch, logits_NK.detach(), terms, self._temperatures(terms, epoch)))
        self._count_correct(logits_NK.detach(), batch)
        if self._is_log_step():
            self._log_terms(terms, self._rank_weight(batch))
        loss: Tensor = terms.total * self._loss_weight(batch)
        return loss

    def on_after_backward(self) -> None:
        """Check the loss now if no optimizer step follows, where it would be checked."""
        if (self.trainer.fit_loop.batch_idx + 1) % self._settings.accumulate and not self.trainer.is_last_batch:
            self._guard.check_batch()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finish the gradient, and take the step only if it and the losses are finite. Clipping comes after this."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        num_bad = self._divide_by_rows(gradients)
        norm = gradient_norm(gradients)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        takes_step = self._guard.decide(
            self,
            f"epoch {self.current_epoch} at step {self.trainer.global_step} (counted from 0, as in metrics.csv)",
            num_bad=num_bad,
            # With 16-mixed the scaler skips a step whose gradient overflows, by design, and lowers its scale.
            gradient_norm=norm if scaler is None else None,
        )
        if not takes_step and not (scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)):
            # Optimizers pass over parameters without a gradient. Where one unscales within its step, the scaler needs
            # the gradient, and skips the step because of it.
            for parameter in self.parameters():
                parameter.grad = None
        if self._is_log_step():
            if self._settings.log_gradient_norm:
                self.log("train/gradient_norm", norm)
            if self._settings.max_nonfinite_steps:
                self.log("train/skipped_steps", float(self._guard.num_skipped))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the EMA: here, because checkpoints are written before the end of the batch."""
        self._logs_throughput = self._is_log_step()
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and self._guard.took_step:
            self.ema.update(self.student)

    def on_train_batch_end(self, outputs: Any, batch: KDBatch, number: int) -> None:
        """Time the step."""
        self._throughput.batch_trained(len(batch))
        if self._logs_throughput:
            self._logs_throughput = False
            for name, value in self._throughput.compute().items():
                self.log(f"train/{name}", value)

    def on_train_epoch_end(self) -> None:
        """Validate; early stopping and checkpoints read these metrics next."""
        if self._train_counts is not None:
            correct, valid = self.trainer.strategy.reduce(self._train_counts.float(), reduce_op="sum")
            self.log("train/top1", correct / valid.clamp(min=1))
        if self._settings.max_nonfinite_steps:
            self.log("train/skipped_steps", float(self._guard.num_skipped))
        for name, value in self._validation_metrics().items():
            self.log(name, value, prog_bar=name.endswith("/top1"))
        self.student.train()
        if self.trainer.progress_bar_callback is not None:
            # Lightning drew the bar before this hook, with the metrics of the previous epoch.
            self.trainer.progress_bar_callback.on_train_epoch_end(self.trainer, self)

    def validate_now(self) -> Mapping[str, float]:
        """Validate within an epoch, log the metrics at once and return them by name."""
        metrics = self._validation_metrics()
        for logger in self.trainer.loggers:
            # In the row of the last step; Lightning counts them from 0.
            logger.log_metrics(metrics, step=self.trainer.global_step - 1)
            logger.save()
        self._throughput.restart()
        return metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the EMA, the skipped steps and the identity of the run."""
        checkpoint["run"] = dict(self._identity)
        checkpoint["skipped_steps"] = self._guard.state_dict()
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the EMA and the number of skipped steps."""
        self._guard.load_state_dict(checkpoint["skipped_steps"])
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def _validation_metrics(self) -> dict[str, float]:
        self._broadcast_buffers()
        check_weights(self.model, self.trainer, before="validating and saving them")
        try:
            evaluations = self._validate(self.model)
        except NonFiniteError as exc:
            raise NonFiniteError(f"validation after {self.trainer.global_step} steps: {exc}") from exc
        return {
            f"{split}/{name}": value
            for split, evaluation in evaluations.items()
            for name, value in evaluation.scalars().items()
        }

    def _temperatures(self, terms: LossTerms, epoch: float) -> dict[str, float]:
        """The current temperature of each term that has one."""
        found = {} if terms.temperature is None else {"distill": terms.temperature}
        for term in self.distillation.settings.features:
            if term.temperature is not None:
                found[term.name] = value_at(term.temperature, epoch, self._settings.epochs)
        return found

    def _loss_weight(self, batch: KDBatch) -> Tensor | float:
        """The weight of the mean loss of this batch on this rank: its valid rows as a share of a full batch.

        DDP averages the gradients of the ranks, and Lightning those of the batches of an optimizer step. Their numbers
        of valid rows may differ, and are not all known before the last batch; `_divide_by_rows` finishes the mean.
        """
        if not self._counts_rows:
            return 1.0
        num_valid = batch.valid.sum(dtype=torch.float32)
        self._num_valid = num_valid if self._num_valid is None else self._num_valid + num_valid
        return num_valid / self._batch_size

    def _divide_by_rows(self, gradients: list[Tensor]) -> Tensor:
        """Make the gradient that of the mean over all valid rows of the step, of all its batches and ranks.

        Returns:
            The number of batches of all ranks whose loss is not finite, in the same collective.
        """
        num_bad = self._guard.num_bad()
        if not self._counts_rows:
            return num_bad
        assert self._num_valid is not None
        sums = torch.stack([self._num_valid, num_bad])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        num_valid, num_bad = sums.unbind()
        # Exactly 1 if all batches are full. Without any valid row the gradient is 0, and so is this product.
        num_full = self._settings.accumulate * self._batch_size * self.trainer.world_size
        torch._foreach_mul_(gradients, num_full / num_valid.clamp(min=1))
        return num_bad

    @property
    def _counts_rows(self) -> bool:
        """Whether an optimizer step has several batches, here or on several ranks."""
        return bool(self._settings.accumulate > 1 or self.trainer.world_size > 1)

    @property
    def _batch_size(self) -> int:
        """Rows of a full batch, the same on all ranks."""
        return int(self.trainer.train_dataloader.batch_size)

    def _rank_weight(self, batch: KDBatch) -> Tensor | float:
        """The weight of this rank's values in their mean over the ranks, which is then the mean over all valid rows."""
        if self.trainer.world_size == 1:
            return 1.0
        num_valid = batch.valid.sum(dtype=torch.float32)
        mean_num_valid: Tensor = self.trainer.strategy.reduce(num_valid.clone(), reduce_op="mean")
        return num_valid / mean_num_valid.clamp(min=1 / self.trainer.world_size)

    def _broadcast_buffers(self) -> None:
        """Copy the buffers of rank zero to all ranks: BatchNorm statistics differ after the last batch of each."""
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _is_log_step(self) -> bool:
        return bool((self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0)

    def _count_correct(self, logits_NK: Tensor, batch: KDBatch) -> None:
        if batch.labels is None:
            return
        labels_N = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
        # The top class of a row with NaN is arbitrary.
        is_correct_N = logits_NK.argmax(1).eq(labels_N) & logits_NK.isfinite().all(1)
        counts = torch.stack([(is_correct_N & batch.valid).sum(), batch.valid.sum()])
        self._train_counts = counts if self._train_counts is None else self._train_counts + counts

    def _log_terms(self, terms: LossTerms, weight: Tensor | float) -> None:
        """Log the loss and its terms as means over the valid rows of all ranks, and what else determined the step."""
        for name, value in {"loss": terms.total, **terms.terms}.items():
            self.log(f"train/{name}", value.detach() * weight, prog_bar=name == "loss", sync_dist=True)
        for name, term_weight in terms.weights.items():
            self.log(f"train/{name}_weight", float(term_weight))
        if terms.temperature is not None:
            self.log("train/temperature", float(terms.temperature))
        self.log("train/lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        if self.device.type == "cuda":
            self.log("train/memory_gib", torch.cuda.max_memory_allocated(self.device) / 2**30)
