"""How a run trains: everything but its data, its teacher and its loss."""

from typing import Literal

from pydantic import Field, PositiveFloat

from kd_pipeline.settings import Settings
from kd_pipeline.training.ema import EmaSettings
from kd_pipeline.training.optimizers import OptimizerSettings
from kd_pipeline.training.schedules import ScheduleSettings

__all__ = ["EarlyStoppingSettings", "LoggerName", "TrainSettings"]

LoggerName = Literal["csv", "tensorboard", "wandb", "comet", "mlflow"]


class EarlyStoppingSettings(Settings):
    """When to stop before the last epoch."""

    metric: str = "val/top1"
    mode: Literal["max", "min"] = "max"
    patience: int = Field(default=10, ge=1)
    """Epochs without a better value that are waited for."""


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
    select_by: str = "val/top1"
    """The validation figure that the best checkpoint has most of."""
    compare_with_teacher: bool = False
    """Run the teacher in validation too, for its agreement with the student."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Save in the middle of an epoch as well."""
    log_every_steps: int = Field(default=50, ge=1)
    log_gradient_norm: bool = False
    loggers: tuple[LoggerName, ...] = ("csv", "tensorboard")
    """`tensorboard` is left out where it is not installed."""
    limit_train_batches: int | None = Field(default=None, ge=1)
    """Batches of each epoch, for trying things out."""
    limit_val_batches: int | None = Field(default=None, ge=1)
    sync_batchnorm: bool = False
    """Let BatchNorm of all processes see all their images."""
