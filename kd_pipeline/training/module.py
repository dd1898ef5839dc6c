"""The student and its loss as a Lightning module. The teacher is no part of it: its outputs come with the batches."""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.distributed
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.memory import release_free_memory
from kd_pipeline._core.optional import require
from kd_pipeline._core.progress import speed_text
from kd_pipeline.batch import KDBatch, rows_name
from kd_pipeline.errors import ConfigError, NonFiniteError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._logits import inputs_for
from kd_pipeline.losses.distillation import Distillation, LossTerms, student_outputs
from kd_pipeline.losses.ramp import value_at
from kd_pipeline.models.input_adapter import unadapted
from kd_pipeline.models.modules import call_network, deployed_network, inner_teacher, is_in_layer
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.training.compiled_student import CompiledStudent
from kd_pipeline.training.ema import StudentEma
from kd_pipeline.training.epoch_loss import EpochLoss
from kd_pipeline.training.machine_use import MachineUse
from kd_pipeline.training.nondeterministic import explain_nondeterministic
from kd_pipeline.training.nonfinite import StepGuard, TrainedBatch, check_weights, gradient_norm
from kd_pipeline.training.optimizer_state import load_optimizer_state
from kd_pipeline.training.optimizers import build_optimizer, match_memory_format
from kd_pipeline.training.own_optimizer import OwnOptimizer, use_own_optimizer
from kd_pipeline.training.run_story import StepProgress
from kd_pipeline.training.schedules import build_schedule
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.training.sharding import is_sharded, reach_outputs, shard
from kd_pipeline.training.throughput import Throughput
from kd_pipeline.training.train_accuracy import TrainAccuracy

__all__ = ["DistillModule"]

_lightning = require("lightning", extra="train")
_logger = logging.getLogger("kd_pipeline")


