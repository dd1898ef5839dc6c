"""The settings that `tune` tries: each with its values, what it can speed up, and what it changes besides the speed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline.bench.tune_steps import Values, with_values
from kd_pipeline.config.config import Config
from kd_pipeline.teachers.settings import TeacherSettings, is_recording
from kd_pipeline.workflows.stage import Stage

__all__ = ["ALLOWABLE", "KNOBS", "Allowed", "Choice", "Knob", "Place", "Speeds"]

Speeds = Literal["loader", "teacher", "student"]

Allowed = Literal["train.precision", "teacher.int8"]
ALLOWABLE: dict[Allowed, str] = {
    "train.precision": "changes the student's arithmetic",
    "teacher.int8": "changes the teacher's outputs by more than half precision does",
}
"""What is chosen only if the user allows it, and why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A run, and where it runs."""

    config: Config
    stage: Stage
    num_cores: int
    default_threads: int
    """torch's threads where `train.num_threads` is not set."""
    on_gpu: bool

    @classmethod
    def of(cls, config: Config, stage: Stage, *, default_threads: int) -> "Place":
        """This machine."""
        return cls(config, stage, num_cores(), default_threads, resolve_device(config.data.device).type == "cuda")

    def is_same(self, values: Values, others: Values) -> bool:
        """Whether two choices of settings come to the same, such as no number of threads and that of the cores.

        Raises:
            ValidationError: the settings in one of them do not go together.
        """
        return self._resolved(values) == self._resolved(others)

    def _resolved(self, values: Values) -> dict[str, Any]:
        settings = with_values(self.config, values).model_dump()
        settings["data"]["num_threads"] = settings["data"]["num_threads"] or self.num_cores
        settings["train"]["num_threads"] = settings["train"]["num_threads"] or self.default_threads
        if self.teacher is not None:
            settings["teacher"]["num_threads"] = settings["teacher"]["num_threads"] or self.num_cores
        return settings

    @property
    def teacher(self) -> TeacherSettings | None:
        """The settings of the teacher that runs in every step, if that is a single one."""
        teacher = self.config.teacher if self.stage == "distill" else None
        return teacher if isinstance(teacher, TeacherSettings) and not is_recording(teacher) else None

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs in every step, or its outputs are replayed."""
        return self.stage == "distill" and self.config.teacher is not None

    @property
    def has_student(self) -> bool:
        """Whether there is a network to train; else the config is for a loop of one's own."""
        return self.stage != "distill" or self.config.student is not None

    @property
    def trains_whole_student(self) -> bool:
        """Whether there is a student whose weights are not sharded, which can be compiled and stored in any order."""
        return self.has_student and self.config.train.strategy != "fsdp"


class Choice(NamedTuple):
    """One value of a knob."""

    values: Values
    needs: Allowed | None = None
    """What the user has to allow first."""


@dataclass(frozen=True, slots=True)
class Knob:
    """Settings that are chosen together."""

    name: str
    speeds: Speeds
    """The part of a step that it can speed up: it is left alone if that part is free anyway."""
    choices: Callable[[Place], Iterable[Choice]]
    """Everything to try in some place; what the config has already may be among it."""


def _each(key: str, *values: Any) -> list[Choice]:
    return [Choice(((key, value),)) for value in values]


def _threads(key: str, applies: Callable[[Place], bool]) -> Callable[[Place], list[Choice]]:
    """All cores, most of them, half, a quarter and one."""

    def choices(place: Place) -> list[Choice]:
        cores = place.num_cores
        numbers = dict.fromkeys([cores, *(max(1, cores * part // 4) for part in (3, 2, 1)), 1])
        return _each(key, *numbers) if applies(place) else []

    return choices


def _teacher_runtimes(place: Place) -> Iterator[Choice]:
    teacher = place.teacher
    if teacher is None or teacher.engine is not None or teacher.backend == "tensorrt":
        return
    backends = ["pytorch"] if teacher.model is not None else []
    if not place.on_gpu:
        backends += ["openvino", "onnxruntime"]
    elif teacher.onnx is not None:
        backends += ["tensorrt", "onnxruntime"]
    for backend in backends:
        for precision in ("fp32", "bf16", *(["fp16"] if place.on_gpu else []), "int8"):
            values = (("teacher.backend", backend), ("teacher.precision", precision))
            yield Choice(values, "teacher.int8" if precision == "int8" else None)


def _student_precisions(place: Place) -> list[Choice]:
    if not place.has_student or place.config.train.precision != "32-true":
        return []
    return [Choice((("train.precision", "bf16-mixed"),), "train.precision")]


def _memory_orders(place: Place) -> list[Choice]:
    return _each("train.channels_last", True, False) if place.trains_whole_student else []


def _has_student(place: Place) -> bool:
    return place.has_student


def _on_gpu(key: str, *values: Any) -> Callable[[Place], list[Choice]]:
    return lambda place: _each(key, *values) if place.on_gpu else []


KNOBS: tuple[Knob, ...] = (
    Knob("train.num_threads", "student", _threads("train.num_threads", _has_student)),
    Knob("teacher.backend and precision", "teacher", _teacher_runtimes),
    Knob("data.num_threads", "loader", _threads("data.num_threads", lambda place: True)),
    Knob(
        "teacher.num_threads",
        "teacher",
        _threads("teacher.num_threads", lambda place: place.teacher is not None and not place.on_gpu),
    ),
    Knob("data.prefetch", "loader", lambda place: _each("data.prefetch", 1, 2, 3, 4)),
    # On a CPU the teacher has finished when its call returns, so nothing runs ahead of anything.
    Knob("data.ahead", "teacher", _on_gpu("data.ahead", 0, 1, 2)),
    Knob("data.decode", "loader", _on_gpu("data.decode", "window", "full")),
    # Not between them, which lets the last bits of an image depend on its batch.
    Knob("data.hw_decoder_load", "loader", _on_gpu("data.hw_decoder_load", 0.0, 1.0)),
    Knob("train.precision", "student", _student_precisions),
    Knob("train.channels_last", "student", _memory_orders),
    Knob("train.compile", "student", lambda place: _each("train.compile", True) if place.trains_whole_student else []),
)
"""In the order in which they are tried: those that the most depends on come first."""
