"""The teacher of a run on the user's batches, or one that the user gives, ready for what the loader gives."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.calibration import images_of_views
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording, open_recording
from kd_pipeline.teachers.settings import AnyTeacherSettings, TeacherSettings, is_recording, views_of, with_runtimes
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.teacher import student_precision, with_trained_weights

__all__ = ["open_own_teacher"]


def open_own_teacher(
    config: Config,
    parts: Parts,
    data: RunData,
    *,
    plugins: Collection[str],
    trust_engines: Collection[str],
    begun_with: Sequence[str] | None,
) -> tuple[Teacher | Recording | None, bool]:
    """The teacher for the batches of the training, and whether the caller closes it.

    Args:
        config: of the run, with the teacher if it is none of the objects.
        parts: the objects.
        data: of the run.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        begun_with: the `runtimes` of the teacher when the run began, which it keeps where the settings leave them open.

    Returns:
        The teacher; None if there is none and the loss does without.

    Raises:
        ConfigError: there are two teachers, or none and the loss needs one.
        TeacherError: the teacher does not take what the loader gives.
    """
    given = parts.teacher if isinstance(parts.teacher, Teacher | nn.Module | Recording) else config.teacher
    own = None if data.own_training is None else data.own_training.teacher
    if own is not None:
        if given is not None:
            raise ConfigError(
                "two teachers: train_batches has one already; leave out the other, or make the loader without"
            )
        return own, False
    if given is None:
        if parts.distillation is not None:
            return None, False
        raise ConfigError(
            "stage: distill needs a teacher: pass teacher, or set it in the config, or use stage: baseline"
        )
    classes = data.training.classes
    module: nn.Module | None = None
    settings: AnyTeacherSettings
    match given:
        case Recording():
            return given, False
        case Teacher():
            return match_classes(given, classes), False
        case nn.Module():
            settings, module = TeacherSettings(), given
        case _ if is_recording(given):
            return open_recording(given), True
        case _:
            settings = _settled(config, given)
    if begun_with is not None:
        settings = with_runtimes(settings, begun_with)
    teacher = _open(settings, module, config, data, plugins, trust_engines)
    try:
        return match_classes(teacher, classes), True
    except BaseException:
        teacher.close()
        raise


def _settled(config: Config, settings: AnyTeacherSettings) -> AnyTeacherSettings:
    return with_trained_weights(config, settings) if isinstance(settings, TeacherSettings) else settings


def _open(
    settings: AnyTeacherSettings,
    module: nn.Module | None,
    config: Config,
    data: RunData,
    plugins: Collection[str],
    trust_engines: Collection[str],
) -> Teacher:
    view, *others = views_of(settings)
    own = data.own_training
    images: dict[str, Any] = {}
    if isinstance(own, KDDataLoader) and (others or view != IMAGES):
        images["views"] = images_of_views(own.transform, own.view_settings)
    elif others:
        raise ConfigError(
            f"the teachers see the views {', '.join([view, *others])}, and train_batches are of your own; open each "
            "for its own view (open_teacher) and pass kd_pipeline.teachers.group.TeacherGroup as teacher"
        )
    else:
        images |= {"example": data.teacher_example(view), "normalization": data.normalization}
    return open_teacher(
        settings,
        module=module,
        device=data.device,
        batch_size=data.batch_size,
        student_precision=student_precision(config),
        plugins=plugins,
        trust_engines=trust_engines,
        strict=config.probe is not None and config.probe.strict,
        **images,
    )
