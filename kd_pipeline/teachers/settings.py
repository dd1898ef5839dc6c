"""Settings of the teacher: what to run, and with which runtime."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeGuard

from pydantic import Field, PositiveFloat, model_validator

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.secret_values import is_secret
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.input_adapter import ExpectedInput
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.storage import Location, StoreSettings
from kd_pipeline.teachers.tensorrt.manifest import Precision

__all__ = [
    "AnyTeacherSettings",
    "EnsembleSettings",
    "Runtime",
    "StudentPrecision",
    "TeacherGroupSettings",
    "TeacherSettings",
    "check_member_name",
    "is_recording",
    "members_of",
    "refuse_unused",
    "views_of",
    "with_runtimes",
]

_NO_TRUST = (
    "settings cannot trust an engine, which is a program, as whoever wrote them can have made the engine too; type "
    '--trust-engine SHA256 on the command line, or pass trust_engines=["SHA256"] in Python'
)
_USED_BY_ALL = {"backend", "view"}
_NO_NESTING = "a member is one teacher; list the members of several at one level"
_USED_BY_RUNTIMES = _USED_BY_ALL | {"outputs", "precision", "max_batch", "num_prefix_tokens"}
_CHANGE_A_MODEL = {"features", "input_adapter"}
_USED_BY_EXPORT = _CHANGE_A_MODEL | {"model"}
_USED_BY = {
    "pytorch": _USED_BY_RUNTIMES | _USED_BY_EXPORT | {"channels_last", "compile", "cuda_graph"},
    "openvino": _USED_BY_RUNTIMES | _USED_BY_EXPORT | {"onnx", "num_threads"},
    "onnxruntime": _USED_BY_RUNTIMES | _USED_BY_EXPORT | {"onnx", "num_threads"},
    "tensorrt": _USED_BY_RUNTIMES | _USED_BY_EXPORT | {"onnx", "engine", "runtime", "cuda_graph"},
    "recorded": _USED_BY_ALL | {"path", "storage", "verify"},
}
_USE_EIGHT_BITS = {"int8": ("openvino", "onnxruntime", "tensorrt"), "fp8": ("tensorrt",)}


_MEMBER_NAME = r"(?!(logits|pooled|spatial)$)[A-Za-z_]\w*"
"""Name of one of several teachers: an identifier, and no output's name, which could be mistaken for the output."""

StudentPrecision = Literal["fp32", "bf16", "fp16"]
"""In which a student can train."""


class Runtime(Settings):
    """How an open teacher runs."""

    backend: str = Field(pattern=r"^\w+$", max_length=20)
    precision: str = Field(pattern=r"^\w+$", max_length=20)

    def __str__(self) -> str:
        return f"{self.backend} in {self.precision}"


