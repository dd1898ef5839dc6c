"""The stages of a run: the folder and the network of each, and whether its settings fit together."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.ranks import world_size
from kd_pipeline.config.config import Config
from kd_pipeline.data.views import FollowingView, View
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.dry_run import run_dry
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.models.modules import zero_images
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows.check_images import key_of
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.teacher import check_no_input_adapter

__all__ = [
    "Stage",
    "check_config",
    "check_sizes",
    "loss_settings",
    "network_of",
    "normalization_of",
    "num_classes_for",
    "num_classes_of",
    "require_one_student",
    "stage_dir",
    "view_of",
]

Stage = Literal["teacher", "baseline", "distill"]


def stage_dir(config: Config, stage: Stage) -> Path:
    """Where `stage` writes.

    Raises:
        ConfigError: the config has no `run_dir`.
    """
    if config.run_dir is None:
        raise ConfigError("a run needs a folder: set run_dir, such as run_dir: runs/mine")
    return config.run_dir if stage == "distill" else config.run_dir / stage


class HasClasses(Protocol):
    """What has a number of classes: a source or a loader."""

    @property
    def num_classes(self) -> int | None:
        """None if it has no classes."""


def check_config(config: Config, stage: Stage, parts: Parts | None = None) -> None:
    """Check what can be checked before the data is opened, rather than after the first epoch.

    Raises:
        ConfigError: the config lacks images or a network that is none of `parts`, or asks for what is not measured or
            not possible.
    """
    parts = parts or Parts()
    if config.data.train is None and parts.train_batches is None:
        raise ConfigError("a run needs images to train on: set data.train, or in Python pass train_batches")
    if parts.student is None:
        _check_head(config, stage)
    _check_masks(config, stage)
    if parts.train_batches is not None or parts.validation is not None:
        _check_own_data(config, parts)
    elif parts.student is None and parts.validate is None and config.train.validate is None:
        EvaluationPlan.of(config, stage).check(config.train)
    _check_sync_batchnorm(config)


def num_classes_of(source: HasClasses | None, teacher: Teacher | Recording | None) -> int | None:
    """From the data, or from the teacher if the images have no labels; None if neither has classes."""
    num_classes = None if source is None else source.num_classes
    if num_classes is None and teacher is not None:
        sizes = {spec.shape[1] for name, spec in teacher.outputs.items() if is_logits(name)}
        num_classes = sizes.pop() if len(sizes) == 1 else None
    return num_classes


def num_classes_for(
    network: ModelSettings, source: HasClasses | None, teacher: Teacher | Recording | None
) -> int | None:
    """The number of classes to build `network` with; None if it has a number of its own, or is a factory's.

    Raises:
        ConfigError: neither the data nor the teacher has one.
    """
    if network.num_classes is not None or network.factory is not None:
        return None
    num_classes = num_classes_of(source, teacher)
    if num_classes is None:
        raise ConfigError(
            "neither the data nor the teacher has a number of classes; set the classes of the source, or "
            "student.num_classes: 0 for a student without a head, which learns the teacher's features"
        )
    return num_classes


def network_of(config: Config, stage: Stage) -> ModelSettings:
    """The network that `stage` trains.

    Raises:
        ConfigError: the config has none.
    """
    if stage != "teacher":
        if config.student is None:
            raise ConfigError(
                "there is no student to train: set student, such as student: {timm: resnet18}, or in Python pass an "
                "nn.Module as student"
            )
        return config.student
    if not isinstance(config.teacher, TeacherSettings) or config.teacher.model is None:
        raise ConfigError(
            "stage: teacher trains the network of teacher.model, such as teacher: {model: {timm: resnet50}}"
        )
    check_no_input_adapter(config.teacher)
    return config.teacher.model


def require_one_student(config: Config, what: str) -> None:
    """Check that a config has no `students`, for what takes one.

    Raises:
        ConfigError: it has.
    """
    if config.students:
        names = ", ".join(config.students)
        raise ConfigError(
            f"{what} takes one student, and the config has {names}; give it the config of one, which is in the folder "
            f"of a trained student ({config.run_dir or 'run_dir'}/{next(iter(config.students))}/config.yaml), or one "
            "with student instead of students"
        )


def view_of(config: Config, stage: Stage | Literal["all"]) -> str:
    """The view that the network which `stage` trains sees."""
    if stage == "teacher":
        return config.teacher.view if isinstance(config.teacher, TeacherSettings) else IMAGES
    return IMAGES if config.student is None else config.student.view


def normalization_of(loader: object, view: str) -> Normalization | None:
    """How a view of `loader` is normalized; None for batches of the user's own."""
    found: Callable[[str], Normalization] | None = getattr(loader, "normalization", None)
    return None if found is None else found(view)


def check_sizes(student: nn.Module, view: View) -> None:
    """Run a student on a view at each of its sizes, if they change.

    Raises:
        ConfigError: it fails at one.
    """
    for size in view.sizes[1:]:
        run_dry(student, (), zero_images((3, *size)))


def loss_settings(config: Config, stage: Stage) -> DistillSettings:
    """The loss of `stage`: what the student returns besides is nothing of the teacher's network."""
    if stage != "teacher":
        return config.distill
    return config.distill.model_copy(update={"student_losses": {}, "heads": {}})


def _check_own_data(config: Config, parts: Parts) -> None:
    """Refuse what needs images of the config where batches are the user's."""
    if config.feature_probe is not None:
        raise ConfigError(
            "feature_probe takes images of the config's splits, and train_batches or validation is an object; remove "
            "it, or pass a function as validate"
        )
    if config.train.export.engine is not None and parts.train_batches is not None:
        raise ConfigError(
            "train.export.engine is built with images of the config, and train_batches is an object; remove it, and "
            "build an engine of the exported ONNX file with kd-pipeline build-engine"
        )


def _check_masks(config: Config, stage: Stage) -> None:
    """Refuse to compare what a network sees in one window with the masks of another one."""
    view = view_of(config, stage)
    for name, split in config.data.splits.items():
        made = split.views.get(view)
        follows = isinstance(made, FollowingView) and made.follow == IMAGES
        if view != IMAGES and made is not None and not follows and getattr(split.source, "masks", None) is not None:
            raise ConfigError(
                f"{key_of(name)}: masks show what `images` shows, and the view {view!r}, which the network sees, has a "
                f"window of its own; let it follow images, as views: {{{view}: {{follow: {IMAGES}, size: 224}}}}, or "
                "remove the view of the network"
            )


def _check_sync_batchnorm(config: Config) -> None:
    if config.train.sync_batchnorm and world_size() > 1 and resolve_device(config.data.device).type == "cpu":
        raise ConfigError(
            f"train.sync_batchnorm: torch synchronizes BatchNorm on GPUs only, and this run uses {world_size()} CPU "
            "processes; set it to false, or data.device to cuda"
        )


def _check_head(config: Config, stage: Stage) -> None:
    network = network_of(config, stage)
    if network.is_headless and stage != "distill":
        key, what = ("teacher.model", "teacher") if stage == "teacher" else ("student", "baseline")
        raise ConfigError(
            f"stage: {what} trains on labels, and {key}.num_classes: 0 leaves no head to classify with; remove "
            "num_classes to train a classifier, or set stage: distill to learn a teacher's features"
        )
    has_logits = network.factory is None and not network.is_headless
    if config.feature_probe is not None and has_logits and stage != "teacher":
        raise ConfigError(
            "feature_probe judges features, and the student is a classifier, which returns logits; set "
            "student.num_classes: 0, or remove feature_probe"
        )
