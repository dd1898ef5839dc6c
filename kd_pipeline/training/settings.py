"""How a run trains: everything but its data, teacher and loss."""

import warnings
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.evaluation._metrics import MetricSettings
from kd_pipeline.teachers.tensorrt.manifest import Precision, Profile
from kd_pipeline.training.callbacks import CallbackSettings
from kd_pipeline.training.ema import EmaSettings
from kd_pipeline.training.memory_format import ChannelsLast
from kd_pipeline.training.optimizers import OptimizerSettings
from kd_pipeline.training.schedules import ScheduleSettings

__all__ = ["EarlyStoppingSettings", "EngineSettings", "ExportSettings", "LoggerName", "TrainSettings"]

LoggerName = Literal["csv", "tensorboard", "wandb", "comet", "mlflow"]


class EarlyStoppingSettings(Settings):
    """When to stop before the last epoch."""

    metric: str | None = None
    """Defaults to the metric that selects the best checkpoint."""
    mode: Literal["max", "min"] | None = None
    """`min` if lower is better; defaults to what it is for the metric."""
    patience: int = Field(default=10, ge=1)
    """Epochs in which the metric is measured, without improvement, before the run stops."""


class EngineSettings(Settings):
    """The TensorRT engine to build from the student; the names are those of `kd-pipeline build-engine`."""

    precision: Precision = "fp16"
    """`int8` and `fp8` are calibrated on images of the run."""
    profiles: tuple[Profile, ...] = Field(default=(Profile(min=1, opt=32, max=64),), min_length=1)
    """Batch sizes to serve."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """`tensorrt_rtx` builds without a GPU."""


class ExportSettings(Settings):
    """What a run writes into `exported/` besides the student's weights."""

    onnx: bool = True
    """Export the student to ONNX."""
    engine: EngineSettings | None = None
    """Engine to build from the ONNX file; defaults to none."""

    @model_validator(mode="after")
    def _has_onnx_for_the_engine(self) -> Self:
        if self.engine is not None and not self.onnx:
            raise ValueError("an engine is built from the ONNX file; remove onnx: false")
        return self


# What pydantic calls so is an old name of its `model_validate`.
warnings.filterwarnings("ignore", message='Field name "validate" in "TrainSettings" shadows an attribute')


class TrainSettings(Settings):
    """How long, how fast and on what a run trains."""

    epochs: int = Field(default=10, gt=0)
    """Passes over the training images."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer, its learning rate and its weight decay."""
    schedule: ScheduleSettings = ScheduleSettings()
    """How the learning rate changes during the run."""
    accumulate: int = Field(default=1, ge=1)
    """Batches to accumulate gradients over before an optimizer step, whose loss is the mean over their valid rows."""
    clip: PositiveFloat | None = None
    """Maximum norm of the gradient."""
    max_nonfinite_steps: int = Field(default=0, ge=0)
    """Optimizer steps in a row that are skipped, and counted as `train/skipped_steps`, if the loss or the gradient is
    NaN or inf. One more ends the run; by default the first one does."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"] = "32-true"
    """Precision of the student, as Lightning names it."""
    compile: bool = False
    """Compile the student's training steps and the losses of this package with `torch.compile`. It takes a minute or so
    once for a network and batch size, which a line reports; validation is not compiled."""
    channels_last: ChannelsLast = "auto"
    """Train in channels-last order (NHWC). `auto` does so where it is faster: for convolutional networks, but not on a
    CPU in 16 bits with depthwise convolutions, nor on a GPU in float32, nor with `strategy: fsdp`. On a CPU it also
    does not with 1x1 convolutions with a stride of fewer than 16 channels, in which torch can crash. Results differ in
    their last digits."""
    ema: EmaSettings | None = None
    """Evaluate and export a moving average of the student's weights."""
    early_stopping: EarlyStoppingSettings | None = None
    """Stop when a metric no longer improves; defaults to not at all."""
    callbacks: tuple[CallbackSettings, ...] = ()
    """Callbacks of Lightning besides those that Python passes, such as `[{factory: my_package.callbacks:Freeze, kwargs:
    {epochs: 3}}]`; early stopping and checkpoints come after them."""
    metrics: tuple[MetricSettings, ...] = ()
    """Validation metrics besides accuracy, loss and F1; logged as `val/` and the name."""
    validate: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")  # type: ignore[assignment]
    """A function of your own that validates instead, as `package.module:function`: it takes the student and the loaders
    of the validation sets by name, and returns numbers by name."""
    select_by: str | None = None
    """Validation metric that selects the best checkpoint. Defaults to the first of `val/knn_top1`, `val/top1`,
    `val/miou` and `val/loss` that is measured every epoch; without any, the last student is the result."""
    average_best: int | None = Field(default=None, ge=2)
    """Export the mean of the weights after so many of the best validations, instead of those of the best alone; of
    statistics such as BatchNorm's the mean too. They are kept in `checkpoints/top`."""
    select_mode: Literal["max", "min"] | None = None
    """`min` if lower is better; defaults to `min` for losses and to `max` for other metrics."""
    compare_with_teacher: bool = False
    """Run the teacher in validation too, for its agreement with the student."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Also save within an epoch, every so many optimizer steps."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Also validate within an epoch, every so many optimizer steps; the best checkpoint may be one of these."""
    num_threads: int | None = Field(default=None, ge=1)
    """torch's CPU threads; defaults to `OMP_NUM_THREADS`, or else to the cores of this process. Small networks on few
    cores train faster with fewer threads, which leaves cores to DALI."""
    log_every_steps: int = Field(default=50, ge=1)
    """Optimizer steps from one logged row of training metrics to the next."""
    log_gradient_norm: bool = False
    """Log the norm of the gradient, before `clip`."""
    loggers: tuple[LoggerName, ...] = ("csv", "tensorboard")
    """`tensorboard` is skipped if it is not installed."""
    limit_train_batches: int | None = Field(default=None, ge=1)
    """Batches per epoch, for a quick trial."""
    limit_val_batches: int | None = Field(default=None, ge=1)
    """Batches per validation set, for a quick trial."""
    export: ExportSettings = ExportSettings()
    """Files for serving the student, written when the run ends."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes train: `ddp` replicates the student, `fsdp` shards it and the optimizer state, for a
    student that does not fit on one GPU."""
    sync_batchnorm: bool = False
    """Synchronize BatchNorm statistics over all processes."""

    @model_validator(mode="after")
    def _mode_has_a_metric(self) -> Self:
        if self.select_by is None and self.select_mode is not None:
            raise ValueError(f"select_mode: {self.select_mode} is of a metric; set select_by too, or remove it")
        return self

    @model_validator(mode="after")
    def _fits_the_strategy(self) -> Self:
        if self.strategy == "fsdp" and self.optimizer.state_from is not None:
            raise ValueError("optimizer.state_from needs strategy: ddp; change one of them")
        for name, value in (("compile", True), ("channels_last", True), ("precision", "16-mixed")):
            if self.strategy == "fsdp" and getattr(self, name) == value:
                raise ValueError(f"{name}: {str(value).lower()} needs strategy: ddp; change one of them")
        return self