class TeacherSettings(Settings):
    """What the teacher is, and which runtime runs it. A setting that the runtime does not use is an error."""

    refused_keys: ClassVar[Mapping[str, str]] = {
        "trust_engine": _NO_TRUST,
        "trust_engines": _NO_TRUST,
        "members": _NO_NESTING,
    }

    backend: Literal["auto", "pytorch", "openvino", "onnxruntime", "tensorrt", "recorded"] = "auto"
    """`auto` picks TensorRT for an engine and `recorded` for a `path`. For an ONNX file it picks OpenVINO on a CPU, and
    on a GPU TensorRT if one is installed that supports it, else ONNX Runtime. A model runs in PyTorch on a GPU; on a
    CPU it is exported once if that pays off, and OpenVINO runs it if it is faster and its outputs agree, else PyTorch.
    Any backend named here runs a model: those that run ONNX files get an export, which is kept in the user's cache."""
    model: ModelSettings | None = None
    """A network by name with its weights."""
    features: tuple[str, ...] = ()
    """Names of layers of the model whose outputs the teacher returns along with its own."""
    view: str = IMAGES
    """The view of each image that it sees: one of the split's `views`, or `images`, which `transform` describes. Of a
    view with a `count` it sees each copy, and its outputs are `[N, count, ...]`. A recording is of one view, which is
    the default there."""
    outputs: tuple[str, ...] = ()
    """Names of the outputs to return, such as `[pooled]`; defaults to all. Nothing is spent on the others where the
    runtime allows: PyTorch does not copy them, and ONNX Runtime does not fetch them."""
    input_adapter: ExpectedInput | Literal["auto"] | None = None
    """Normalization and size of the images that the model was trained on, if the loader's differ: a first layer
    converts. `auto` uses what timm knows of its pretrained networks; the size only for those that take no other. For an
    ONNX file or an engine of your own, set it when exporting or building."""
    onnx: Path | None = None
    """An exported teacher, for `openvino`, `onnxruntime` and `tensorrt`, which first builds an engine from it."""
    engine: Path | None = None
    """A TensorRT engine, built with `kd-pipeline build-engine`."""
    path: Location | None = None
    """The folder of a recording made with `kd-pipeline record`, or its URL (`https://`, `s3://`), whose outputs are
    replayed for the same images."""
    storage: StoreSettings | None = None
    """How a recording is read from a URL, and where its parts are kept."""
    verify: int = Field(default=32, ge=0)
    """How many images, drawn at random at every start, are compared with the recorded ones."""
    precision: Precision | Literal["auto"] = "auto"
    """Precision of the arithmetic. `auto` is the one that the student trains in (`train.precision`), if the hardware
    has it and the teacher's outputs stay close enough to float32 on training images; else fp32. A model in PyTorch on a
    GPU runs in half precision in any case: bf16, or fp16 if the GPU has no bf16. An engine, and an ONNX file under
    `onnxruntime`, keep their own. `int8` quantizes an ONNX file, or a model's export,
    on the run's own images, compares it with float32 and keeps it. `fp8` is for `tensorrt` only."""
    max_batch: int | None = Field(default=None, ge=1)
    """Largest number of images in one call. It defaults to 1024, and to the loader's batch size for an engine that is
    built from an ONNX file."""
    num_prefix_tokens: int | None = Field(default=None, ge=0)
    """How many tokens at the start of its outputs `[N, L, D]` are no part of the image, such as class and register
    tokens. It defaults to what the network or the file says."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU runtimes; defaults to the cores of this process."""
    channels_last: bool = True
    """Run PyTorch's convolutions in NHWC, which is faster for most of them."""
    compile: bool | None = None
    """Compile the PyTorch module with `torch.compile`, which pays off from a few thousand images. It defaults to false
    on a CPU and to true on a GPU, where the module runs without it if it does not compile."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """Which TensorRT builds the engine; `auto` is `tensorrt` if it is installed, else `tensorrt_rtx`."""
    cuda_graph: bool = False
    """Replay the engine, or the PyTorch module at the loader's batch size, as a CUDA graph. It pays off when launches
    take long compared to the work, as with small batches."""

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        files = {"onnx": self.onnx, "engine": self.engine, "path": self.path}
        given = [f"{name}: {file}" for name, file in files.items() if file is not None]
        given += ["model"] if self.model else []
        if len(given) > 1:
            raise ValueError(f"two teachers: {' and '.join(given)}; give one of them")
        if self.model is not None and self.model.input_adapter is not None:
            raise ValueError(
                "model.input_adapter is a student's; set the input_adapter of the teacher beside its model"
            )
        if self.model is not None and self.model.view != IMAGES:
            raise ValueError("model.view is a student's; set the view of the teacher beside its model")
        if self.backend != "auto":
            refuse_unused(self, self.backend)
        return self


class EnsembleSettings(Settings):
    """Several teachers whose averaged outputs count as one teacher's."""

    members: tuple[TeacherSettings, ...] = Field(min_length=1)
    """The teachers, each with the keys of a single one."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Weight of each member, divided by their sum; defaults to equal weights."""
    average: Literal["softmax", "logits"] = "softmax"
    """Average the softmax (arithmetic mean) or the logits (geometric mean)."""

    @model_validator(mode="after")
    def _has_a_weight_for_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.members)} members and {len(self.weights)} weights; give one for each")
        _refuse_recordings(self.members)
        return self


class TeacherGroupSettings(Settings):
    """Several teachers of different kinds, whose outputs stand side by side as `member.output`, such as `dino.pooled`.

    The terms of the loss name what they compare, such as `distill.features: [{loss: cosine, student: pooled, teacher:
    dino.pooled}]`. Each teacher has its own runtime, precision, `input_adapter` and order of classes.
    """

    members: dict[str, TeacherSettings] = Field(min_length=1)
    """Each teacher by a name of your choice, which starts with a letter and has letters, digits and _."""

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        for name in self.members:
            check_member_name(name)
        _refuse_recordings(self.members.values())
        return self


