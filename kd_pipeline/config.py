"""Compose the rooms' settings into one config; read it from YAML, with overrides."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from kd_pipeline.config_file import read_config
from kd_pipeline.loader import DataSettings
from kd_pipeline.settings import Settings
from kd_pipeline.teachers import EnsembleSettings, TeacherSettings

__all__ = ["Config", "DistillSettings", "TrainSettings", "load_config"]


class DistillSettings(Settings):
    """How the teacher's answers enter the loss; the words are timm's."""

    temperature: float = Field(default=4.0, gt=0)
    """Divides the logits of both before the softmax."""
    distill_weight: float = Field(default=0.9, ge=0)
    """Weight of the soft-target term."""
    task_weight: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy with the data's own labels."""


class TrainSettings(Settings):
    """How long and how fast a loop trains."""

    epochs: int = Field(default=10, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    """The highest learning rate of the schedule."""


def _kind(teacher: Any) -> str:
    has_members = "members" in teacher if isinstance(teacher, Mapping) else isinstance(teacher, EnsembleSettings)
    return EnsembleSettings.__name__ if has_members else TeacherSettings.__name__


OneOrMoreTeachers = Annotated[
    Annotated[TeacherSettings, Tag(TeacherSettings.__name__)]
    | Annotated[EnsembleSettings, Tag(EnsembleSettings.__name__)],
    Discriminator(_kind),
]
"""One teacher, or `members` that answer as one."""


class Config(Settings):
    """A whole run. `data` alone is enough for a loader without a teacher."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Order and views of the images follow from it."""
    run_dir: Path | None = None
    """Where a run writes what it has to say: `classes.json`, `bad_samples.jsonl` and the like."""
    data: DataSettings
    teacher: OneOrMoreTeachers | None = None
    distill: DistillSettings = DistillSettings()
    train: TrainSettings = TrainSettings()


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file `path`, changed by overrides such as `data.batch_size=128`.

    Raises:
        ConfigError: every problem on a line of its own: file and line, dotted key, what was expected and found.
    """
    return read_config(Config, path, overrides)
