"""What a config says of the teacher: which runtime runs it, and how."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.input_adapter import WantedInput
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.tensorrt.manifest import Precision

__all__ = ["EnsembleSettings", "TeacherSettings", "refuse_unused"]

_USED_BY_ALL = {"backend"}
_USED_BY_RUNTIMES = _USED_BY_ALL | {"precision", "max_batch"}
_USED_BY = {
    "pytorch": _USED_BY_RUNTIMES | {"model", "features", "input_adapter", "channels_last", "compile", "cuda_graph"},
    "openvino": _USED_BY_RUNTIMES | {"onnx", "num_threads"},
    "onnxruntime": _USED_BY_RUNTIMES | {"onnx", "num_threads"},
    "tensorrt": _USED_BY_RUNTIMES | {"onnx", "engine", "runtime", "cuda_graph", "trust_engine"},
    "recorded": _USED_BY_ALL | {"path", "verify"},
}


class TeacherSettings(Settings):
    """Which runtime runs the teacher, and how. A setting that the chosen runtime does not use is an error."""

    backend: Literal["auto", "pytorch", "openvino", "onnxruntime", "tensorrt", "recorded"] = "auto"
    """`auto` takes PyTorch for a model, TensorRT for an engine, and a recording where there is a `path`. For an ONNX
    file it takes OpenVINO on a CPU; on a GPU, TensorRT where one is installed that is made for it, or else ONNX
    Runtime."""
    model: ModelSettings | None = None
    """A network by name and its weights, for `pytorch`."""
    features: tuple[str, ...] = ()
    """Layers of the model, by name, whose outputs the teacher returns beside the logits."""
    input_adapter: WantedInput | Literal["auto"] | None = None
    """The images that the model was trained on, where the loader's are others: a first layer brings them to that
    normalization and size. `auto` takes what timm knows of its pretrained networks, with the size only of those that
    take no other. For an ONNX file or an engine, fold it in when it is made."""
    onnx: Path | None = None
    """The exported teacher, for every backend but `pytorch`; `tensorrt` builds an engine from it when first asked."""
    engine: Path | None = None
    """A TensorRT engine, made by `kd-pipeline build-engine`."""
    path: Path | None = None
    """The folder of a recording, made by `kd-pipeline record`, whose answers are given again for the same images."""
    verify: int = Field(default=32, ge=0)
    """How many images, drawn anew at every start, are compared with those that were recorded."""
    precision: Precision | None = None
    """Precision of the arithmetic. It defaults to fp32, for `pytorch` on a GPU to half precision (bf16, or fp16 where
    the GPU has no bf16), and to what an engine or an ONNX file of `onnxruntime` has, which neither can change. `int8`
    and `fp8` are TensorRT's alone."""
    max_batch: int | None = Field(default=None, ge=1)
    """Largest number of images in one call; unless given 1024, and the loader's batch for an engine that is built on
    the way."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU runtimes; the cores of this process unless given."""
    channels_last: bool = True
    """Run PyTorch's convolutions in NHWC, which is the faster layout for most of them."""
    compile: bool | None = None
    """Compile the PyTorch module with `torch.compile`, which is worth it from a few thousand images on; defaults to
    true on a GPU, as far as that works there, and to false on a CPU."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """Which TensorRT builds the engine; `auto` is `tensorrt` where it is installed and `tensorrt_rtx` otherwise."""
    cuda_graph: bool = False
    """Replay the engine, or the PyTorch module at the loader's batch size, as a CUDA graph; worth it where launches
    are slow beside the work, as with small batches."""
    trust_engine: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """sha256 of an engine that somebody else made, or that has no manifest, and that you know to be good."""

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        files = {"onnx": self.onnx, "engine": self.engine, "path": self.path}
        given = [
            *(f"{name}: {file}" for name, file in files.items() if file is not None),
            *(["model"] if self.model else []),
        ]
        if len(given) > 1:
            raise ValueError(f"two teachers: {' and '.join(given)}; give one of them")
        if self.trust_engine is not None and self.engine is None:
            raise ValueError("trust_engine names the sha256 of an engine, and there is no engine")
        if self.backend != "auto":
            refuse_unused(self, self.backend)
        return self


class EnsembleSettings(Settings):
    """Several teachers that answer as one."""

    members: tuple[TeacherSettings, ...] = Field(min_length=1)
    weights: tuple[PositiveFloat, ...] | None = None
    """How much each counts, relative to their sum; all the same unless given."""
    average: Literal["softmax", "logits"] = "softmax"
    """What is averaged."""

    @model_validator(mode="after")
    def _has_a_weight_for_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.members)} members and {len(self.weights)} weights; give one for each")
        if any(member.backend == "recorded" or member.path is not None for member in self.members):
            raise ValueError("a recording cannot be a member; record the answers of the whole ensemble")
        return self


def refuse_unused(settings: TeacherSettings, backend: str) -> None:
    """Raise ConfigError if a setting is given that `backend` does not use."""
    if settings.precision in ("int8", "fp8") and backend != "tensorrt":
        raise ConfigError(f"precision: {settings.precision} is TensorRT's alone, and the backend is {backend}")
    for name, field in TeacherSettings.model_fields.items():
        if name not in _USED_BY[backend] and (value := getattr(settings, name)) != field.default:
            raise ConfigError(f"{name}: {value} means nothing to the {backend} backend; remove it or change backend")