AnyTeacherSettings = TeacherSettings | EnsembleSettings | TeacherGroupSettings
"""One teacher or several."""


def check_member_name(name: str) -> None:
    """Raise a ConfigError if one of several teachers cannot be called `name`."""
    if not re.fullmatch(_MEMBER_NAME, name) or is_secret(name):  # which is hidden in what a run writes
        raise ConfigError(
            f"members: a teacher cannot be called {name!r}; start with a letter, use letters, digits and _, and "
            "neither a word for a secret, such as token, nor logits, pooled or spatial, which are names of outputs"
        )


def members_of(settings: AnyTeacherSettings) -> tuple[TeacherSettings, ...]:
    """The single teachers of `settings`."""
    match settings:
        case TeacherSettings():
            return (settings,)
        case EnsembleSettings():
            return settings.members
    return tuple(settings.members.values())


def views_of(settings: AnyTeacherSettings) -> tuple[str, ...]:
    """The views that the teachers of `settings` see, each once."""
    return tuple(dict.fromkeys(member.view for member in members_of(settings)))


def is_recording(settings: object) -> TypeGuard[TeacherSettings]:
    """Whether `settings` name a recording, which `KDDataLoader` replays, and no teacher that can run."""
    return isinstance(settings, TeacherSettings) and (settings.backend == "recorded" or settings.path is not None)


def _refuse_recordings(members: Iterable[TeacherSettings]) -> None:
    if any(map(is_recording, members)):
        raise ValueError("a recording cannot be a member; record the outputs of all members together")


def with_runtimes(settings: AnyTeacherSettings, runtimes: Sequence[str]) -> AnyTeacherSettings:
    """`settings` with the backend and precision of `Teacher.runtimes` where they leave the choice open.

    An engine and an ONNX file under ONNX Runtime have a precision of their own, which stays open.
    """
    if isinstance(settings, EnsembleSettings):
        if len(runtimes) != len(settings.members):
            return settings  # a different ensemble, which is refused by its fingerprint
        pairs = zip(settings.members, runtimes, strict=True)
        return settings.model_copy(update={"members": tuple(_with_runtime(*pair) for pair in pairs)})
    if isinstance(settings, TeacherGroupSettings):
        if len(runtimes) != len(settings.members):
            return settings
        runs = zip(sorted(settings.members), runtimes, strict=True)  # in the order of a `TeacherGroup`
        members = {name: _with_runtime(settings.members[name], runtime) for name, runtime in runs}
        return settings.model_copy(update={"members": members})
    return _with_runtime(settings, runtimes[0]) if len(runtimes) == 1 else settings


def _with_runtime(settings: TeacherSettings, runtime: str) -> TeacherSettings:
    backend, _, precision = runtime.partition(" ")
    chosen: dict[str, str] = {}
    if settings.backend == "auto":
        chosen["backend"] = backend
    elif settings.backend != backend:
        return settings  # which is another teacher now, as its fingerprint says
    if settings.precision == "auto" and settings.engine is None and backend != "onnxruntime":
        chosen["precision"] = precision
    return settings.model_copy(update=chosen)


def refuse_unused(settings: TeacherSettings, backend: str) -> None:
    """Raise a ConfigError if a setting is not at its default and `backend` does not use it."""
    runtimes = _USE_EIGHT_BITS.get(settings.precision, (backend,))
    if backend not in runtimes:
        raise ConfigError(f"precision: {settings.precision} is for {', '.join(runtimes)}, and the backend is {backend}")
    given = [name for name, field in TeacherSettings.model_fields.items() if getattr(settings, name) != field.default]
    for name in given:
        if name not in _USED_BY[backend]:
            raise ConfigError(
                f"{name}: {getattr(settings, name)} means nothing to the {backend} backend; remove it or change backend"
            )
        if name in _CHANGE_A_MODEL and (file := settings.onnx or settings.engine) is not None:
            raise ConfigError(
                f"{name}: {getattr(settings, name)} means nothing to {file}, which is finished; remove it, set it when "
                "exporting (kd_pipeline.models.features.with_features, input_adapter of export_onnx), or give the model"
            )
