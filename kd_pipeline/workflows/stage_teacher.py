"""Whether the teacher of a stage will do, before the first step: for its evaluation, for its students, and at all."""

import logging
from collections.abc import Collection

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import Source
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.evaluation.probe import FirstBatches, probe_teacher
from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.training.distributed import on_rank_zero
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.teacher_probe import ProbeTeacher
from kd_pipeline.workflows.check_images import key_of
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.stage import stage_dir
from kd_pipeline.workflows.student_outputs import StudentOutputs

__all__ = ["check_comparison", "check_evaluation_images", "check_no_student_yet", "start_probe"]

_logger = logging.getLogger("kd_pipeline")


def check_comparison(config: Config, teacher: Teacher, student: StudentOutputs) -> None:
    """Refuse to compare logits with a teacher that has none, which would fail after the training.

    Raises:
        ConfigError: `compare_with_teacher` does.
    """
    compares_logits = config.train.compare_with_teacher and not student.is_headless
    if compares_logits and "logits" not in teacher.outputs:
        raise ConfigError(
            "train.compare_with_teacher compares the student's logits with the teacher's, which returns "
            f"{', '.join(map(repr, teacher.outputs))}; set it to false"
        )


def check_evaluation_images(data: RunData, teacher: Teacher) -> None:
    """Check that a teacher, opened for the images of the training, can take those of the other splits.

    Raises:
        TeacherError: it cannot.
    """
    if len(teacher.inputs) != len(teacher.views):  # several inputs are the user's own in all splits
        return
    for split in data.splits:
        for view, takes in zip(teacher.views, teacher.inputs.values(), strict=True):
            example = next(iter(data.teacher_example(view, split).values()))
            if not takes.accepts((1, *example.shape[1:]), example.dtype):
                raise _wrong_images(data, split, view, TensorSpec((None, *example.shape[1:]), example.dtype), takes)


def _wrong_images(data: RunData, split: str, view: str, found: TensorSpec, takes: TensorSpec) -> TeacherError:
    if data.is_own(split):
        return TeacherError(
            f"validation {split!r} gives {found}, and the teacher, which is evaluated on it too, takes what the "
            f"training gives, {takes}; give both the same shape and dtype"
        )
    path = "transform" if view == IMAGES else f"views.{view}"
    return TeacherError(
        f"{key_of(split)}.{path} makes images {found}, and the teacher, which is evaluated on them too, takes those of "
        f"the training, {takes}; give {key_of(split)}.{path} the size and dtype of data.train.{path}"
    )


def check_no_student_yet(config: Config, *, resumes: bool) -> None:
    """Refuse to train a teacher, as a part of `stage: all`, of which a student learns already.

    Raises:
        StateError: the student could not resume with the new teacher.
    """
    for each in config.single_runs.values():
        student = RunFolder(stage_dir(each, "distill"))
        if student.last_checkpoint is not None:
            raise StateError(
                f"stage: all would train the teacher {'further' if resumes else 'first'}, and the run in "
                f"{student.path} has begun to learn from the teacher as it was; set stage=distill to resume that, or "
                "start both again with --fresh (in Python fresh=True), or set a different run_dir"
            )


def start_probe(
    config: Config, loader: AnyLoader, source: Source | None, *, plugins: Collection[str]
) -> ProbeTeacher | None:
    """Judge the teacher now, or by the first batches of the training if they show enough.

    Args:
        config: of the run.
        loader: of the training, with its teacher.
        source: of the training; None for batches of the user's own.
        plugins: modules that ops may come from.

    Returns:
        The callback that does so during the training.

    Raises:
        TeacherError: there is a problem, and the settings are strict.
    """
    teacher, settings = loader.teacher, config.probe
    if teacher is None or settings is None:
        return None
    if source is None or isinstance(loader, BatchLoader):
        if is_rank_zero() and "probe" in config.model_fields_set:
            _logger.info("teacher probe: left out, as it takes images of the config")
        return None
    if (first_batches := FirstBatches.of_run(loader, settings)) is not None:
        return ProbeTeacher(first_batches)
    can_probe = source.labels is not None and any(map(is_logits, teacher.outputs))
    if is_rank_zero() and isinstance(teacher, Teacher) and can_probe:
        _logger.info("teacher probe: running it on training images, for about %g s", settings.max_seconds)
    # One rank decides: in the same time, each may see a different number of images.
    on_rank_zero(lambda: probe_teacher(config, teacher, settings, training=source, plugins=plugins))
    return None
