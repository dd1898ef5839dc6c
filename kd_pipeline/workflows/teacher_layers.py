"""Initialize layers of a student with the weights of teacher layers."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from kd_pipeline._core.text import counted
from kd_pipeline.config.config import Config
from kd_pipeline.config.teacher_layers import LayerSources, TeacherLayers
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows.teacher import with_trained_weights

__all__ = ["copy_layers", "copy_teacher_layers"]


def copy_teacher_layers(config: Config, student: nn.Module, *, plugins: Collection[str]) -> None:
    """Initialize layers of the student with the weights of layers of the teacher of `config`."""
    settings = config.teacher
    if not isinstance(settings, TeacherSettings) or settings.model is None:
        raise ConfigError("student_from_teacher copies weights of a network: set teacher.model")
    model = with_trained_weights(config, settings).model
    assert model is not None
    copy_layers(student, open_model(model, plugins=plugins), config.student_from_teacher)


def copy_layers(student: nn.Module, teacher: nn.Module, sources: LayerSources) -> None:
    """Copy the weights of layers of `teacher` into layers of `student`.

    Raises:
        ConfigError: a layer does not exist, or two do not have tensors of the same names and shapes.
    """
    teacher_state, state = teacher.state_dict(), student.state_dict()
    for layer, source in _pairs(student, teacher, sources):
        copied = {
            f"{layer}{name.removeprefix(source)}": weight
            for name, weight in teacher_state.items()
            if name.startswith(f"{source}.")
        }
        shapes = {name: weight.shape for name, weight in state.items() if name.startswith(f"{layer}.")}
        if not shapes or {name: weight.shape for name, weight in copied.items()} != shapes:
            raise ConfigError(
                f"student_from_teacher: the student's layer {layer!r} ({counted(len(shapes), 'tensor')}) does not "
                f"match the teacher's layer {source!r} ({counted(len(copied), 'tensor')})"
            )
        state.update(copied)
    student.load_state_dict(state)


def _pairs(student: nn.Module, teacher: nn.Module, sources: LayerSources) -> Iterator[tuple[str, str]]:
    """Each layer of the student with the one of the teacher that it starts from."""
    for layer, source in sources.items():
        if isinstance(source, str):
            yield layer, source
            continue
        own, names = _layers_in(student, layer), _layers_in(teacher, source.layers)
        chosen = _choose(source, names, layer)
        if len(chosen) != len(own):
            raise ConfigError(
                f"student_from_teacher.{layer}: {len(chosen)} of the {counted(len(names), 'layer')} in the teacher's "
                f"{source.layers!r} are taken ({', '.join(chosen)}), and the student has {len(own)} in {layer!r}; take "
                "as many"
            )
        for name, other in zip(own, chosen, strict=True):
            yield f"{layer}.{name}", f"{source.layers}.{other}"


def _choose(source: TeacherLayers, names: Collection[str], layer: str) -> tuple[str, ...]:
    try:
        return source.choose([*names])
    except ValueError as exc:
        raise ConfigError(
            f"student_from_teacher.{layer}: {exc} in the teacher's {source.layers!r}, which has {len(names)}"
        ) from None


def _layers_in(network: nn.Module, name: str) -> Mapping[str, nn.Module]:
    """The layers in the list `name` of a network, in order; empty if there is no such layer."""
    return dict(dict(network.named_modules()).get(name, nn.ModuleList()).named_children())
