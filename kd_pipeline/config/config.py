"""`Config`: the settings of all packages in one model, read from YAML with overrides."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from kd_pipeline._core.secret_values import refuse_hidden
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.config.reader import read_config
from kd_pipeline.config.students import Students
from kd_pipeline.config.teacher_layers import LayerSources
from kd_pipeline.data.settings import SPLITS, DataSettings, SplitSettings
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation.frozen import FeatureProbeSettings
from kd_pipeline.evaluation.probe import ProbeSettings
from kd_pipeline.losses.outputs import find_output
from kd_pipeline.losses.ramp import max_value
from kd_pipeline.losses.settings import LOGITS, DistillSettings, TermSettings
from kd_pipeline.models.backbone import POOLED, SPATIAL
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings, TeacherSettings, is_recording
from kd_pipeline.training.settings import TrainSettings

__all__ = ["Config", "DistillSettings", "TrainSettings", "load_config"]


def default_terms(members: Sequence[str] | None) -> tuple[TermSettings, ...]:
    """What a student without a head learns from: the loss of AM-RADIO (Ranzinger et al., arXiv 2312.06709).

    The cosine of the pooled vectors, and cosine and smooth L1 of the maps or tokens, for each of the teachers.

    Args:
        members: names of several teachers; None for one.
    """
    return tuple(
        TermSettings(loss=loss, student=name, teacher=f"{prefix}{name}")
        for prefix in ([""] if members is None else [f"{member}." for member in members])
        for loss, name in (("cosine", POOLED), ("am_radio", SPATIAL))
    )


def _kind(teacher: Any) -> str:
    if not isinstance(teacher, Mapping):
        is_several = isinstance(teacher, EnsembleSettings | TeacherGroupSettings)
        return type(teacher).__name__ if is_several else TeacherSettings.__name__
    if "members" not in teacher:
        return TeacherSettings.__name__
    return TeacherGroupSettings.__name__ if isinstance(teacher["members"], Mapping) else EnsembleSettings.__name__


OneOrMoreTeachers = Annotated[
    Annotated[TeacherSettings, Tag(TeacherSettings.__name__)]
    | Annotated[EnsembleSettings, Tag(EnsembleSettings.__name__)]
    | Annotated[TeacherGroupSettings, Tag(TeacherGroupSettings.__name__)],
    Discriminator(_kind),
]
"""One teacher, a list of `members` whose logits are averaged, or `members` by name with outputs side by side."""


class Config(Settings):
    """A whole run. `data` alone is enough for a loader without a teacher."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Determines the order and the augmentation of the images."""
    run_dir: Path | None = None
    """Folder for what a run writes, such as `classes.json` and `bad_samples.jsonl`. In this and every other path of a
    config `~` is expanded; variables such as `$DATA` are refused."""
    data: DataSettings = DataSettings(batch_size=64)
    """The images: how they are read, and the splits."""
    teacher: OneOrMoreTeachers | None = None
    """What the student learns from: one teacher or several; defaults to none."""
    stage: Literal["teacher", "baseline", "distill", "all"] = "distill"
    """What `kd-pipeline train` does: train the teacher's `model`, train the student alone (`baseline`), or distill the
    student; `all` trains the teacher and then distills."""
    student: ModelSettings | None = None
    """The network to train; not needed for a loop of your own."""
    students: Students = Field(default_factory=dict)
    """Several students by name instead of `student`. They train side by side on the same batches, which are read once,
    with one pass of the teacher; each ends as in a run of its own, whose folder is the one of its name in `run_dir`."""
    student_from_teacher: LayerSources = Field(default_factory=dict)
    """Layers of the student to initialize from the teacher: the student's layer name to the teacher's, or to a choice
    of several: `{blocks: {layers: blocks, every: 2}}` takes every other block."""
    distill: DistillSettings = DistillSettings()
    """The loss: the terms that compare the student with the teacher, and their weights."""
    train: TrainSettings = TrainSettings()
    """How the student is trained: epochs, optimizer, schedule, validation, checkpoints and export."""
    probe: ProbeSettings | None = ProbeSettings()
    """How the teacher is checked on labeled images before a run; null skips the check."""
    feature_probe: FeatureProbeSettings | None = None
    """How the features of a student without a head are judged by labeled images, beside the teacher's; defaults to
    not at all."""

    @model_validator(mode="after")
    def _complete_headless(self) -> Self:
        """Fill in what a student without a head learns from, unless it is set."""
        if self.student is not None and self.student.is_headless and "loss" not in self.distill.model_fields_set:
            members = [*self.teacher.members] if isinstance(self.teacher, TeacherGroupSettings) else None
            terms = self.distill.features or default_terms(members)
            distill = self.distill.model_dump(exclude={"distill_weight", "temperature"}, exclude_unset=True)
            # The settings are frozen for everybody else.
            object.__setattr__(self, "distill", DistillSettings(**distill | {"loss": None, "features": terms}))
        return self

    @model_validator(mode="after")
    def _feature_probe_has_its_splits(self) -> Self:
        if (probe := self.feature_probe) is not None:
            splits = self.data.splits
            for key, name in (("bank", probe.bank), *(("sets", name) for name in probe.sets or ())):
                if name not in splits:
                    raise ValueError(f"feature_probe.{key}: there is no split {name!r}{suggest(name, splits)}")
            if "train" in (probe.sets or ()) and probe.bank != "train":
                raise ValueError(
                    "feature_probe.sets: features of the images that the student is trained on say nothing about new "
                    "ones; remove train"
                )
        return self

    @model_validator(mode="after")
    def _students_are_complete(self) -> Self:
        if not self.students:
            return self
        if self.student is not None:
            raise ValueError("student and students are both set; set student: null, or remove students")
        for name in self.students:
            try:
                self.for_student(name)
            except ValidationError as exc:
                error = exc.errors(include_url=False, include_context=False)[0]
                key = ".".join(map(str, error["loc"]))
                text = f"{key}: {error['msg']}" if key else error["msg"].removeprefix("Value error, ")
                raise ValueError(f"students.{name}, as a run of its own: {text}") from None
        return self

    def for_student(self, name: str) -> "Config":
        """The config of a run with one of `students` alone, in its folder: it ends with the same weights.

        Raises:
            ConfigError: there is no student of this name.
        """
        if name not in self.students:
            raise ConfigError(f"there is no student {name!r}{suggest(name, self.students)}")
        chosen = self.students[name]
        values = {key: getattr(self, key) for key in self.model_fields_set if key != "students"}
        values |= {"student": chosen.model, **chosen.completed(self.distill, self.train)}
        if chosen.student_from_teacher is not None:
            values["student_from_teacher"] = chosen.student_from_teacher
        if self.run_dir is not None:
            values["run_dir"] = self.run_dir / name
        return Config(**values)

    @property
    def single_runs(self) -> dict[str, "Config"]:
        """The config of each student alone, by the key of the student in this config; else this config itself."""
        if not self.students:
            return {"student": self}
        return {f"students.{name}": self.for_student(name) for name in self.students}

    @model_validator(mode="after")
    def _sees_views_that_exist(self) -> Self:
        if self.data.train is None:
            return self  # batches of the user's own
        copies = {}
        for key, name in self._views_by_key().items():
            try:
                copies[key] = self.data.view("train", name).count
            except ConfigError as exc:
                raise ValueError(f"{key}: {exc}") from None
        for student in self.student_views:
            for key, count in copies.items():
                if key not in self.student_views and count not in (None, copies[student]):
                    raise ValueError(
                        f"{key} has {count} copies of each image, and {student} {copies[student] or 1}: their outputs "
                        "cannot be compared; give both views the same count, or the teacher one without"
                    )
        return self

    @property
    def student_views(self) -> dict[str, str]:
        """The view that each student sees, by the key that says so."""
        alone = {} if self.student is None else {"student.view": self.student.view}
        return alone | {f"students.{name}.view": student.view for name, student in self.students.items()}

    def _views_by_key(self) -> dict[str, str]:
        """The views that students and teachers see, by the key that says so; not of a recording that knows its own."""
        found = self.student_views
        match self.teacher:
            case TeacherSettings() if not is_recording(self.teacher) or "view" in self.teacher.model_fields_set:
                found["teacher.view"] = self.teacher.view
            case EnsembleSettings():
                members = enumerate(self.teacher.members)
                found |= {f"teacher.members.{number}.view": member.view for number, member in members}
            case TeacherGroupSettings():
                found |= {f"teacher.members.{name}.view": each.view for name, each in self.teacher.members.items()}
        return found

    @property
    def seen_views(self) -> frozenset[str]:
        """The views that the students and the teachers see."""
        return frozenset(self._views_by_key().values())

    def used_outputs(self, outputs: Mapping[str, TensorSpec]) -> frozenset[str] | None:
        """Which of a teacher's `outputs` the loss compares, and the evaluation with `train.compare_with_teacher`.

        None if that is unknown: without a student, with a loss of the user's own, and where a term names no output.
        """
        if self.students:
            found = [config.used_outputs(outputs) for config in self.single_runs.values()]
            known = [each for each in found if each is not None]
            return frozenset().union(*known) if len(known) == len(found) else None
        distill = self.distill
        if self.student is None or distill.may_read_all:
            return None
        names = [LOGITS] if max_value(distill.weights[0]) else []
        if self.train.compare_with_teacher and not self.student.is_headless:
            names.append(LOGITS)
        try:
            for name, term in zip(distill.term_names, distill.features, strict=True):
                if max_value(term.weight):
                    names.append(find_output(term.teacher, outputs, place=name, owner="teacher"))
        except ConfigError:
            return None  # `Distillation` says so
        return frozenset(names)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is allowed and probably a mistake, one sentence each with what to do; the data is not opened."""
        # Without a student, a loop of the user's own may see them all; a recording knows its view itself.
        keys = self._views_by_key()
        is_known = self.student_views and ("teacher.view" in keys or not is_recording(self.teacher))
        unseen = _unseen_views(self.data, self.seen_views) if is_known else []
        return (*_different_normalization(self.data), *_doubtful_splits(self.data), *unseen)


def _different_normalization(data: DataSettings) -> Iterator[str]:
    """Splits whose finished images have another scale or orientation than those that the student is trained on."""
    if data.train is None:
        return
    for key, split in _evaluated(data):
        for field in ("mean", "std", "orientation"):
            here, there = getattr(split.transform, field), getattr(data.train.transform, field)
            if here != there:
                here, there = (list(value) if isinstance(value, tuple) else value for value in (here, there))
                yield (
                    f"{key}.transform.{field} is {here} and that of data.train is {there}: the "
                    "student is evaluated on other pixel values than it is trained on; give both the same"
                )


def _doubtful_splits(data: DataSettings) -> Iterator[str]:
    """Splits for evaluation that show the training images, or images that change from time to time."""
    for key, split in _evaluated(data):
        if data.train is not None and split.source == data.train.source:
            yield (
                f"{key}.source is that of data.train: metrics on images that the student was trained on say nothing "
                "about new ones; give it other images"
            )
        if split.transform.preset == "train":
            yield (
                f"{key}.transform has preset: train, which is random: metrics on it change from time to time; set "
                "preset: eval"
            )


def _unseen_views(data: DataSettings, seen: frozenset[str]) -> Iterator[str]:
    """Views that neither student nor teacher sees, and that none follows which one of them sees."""
    for split, settings in data.splits.items():
        followed = {each.follow for name, each in settings.views.items() if name in seen and hasattr(each, "follow")}
        for name in settings.views:
            if name not in seen | followed:
                key = f"data.{split}" if split in SPLITS else f"data.more.{split}"
                yield (
                    f"{key}.views.{name}: neither the student nor the teacher sees it, and a run leaves it out; set "
                    f"view: {name} for one of them, or remove it"
                )


def _evaluated(data: DataSettings) -> Iterator[tuple[str, SplitSettings]]:
    """The splits besides `train`, with the key of each in the config."""
    for name, split in data.splits.items():
        if name != "train":
            yield f"data.{name}" if name in SPLITS else f"data.more.{name}", split


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file `path` and apply `overrides` such as `data.batch_size=128`.

    Raises:
        ConfigError: every problem on its own line: file and line, dotted key, what was expected and what was found; or
            the file is the `config.yaml` of a run, in which a secret was hidden.
    """
    config = read_config(Config, path, overrides)
    refuse_hidden(config.model_dump(mode="json"), str(path), otherwise=", or override the key on the command line")
    return config
