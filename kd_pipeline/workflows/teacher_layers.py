"""Initialize layers of a student with the weights of teacher layers."""

from collections.abc import Collection

from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows.teacher import with_trained_weights

__all__ = ["copy_teacher_layers"]


def copy_teacher_layers(config: Config, student: nn.Module, *, plugins: Collection[str]) -> None:
    """Initialize layers of the student with the weights of teacher layers."""
    settings = config.teacher
    if not isinstance(settings, TeacherSettings) or settings.model is None:
        raise ConfigError("student_from_teacher copies weights of a network: set teacher.model")
    model = with_trained_weights(config, settings).model
    assert model is not None
    teacher_state = open_model(model, plugins=plugins).state_dict()
    state = student.state_dict()
    for layer, source in config.student_from_teacher.items():
        copied = {
            f"{layer}{name.removeprefix(source)}": weight
            for name, weight in teacher_state.items()
            if name.startswith(f"{source}.")
        }
        shapes = {name: weight.shape for name, weight in state.items() if name.startswith(f"{layer}.")}
        if not shapes or {name: weight.shape for name, weight in copied.items()} != shapes:
            raise ConfigError(
                f"student_from_teacher: the student's layer {layer!r} ({len(shapes)} tensors) does not match the "
                f"teacher's layer {source!r} ({len(copied)} tensors)"
            )
        state.update(copied)
    student.load_state_dict(state)
