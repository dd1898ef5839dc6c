"""How a run trains: everything but its data, its teacher and its loss."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.evaluation._evaluate import MetricSettings
from kd_pipeline.teachers.tensorrt.manifest import Precision, Profile
from kd_pipeline.training.ema import EmaSettings
from kd_pipeline.training.optimizers import OptimizerSettings
from kd_pipeline.training.schedules import ScheduleSettings

__all__ = ["EarlyStoppingSettings", "EngineSettings", "ExportSettings", "LoggerName", "TrainSettings"]

LoggerName = Literal["csv", "tensorboard", "wandb", "comet", "mlflow"]


class EarlyStoppingSettings(Settings):
    """When to stop before the last epoch."""

    metric: str = "val/top1"
    mode: Literal["max", "min"] = "max"
    patience: int = Field(default=10, ge=1)
    """Epochs without a better value that are waited for."""


class EngineSettings(Settings):
    """Which TensorRT engine to build of the student; the names are those of `kd-pipeline build-engine`."""

    precision: Precision = "fp16"
    """`int8` and `fp8` take their ranges from images of the run."""
    profiles: tuple[Profile, ...] = Field(default=(Profile(min=1, opt=32, max=64),), min_length=1)
    """Batch sizes to serve."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """`tensorrt_rtx` builds without a GPU."""


class ExportSettings(Settings):
    """What a run writes into `exported/` beside the student's weights."""

    onnx: bool = True
    engine: EngineSettings | None = None
    """Built from the ONNX file; none where left out."""

    @model_validator(mode="after")
    def _has_what_it_builds_from(self) -> Self:
        if self.engine is not None and not self.onnx:
            raise ValueError("an engine is built from the ONNX file; leave out onnx: false")
        return self


class TrainSettings(Settings):
    """How long, how fast and on what a run trains."""

    epochs: int = Field(default=10, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added up for one step of the optimizer."""
    clip: PositiveFloat | None = None
    """Largest norm of the gradient."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"] = "32-true"
    """Of the student, in Lightning's words."""
    compile: bool = False
    """Compile the student with `torch.compile`."""
    ema: EmaSettings | None = None
    """Evaluate and export a moving average of the student's weights."""
    early_stopping: EarlyStoppingSettings | None = None
    metrics: tuple[MetricSettings, ...] = ()
    """What validation measures beside accuracy, loss and F1; logged as `val/` and the name."""
    select_by: str = "val/top1"
    """The validation figure that the best checkpoint has most of."""
    select_mode: Literal["max", "min"] = "max"
    """`min` where less is better, as of `val/loss`."""
    compare_with_teacher: bool = False
    """Run the teacher in validation too, for its agreement with the student."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Save in the middle of an epoch as well."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Validate in the middle of an epoch as well; the best of these counts too."""
    num_threads: int | None = Field(default=None, ge=1)
    """torch's CPU threads; the cores of this process unless given, or what `OMP_NUM_THREADS` says. Small networks on
    few cores learn faster with fewer, as then DALI has cores of its own."""
    log_every_steps: int = Field(default=50, ge=1)
    log_gradient_norm: bool = False
    loggers: tuple[LoggerName, ...] = ("csv", "tensorboard")
    """`tensorboard` is left out where it is not installed."""
    limit_train_batches: int | None = Field(default=None, ge=1)
    """Batches of each epoch, for trying things out."""
    limit_val_batches: int | None = Field(default=None, ge=1)
    export: ExportSettings = ExportSettings()
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What several processes do with the student: each has all of its weights, or, for one that fits in no GPU, a
    share of them and of the state of the optimizer."""
    sync_batchnorm: bool = False
    """Let BatchNorm of all processes see all their images."""

    @model_validator(mode="after")
    def _can_be_shared_out(self) -> Self:
        for name, value in (("compile", True), ("precision", "16-mixed")):
            if self.strategy == "fsdp" and getattr(self, name) == value:
                raise ValueError(f"{name}: {str(value).lower()} goes with strategy: ddp; set one of them otherwise")
        return self