class DistillModule(_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Trains a student on the batches of a loader.

    Its checkpoints hold the student, the projectors of the loss and the EMA. A module with a submodule `student` is
    trained as a whole, but for a submodule `teacher`, which is frozen and in no checkpoint: the user's own code makes
    it again.
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
        plugins: Collection[str] = (),
        optimizer: OwnOptimizer | None = None,
        view: str = IMAGES,
    ) -> None:
        """Wrap `student`.

        Args:
            student: maps images `[N, 3, H, W]`, or the inputs of the batches, to what `named_outputs` describes.
            distillation: the loss.
            settings: how to train.
            steps_per_epoch: optimizer steps in an epoch.
            teacher: only to log its share of the time; it is not kept as a submodule.
            identity: what identifies the run, to save in its checkpoints.
            validate: evaluates a model on every validation set, by name.
            plugins: modules that factories of the optimizer and its schedule, and a decay of the EMA, may come from.
            optimizer: of the user's own, instead of that of the settings and its schedule.
            view: of the images that the student sees.
        """
        super().__init__()
        self.student, self.distillation = student, distillation
        if (teacher_inside := inner_teacher(student)) is not None:
            teacher_inside.requires_grad_(False).eval()
        self.ema = None if settings.ema is None else StudentEma(self.network, settings.ema, plugins=plugins)
        # DDP would broadcast these in each step, although the ranks compute the same, some of them on the CPU.
        self._ddp_params_and_buffers_to_ignore = [
            f"distillation.{part}.{name}"
            for part in ("standardizers", "queues")
            for name, _ in distillation.get_submodule(part).named_buffers()
        ]
        self._settings, self._steps_per_epoch, self._identity = settings, steps_per_epoch, identity
        self._view = view
        self._validate, self._plugins, self._own_optimizer = validate, plugins, optimizer
        self._compiled: CompiledStudent | None = None
        if settings.compile:
            self._compiled = CompiledStudent(student)
            distillation.compile_losses()
        self._throughput = Throughput(teacher)
        self._machine: MachineUse | None = None
        """From the start of the training."""
        self._is_logged = False
        """Whether the current step is one of those that are logged."""
        self._took_optimizer_step = False
        """Whether the current batch ended an optimizer step, taken or skipped."""
        self._last_step: dict[str, tuple[Tensor | float, bool]] = {}
        """Metrics of the epoch's last step, and whether to average them over the ranks, if only its epoch logs it."""
        self._guard = StepGuard(
            settings.max_nonfinite_steps, sample_name=lambda index: self.trainer.train_dataloader.sample_name(index)
        )
        self.unreached: Collection[str] = ()
        """Parameters of the student that get no gradient; only known where several processes train."""
        self.measured: dict[str, float] = {}
        """The metrics of the last validation."""
        self.last_terms: dict[str, Tensor] = {}
        """The loss of the last batch on this rank, and its terms by name, without a graph."""
        self.has_begun = False
        """Whether all was set up, a checkpoint restored, and the training has begun."""
        self._num_valid: Tensor | None = None
        """Valid rows of this rank in the batches of the current optimizer step, if they are counted."""
        self._epoch_loss = EpochLoss()
        self._lr = 0.0
        """Of the last step."""
        self._rows = "images"
        """What messages call the rows of a batch."""
        self._accuracy = TrainAccuracy()

    @property
    def network(self) -> nn.Module:
        """The network that is averaged and exported: the student, or the submodule `student` of what is trained."""
        return deployed_network(self.student)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies the run, in its checkpoints."""
        return self._identity

    @property
    def model(self) -> nn.Module:
        """The network to evaluate and export: the EMA if there is one, else the student."""
        return self.network if self.ema is None else self.ema.student

    def network_state(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The weights of `network` in the `state_dict` of a checkpoint, by the network's own names."""
        prefix = "student." if self.network is self.student else "student.student."
        names = [name for name in state_dict if name.startswith(prefix)]
        return {name.removeprefix(prefix): state_dict[name] for name in names}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but a teacher within the student, which stays in eval mode."""
        super().train(mode)
        self._rest_teacher()
        return self

    def configure_model(self) -> None:
        """Shard student and projectors if the strategy has a device mesh. Lightning calls this first."""
        if self.device_mesh is not None and not is_sharded(self.student):
            for module in (self.student, *self.distillation.projectors):
                if any(True for _ in module.parameters()):
                    shard(module, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer of student and projectors, and its schedule in steps."""
        settings = self._settings
        if self._own_optimizer is not None:
            return use_own_optimizer(self._own_optimizer, self.student, self.distillation)
        optimizer = build_optimizer(
            unadapted(self.student), settings.optimizer, extra=self.distillation.parameters(), plugins=self._plugins
        )
        if settings.optimizer.state_from is not None and self.trainer.ckpt_path is None:
            load_optimizer_state(optimizer, settings.optimizer.state_from)
        schedule = build_schedule(
            optimizer,
            settings.schedule,
            epochs=settings.epochs,
            steps_per_epoch=self._steps_per_epoch,
            plugins=self._plugins,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the EMA to the device of the student."""
        if self.ema is not None:
            self.ema.student.to(self.device)

    def on_train_start(self) -> None:
        """Put restored optimizer state in the order of its weights, which may have been a different one."""
        # Not at the start of an epoch, which a run that resumes within one does not have.
        self.has_begun = True
        self._throughput.start_epoch()
        self._machine = MachineUse(self.device)
        for optimizer in self.trainer.optimizers:
            match_memory_format(optimizer)
        release_free_memory()

    def on_train_epoch_start(self) -> None:
        """Reset the counters of the epoch."""
        self._throughput.start_epoch()
        self._epoch_loss.start_epoch()
        self._accuracy.start_epoch()

    def on_train_batch_start(self, batch: KDBatch, number: int) -> None:
        """Time the loader."""
        self._throughput.batch_loaded()

    @explain_nondeterministic()
    def training_step(self, batch: KDBatch, number: int) -> Tensor:
        """The loss of one batch, without waiting for the device."""
        if number % self._settings.accumulate == 0:
            self._guard.start_step(self.buffers())
            self._num_valid = None
        self._is_logged = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0
        self._took_optimizer_step = False
        student = self._compiled or self.student
        samples, batch = batch, batch.of_view(self._view)
        with self.distillation.student_features(self.student) as features:
            outputs = call_network(student, inputs_for(self.student, batch.input))
        num_done = self.current_epoch * self.trainer.num_training_batches + number
        epoch = num_done / self.trainer.num_training_batches
        self._rows = rows_name(batch.inputs)
        with nullcontext() if self._compiled is None else self._compiled.explained():
            terms = self.distillation(outputs, features, batch, epoch=epoch, epochs=self._settings.epochs)
        if not terms.total.requires_grad:
            raise ConfigError(
                "the loss depends on no weight that is trained, so nothing would be learned: compare what the student "
                "returns as it is, not detached, and freeze only a part of it"
            )
        self.last_terms = {name: value.detach() for name, value in {"loss": terms.total, **terms.terms}.items()}
        own = student_outputs(outputs)
        outputs = {name: output.detach() for name, output in own.items()}
        self._guard.watch(TrainedBatch(number, batch, outputs, terms, self._temperatures(terms, epoch)))
        self._accuracy.add(outputs, batch, self.distillation)
        self._epoch_loss.add(terms.total, batch.valid.sum())
        self._lr = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self._is_logged:
            self.log("epoch", float(self.current_epoch + 1))  # Lightning's own is counted from 0
        if self._is_logged or self.trainer.is_last_batch:
            self._log_terms(terms, self._rank_weight(batch))
        loss: Tensor = terms.total * self._loss_weight(samples)
        if self.device_mesh is not None and not self.distillation.compares_outputs:
            loss = reach_outputs(loss, own.values())
        return loss

    @explain_nondeterministic()
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's backward pass; says what is wrong if it cannot be compiled."""
        if self._compiled is None:
            super().backward(loss, *args, **kwargs)
            return
        with self._compiled.explained():
            super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        """Check the loss now if no optimizer step follows, where it would be checked."""
        if (self.trainer.fit_loop.batch_idx + 1) % self._settings.accumulate and not self.trainer.is_last_batch:
            self._guard.check_batch()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finish the gradient, and take the step only if it and the losses are finite. Clipping comes after this."""
        if self.device_mesh is not None:
            for name in self.unreached:  # 0 from `reach_outputs`, which the weight decay would not pass over
                self.student.get_parameter(name).grad = None
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        num_bad = self._divide_by_rows(gradients)
        norm = gradient_norm(gradients)
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        unscales_itself = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        step = f"step {self.trainer.global_step} (steps are counted from 0, as in metrics.csv)"
        takes_step = self._guard.decide(
            self,
            f"epoch {self.current_epoch + 1} at {step}",
            num_bad=num_bad,
            # With 16-mixed the scaler skips a step whose gradient overflows, by design, and lowers its scale.
            gradient_norm=norm if scaler is None else None,
        )
        if not takes_step and not unscales_itself:
            # Optimizers pass over parameters without a gradient. Where one unscales within its step, the scaler needs
            # the gradient, and skips the step because of it.
            for parameter in self.parameters():
                parameter.grad = None
        if self._settings.log_gradient_norm:
            # The scale is waited for, which a step that is not logged need not be.
            is_seen = unscales_itself and (self._is_logged or self.trainer.is_last_batch)
            self._log_step("gradient_norm", norm / scaler.get_scale() if is_seen else norm)
        if self._settings.max_nonfinite_steps and self._is_logged:
            self.log("train/skipped_steps", float(self._guard.num_skipped))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the EMA: here, because checkpoints are written before the end of the batch."""
        super().optimizer_step(*args, **kwargs)  # runs `training_step`
        self._took_optimizer_step = True
        if self.ema is not None and self._guard.took_step:
            self.ema.update(self.network)

    def on_train_batch_end(self, outputs: Any, batch: KDBatch, number: int) -> None:
        """Time the step."""
        if self._compiled is not None and self._compiled.end_step():
            self._throughput.batch_dropped()
        else:
            self._throughput.batch_trained(len(batch))
        if self._took_optimizer_step and (self._is_logged or self.trainer.is_last_batch):
            assert self._machine is not None
            for name, value in (self._throughput.compute() | self._machine.compute()).items():
                self._log_step(name, value)

    def on_train_epoch_end(self) -> None:
        """Validate; early stopping and checkpoints read these metrics next."""
        self.log("epoch", float(self.current_epoch + 1))
        if (mean := self._epoch_loss.mean(self.trainer)) is not None:
            self.log("train/epoch_loss", mean)
        for name, accuracy in self._accuracy.of_epoch(self.trainer).items():
            self.log(name, accuracy)
        if self._settings.max_nonfinite_steps:
            self.log("train/skipped_steps", float(self._guard.num_skipped))
        for name, (last, is_mean) in self._last_step.items():
            self.log(name, last, sync_dist=is_mean)
        self._last_step = {}
        for name, value in self._validation_metrics().items():
            self.log(name, value)
        self.student.train()
        self._rest_teacher()

    def on_train_end(self) -> None:
        """Say how fast it was."""
        release_free_memory()
        if self.trainer.is_global_zero and (found := self._throughput.of_run()):
            teacher_share = found.get("teacher_share", 0.0)
            _logger.info(
                "trained at %s%s; %sloader %.0f%% of the time",
                speed_text(found["images_per_s"], self._rows),
                " per process" if self.trainer.world_size > 1 else "",
                f"teacher {teacher_share:.0%}, " if "teacher_share" in found else "",
                100 * (found["loader_share"] - teacher_share),
            )

    @property
    def progress(self) -> StepProgress:
        """How the run is, after the last step."""
        rate = self._throughput.now().get("images_per_s")
        return StepProgress(
            loss=self._guard.loss,
            lr=self._lr,
            speed="" if rate is None else speed_text(rate * self.trainer.world_size, self._rows),
            num_skipped=self._guard.num_skipped,
        )

    def validate_now(self) -> Mapping[str, float]:
        """Validate within an epoch, log the metrics at once and return them by name."""
        metrics = self._validation_metrics()
        epoch = {"epoch": float(self.current_epoch + 1)}
        for logger in self.trainer.loggers:
            # In the row of the last step; Lightning counts them from 0.
            logger.log_metrics({**metrics, **epoch}, step=self.trainer.global_step - 1)
            logger.save()
        self._throughput.restart()
        return metrics

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must have all tensors: with FSDP, a teacher within the student would be missed."""
        return not (is_sharded(self.student) and inner_teacher(self.student) is not None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the EMA, the skipped steps, the loss of the epoch so far and the identity of the run.

        A teacher within the student is left out.
        """
        for name in self._frozen_names(checkpoint["state_dict"]):
            del checkpoint["state_dict"][name]
        checkpoint["run"] = dict(self._identity)
        checkpoint["skipped_steps"] = self._guard.state_dict()
        is_within_epoch = not self.trainer.is_last_batch
        checkpoint["epoch_loss"] = list(self._epoch_loss.of_all_ranks(self.trainer)) if is_within_epoch else None
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the EMA, the skipped steps and the loss of the epoch so far; a teacher within stays the user's."""
        if "state_dict" in checkpoint:  # with FSDP, Lightning has loaded it and taken it out
            own = self.state_dict()
            checkpoint["state_dict"] |= {name: own[name] for name in self._frozen_names(own)}
        self._guard.load_state_dict(checkpoint["skipped_steps"])
        if checkpoint["epoch_loss"] is not None and self.trainer.is_global_zero:  # the sums of all ranks
            self._epoch_loss.load(checkpoint["epoch_loss"])
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def _rest_teacher(self) -> None:
        if (teacher := inner_teacher(self.student)) is not None:
            teacher.eval()

    def _frozen_names(self, state: Mapping[str, Any]) -> list[str]:
        """The tensors in `state` of a teacher within the student."""
        has_teacher = inner_teacher(self.student) is not None
        return [name for name in state if has_teacher and is_in_layer(name, "student.teacher")]

    def _validation_metrics(self) -> dict[str, float]:
        self._broadcast_buffers()
        check_weights(self.model, self.trainer, before="validating and saving them")
        release_free_memory()
        try:
            evaluations = self._validate(self.model)
        except NonFiniteError as exc:
            raise NonFiniteError(f"validation after {self.trainer.global_step} steps: {exc}") from exc
        release_free_memory()
        self.measured = {
            f"{split}/{name}": value
            for split, evaluation in evaluations.items()
            for name, value in evaluation.scalars().items()
        }
        return self.measured

    def _temperatures(self, terms: LossTerms, epoch: float) -> dict[str, float]:
        """The current temperature of each term that has one."""
        found = {} if terms.temperature is None else {"distill": terms.temperature}
        settings = self.distillation.settings
        for name, term in zip(settings.term_names, settings.features, strict=True):
            if term.temperature is not None:
                found[name] = value_at(term.temperature, epoch, self._settings.epochs)
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

    def _log_step(self, name: str, value: Tensor | float, *, is_mean: bool = False) -> None:
        """Log a metric if this is a step to log, and that of an epoch's last step in any case.

        Args:
            name: without `train/`.
            value: of the step.
            is_mean: average it over the ranks.
        """
        if self._is_logged:
            self.log(f"train/{name}", value, sync_dist=is_mean)
        elif self.trainer.is_last_batch:
            # Lightning gives nothing else to its loggers now; what the end of the epoch logs is in the same row.
            self._last_step[f"train/{name}"] = value, is_mean

    def _log_terms(self, terms: LossTerms, weight: Tensor | float) -> None:
        """Log the loss and its terms as means over the valid rows of all ranks, and what else determined the step."""
        for name, value in {"loss": terms.total, **terms.terms}.items():
            self._log_step(name, value.detach() * weight, is_mean=True)
        for name, term_weight in terms.weights.items():
            self._log_step(f"{name}_weight", float(term_weight))
        if len(terms.terms) > 1:
            for name, share in terms.shares.items():
                self._log_step(f"{name}_share", share * weight, is_mean=True)
        if terms.temperature is not None:
            self._log_step("temperature", float(terms.temperature))
        self._log_step("lr", self._lr)
        if self.device.type == "cuda":
            self._log_step("memory_gib", torch.cuda.max_memory_allocated(self.device) / 2**30)
