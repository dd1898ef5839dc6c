"""The teacher of a run: the one in its config, with the weights that `stage: teacher` left in the run's folder."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.device import resolve_device
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import Source
from kd_pipeline.errors import ConfigError, MissingPackageError, TeacherError
from kd_pipeline.loader.config_teacher import open_config_teacher
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.outputs import find_output
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import StudentPrecision, TeacherSettings, is_recording, with_runtimes
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.exported import DESCRIPTION, ONNX, WEIGHTS, read_exported
from kd_pipeline.workflows.record_plan import loss_outputs

__all__ = [
    "check_no_input_adapter",
    "check_recording",
    "open_run_teacher",
    "open_split_teacher",
    "saved_runtimes",
    "starts_without_teacher",
    "student_precision",
    "with_trained_weights",
]

_logger = logging.getLogger("kd_pipeline")

_STUDENT_PRECISIONS: dict[str, StudentPrecision] = {
    "32-true": "fp32",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
    "16-mixed": "fp16",
    "16-true": "fp16",
}


def starts_without_teacher(config: Config) -> bool:
    """Whether the first stage of `config` trains the teacher, or the student alone."""
    if config.stage == "all":
        return config.run_dir is None or not _is_trained(config.run_dir)
    return config.stage != "distill"


def open_run_teacher(
    config: Config,
    *,
    classes: Sequence[str] | None = None,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    training: Source | None = None,
    begun_with: Sequence[str] | None = None,
) -> Teacher | Recording:
    """Open the teacher of `config` for its training images. The caller closes it.

    Args:
        config: the whole run, with `data.train`.
        classes: those of the data, whose order the logits get; None keeps the teacher's.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        training: the open source of the split `train`, to save the time of listing it.
        begun_with: the `runtimes` of the teacher when the run began, which it keeps where the settings leave them open.

    Raises:
        ConfigError: the config has no teacher, or one without weights.
        TeacherError: the teacher does not match the config.
    """
    if config.teacher is None:
        raise ConfigError("stage: distill needs a teacher: set teacher, or use stage: baseline")
    if isinstance(config.teacher, TeacherSettings):
        config = config.model_copy(update={"teacher": with_trained_weights(config, config.teacher)})
    if begun_with is not None and config.teacher is not None and not is_recording(config.teacher):
        config = config.model_copy(update={"teacher": with_runtimes(config.teacher, begun_with)})
    try:
        return open_config_teacher(
            config,
            classes,
            plugins=plugins,
            trust_engines=trust_engines,
            source=training,
            student_precision=student_precision(config),
        )
    except (ConfigError, MissingPackageError, TeacherError) as exc:
        if begun_with is None:
            raise
        raise type(exc)(f"{exc}. It began with {' and '.join(begun_with)} for the teacher, and resumes so") from exc


def open_split_teacher(
    config: Config, split: str, loader: KDDataLoader, *, plugins: Collection[str], trust_engines: Collection[str]
) -> Teacher:
    """Open the teacher of `config`, which is no recording, for the images of a split. The caller closes it.

    Args:
        config: the whole run, with the weights of the teacher.
        split: name of the split.
        loader: of the split, in the order of whose classes the logits are.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.

    Raises:
        ConfigError, TeacherError: as `open_config_teacher`.
    """
    teacher = open_config_teacher(
        config,
        loader.classes,
        plugins=plugins,
        trust_engines=trust_engines,
        split=split,
        source=loader.source,
        student_precision=student_precision(config),
    )
    assert isinstance(teacher, Teacher)
    return teacher


def student_precision(config: Config) -> StudentPrecision:
    """In which the student of `config` trains."""
    return _STUDENT_PRECISIONS[config.train.precision]


def saved_runtimes(run: Mapping[str, Any]) -> list[str] | None:
    """`Teacher.runtimes` in what a checkpoint says about its run; None for a run without a teacher."""
    found = run.get("teacher_runtimes")
    return [str(each) for each in found] if isinstance(found, list) else None


def check_recording(config: Config, recording: Recording) -> None:
    """Check that a recording has what the training of `config` needs.

    Raises:
        ConfigError: it lacks epochs or outputs, or validation needs outputs for other images.
    """
    for name in loss_outputs(config) or ():
        try:
            find_output(name, recording.outputs, place="the loss", owner="recorded teacher")
        except ConfigError as exc:
            raise ConfigError(
                f"{exc}. The recording in {recording.path} has these outputs only; compare others in distill.features, "
                "or record again in a different folder with kd-pipeline record --outputs and --out"
            ) from None
    if recording.num_epochs < config.train.epochs:
        raise ConfigError(
            f"train.epochs is {config.train.epochs} and the recording in {recording.path} has {recording.num_epochs} "
            "complete epochs; train for fewer, or record more: kd-pipeline record resumes where it stopped"
        )
    if config.train.compare_with_teacher:
        raise ConfigError(
            "train.compare_with_teacher runs the teacher on validation images, and a recording has outputs for "
            "training images only; set it to false"
        )


def with_trained_weights(config: Config, teacher: TeacherSettings) -> TeacherSettings:
    """A teacher given by `model`, with the weights of this run's `stage: teacher` if there are any, else with its own.

    Raises:
        ConfigError: there are neither, or the trained teacher would get different images.
    """
    model = teacher.model
    if model is None or config.run_dir is None:
        return teacher
    folder = _exported_folder(config.run_dir)
    if not _is_trained(config.run_dir):
        # False says that the weights are random on purpose.
        if model.pretrained is not None or (model.checkpoint is not None and not model.may_stay_random):
            return teacher
        raise ConfigError(
            "teacher.model has no weights: set its checkpoint or pretrained, or train it first with stage=teacher, "
            f"which writes them to {folder / WEIGHTS}"
        )
    check_no_input_adapter(teacher)
    exported = read_exported(folder)
    assert exported is not None and exported[1].model is not None
    _logger.info("using the teacher trained by this run: %s", folder)
    needs_module = teacher.backend == "pytorch" or teacher.features or config.student_from_teacher
    if not needs_module and (folder / ONNX).is_file() and resolve_device(config.data.device).type == "cpu":
        return teacher.model_copy(update={"model": None, "onnx": folder / ONNX})
    return teacher.model_copy(update={"model": exported[1].model.model_copy(update={"checkpoint": folder / WEIGHTS})})


def check_no_input_adapter(teacher: TeacherSettings) -> None:
    """Check that a teacher trained in a run gets the images of that run.

    Raises:
        ConfigError: it has an `input_adapter`.
    """
    if teacher.input_adapter is not None:
        raise ConfigError(
            "teacher.input_adapter is for a teacher that was trained on different images, and stage: teacher trains it "
            "on the images of this run; remove it, or use a run_dir without a trained teacher"
        )


def _exported_folder(run_dir: Path) -> Path:
    """Where `stage: teacher` exports the teacher."""
    return RunFolder(run_dir / "teacher").exported


def _is_trained(run_dir: Path) -> bool:
    return (_exported_folder(run_dir) / DESCRIPTION).is_file()
