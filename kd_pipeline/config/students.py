"""Several students of one run: what each of them sets besides its network, and what they share."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, SerializationInfo, field_serializer, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.config.compose import merged
from kd_pipeline.config.teacher_layers import LayerSources
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.training.settings import TrainSettings

__all__ = ["StudentSettings", "Students"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TAKEN = frozenset({
    *("baseline", "check", "checkpoints", "earlier", "exported", "lists", "mlruns", "teacher", "tensorboard", "wandb"),
})  # fmt: skip
"""Folders that a run has besides those of its students."""
_SHARED = {
    "epochs": "they end together",
    "limit_train_batches": "they see the same batches",
    "precision": "the precision of the teacher follows it",
    "strategy": "they train on the same processes",
    "num_threads": "it is that of the process",
    "deterministic": "it is that of the process",
}
"""Keys of `train` that all students of a run have in common, and why."""


class StudentSettings(ModelSettings):
    """One of several students: its network, and what it sets otherwise than the rest of the config.

    Sections are merged key by key with those of the config: `train: {optimizer: {lr: 0.1}}` changes the learning rate
    alone. A section of another kind, such as another optimizer or loss, replaces it.
    """

    distill: DistillSettings | None = None
    """What its loss has otherwise than `distill` of the config."""
    train: TrainSettings | None = None
    """What it has otherwise than `train` of the config, such as optimizer, schedule, EMA, early stopping and export.
    Epochs, precision, strategy, threads, `deterministic` and `limit_train_batches` are those of all."""
    student_from_teacher: LayerSources | None = None
    """Layers of this student to initialize from the teacher, instead of those of the config."""

    refused_keys: ClassVar[Mapping[str, str]] = {
        name: f"students of one run share {what}; set {name} for all of them, or train this student in a run of its own"
        for name, what in {
            "data": "the images",
            "seed": "the order and the augmentation of the images",
            "teacher": "the teacher",
            "stage": "the stage",
            "probe": "the teacher",
            "feature_probe": "the images that judge features",
        }.items()
    } | {"run_dir": "each student has the folder of its name in the run_dir of the config; remove it"}

    @model_validator(mode="after")
    def _sets_what_is_its_own(self) -> "StudentSettings":
        if self.train is not None:
            for name in sorted(_SHARED.keys() & self.train.model_fields_set):
                raise ValueError(
                    f"train.{name} is the same for all students of a run, as {_SHARED[name]}; set it in train of the "
                    "config, or train this student in a run of its own"
                )
        return self

    @field_serializer("distill", "train")
    def _dump_what_is_set(self, settings: Settings | None, info: SerializationInfo) -> dict[str, Any] | None:
        """Without defaults, which would be settings where they are read again."""
        return None if settings is None else settings.model_dump(mode=info.mode, exclude_unset=True)

    @property
    def model(self) -> ModelSettings:
        """The network alone."""
        set_here = self.model_fields_set & ModelSettings.model_fields.keys()
        return ModelSettings(**{name: getattr(self, name) for name in ModelSettings.model_fields if name in set_here})

    def completed(self, distill: DistillSettings, train: TrainSettings) -> dict[str, dict[str, Any]]:
        """The sections `distill` and `train` of the run of this student alone, as plain values."""
        below = {"distill": _plain(distill), "train": _plain(train)}
        return merged(below, {"distill": _plain(self.distill), "train": _plain(self.train)})


def _check_names(students: dict[str, StudentSettings]) -> dict[str, StudentSettings]:
    for name in students:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} names a student and its folder: use letters, digits, - and _, such as wide or resnet18"
            )
    lower = [name.lower() for name in students]
    for name in students:
        if name.lower() in _TAKEN or name.lower().startswith("comet"):
            raise ValueError(f"{name!r} is a folder that a run has anyway; give the student another name")
        if lower.count(name.lower()) > 1:
            raise ValueError(f"{name!r} and another name differ in upper and lower case only; rename one of them")
    return students


Students = Annotated[dict[str, StudentSettings], AfterValidator(_check_names)]
"""Students by the names of their folders."""


def _plain(settings: Settings | None) -> dict[str, Any]:
    """What is set, without the defaults."""
    return {} if settings is None else settings.model_dump(exclude_unset=True)
