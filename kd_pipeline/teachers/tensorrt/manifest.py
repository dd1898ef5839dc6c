"""The manifest beside a TensorRT engine, which is verified before TensorRT reads a byte of the engine."""

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import EngineError

__all__ = [
    "EngineFile",
    "EngineManifest",
    "Parity",
    "Precision",
    "Profile",
    "Recipe",
    "TensorIO",
    "changed_fields",
    "manifest_path",
    "read_engine",
    "read_manifest",
    "write_manifest",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


class Profile(Settings):
    """One optimization profile of an engine: its range of batch sizes, and the one it is tuned for."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"a profile needs min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class TensorIO(Settings):
    """An input or output of an engine."""

    name: str
    """Its name in the engine."""
    shape: tuple[int | None, ...]
    """None stands for the batch size."""
    dtype: Literal["float32", "float16"]

    def __str__(self) -> str:
        sizes = ", ".join("N" if size is None else str(size) for size in self.shape)
        return f"[{sizes}] {self.dtype}"


class Parity(Settings):
    """How close the outputs of an engine are to those of the float32 ONNX file on the same images."""

    measured_on: Literal["engine", "onnx"]
    """`engine`: the engine itself on a GPU. `onnx`: the converted file in ONNX Runtime, at the engine's precision."""
    images: str
    """Where the images came from."""
    num_images: int
    batch_sizes: tuple[int, ...]
    cosine: float
    """Smallest cosine similarity between the two outputs for an image, over all images and outputs."""
    top1_agreement: float
    """Part of the images whose top class is the same in both, or tied with the top class in float32."""
    kl: float
    """Mean KL divergence between the two softmaxes at temperature 4, in nats."""
    tensors_sha256: str
    """Digest of the `.parity.npz` beside the engine, which holds the images and their float32 outputs."""


class Recipe(Settings):
    """Everything that determines what an engine computes and where it runs; equal recipes make equal engines."""

    onnx_sha256: str
    """Digest over the ONNX file and its external data, before any change."""
    input_adapter: dict[str, Any] | None
    """The `InputAdapter` that the build folded in."""
    extra_outputs: tuple[str, ...]
    """Tensors of the ONNX file that the build made outputs."""
    classes: tuple[str, ...] | None
    """Class names in logit order."""
    precision: Precision
    half_io: bool
    """Whether images are float16."""
    calibration_sha256: str | None
    """Digest of the images that gave int8 and fp8 their ranges."""
    converter: int
    """Version of the code that converts precisions."""
    image_shape: tuple[int, int, int]
    profiles: tuple[Profile, ...]
    runtime: Literal["tensorrt", "tensorrt_rtx"]
    runtime_version: str
    gpu: str
    """Name of the GPU that it was built for, or `any`."""
    compute_capability: tuple[str, ...]
    """Such as `("9.0",)`; `("8.0+",)` for that one and all later ones; or `("any",)`."""
    workspace: int | None
    """MiB."""
    builder_optimization_level: int | None
    version_compatible: bool
    hardware_compatible: bool
    plugins: tuple[str, ...]
    """Plugin libraries that it needs; always none, as they are foreign code."""

    @property
    def key(self) -> str:
        """Hex digest of all fields; part of the engine's name in the cache."""
        return _digest(self.model_dump(mode="json", include=set(Recipe.model_fields)))


class EngineManifest(Recipe):
    """What is known about an engine file; kept beside it as `<engine>.json`."""

    manifest_version: Literal[1] = 1
    engine_sha256: str
    engine_bytes: int
    image: TensorIO
    outputs: dict[str, TensorIO]
    """By the teacher's name for the output; `logits` is among them."""
    kept_float32: tuple[str, ...]
    """Nodes kept in float32, for the range of their values or because TensorRT lacks them in half precision."""
    parity: Parity
    onnx: str
    """Path of the ONNX file at the time of the build."""
    command: str
    """The command that builds the engine again."""
    build_s: float
    """Seconds that TensorRT took."""
    seal: dict[str, str] = Field(default_factory=dict)
    """Digest of every other field, to find those that were changed by hand."""


@dataclass(frozen=True, slots=True)
class EngineFile:
    """A trusted engine. It holds the bytes that were verified, so the file cannot change before they are loaded."""

    path: Path
    content: bytes
    manifest: EngineManifest | None
    """None for an engine without one that the user trusts by its digest."""


def manifest_path(engine: Path) -> Path:
    """The manifest of an engine: `<engine>.json`."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path) -> EngineManifest:
    """Read the manifest beside an engine.

    Raises:
        EngineError: there is none, it is invalid, or a field was changed by hand; names the field.
    """
    path = manifest_path(engine)
    try:
        content = json.loads(path.read_bytes())
        manifest = EngineManifest.model_validate(content)
    except FileNotFoundError:
        raise EngineError(
            f"{engine} has no manifest {path.name} beside it, so its origin is unknown; build it with kd-pipeline "
            "build-engine, or trust it with trust_engine and its sha256"
        ) from None
    except ValidationError as exc:
        problem = exc.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "the whole file"
        raise EngineError(f"{path}: {field}: {problem['msg']}, found {problem['input']!r}; build it again") from None
    except (OSError, ValueError, RecursionError) as exc:
        raise EngineError(f"{path} cannot be read: {exc}; build the engine again") from None
    if manifest.seal.keys() != _seal(manifest).keys():
        raise EngineError(f"{path}: the seal does not cover every field; build it again: {manifest.command}")
    for name, digest in _seal(manifest).items():
        if manifest.seal.get(name) != digest:
            raise EngineError(
                f"{path}: {name} was changed since the build: found {_short(content.get(name))}, and its seal is for "
                f"a different value; build it again: {manifest.command}"
            )
    return manifest


def write_manifest(engine: Path, manifest: EngineManifest) -> None:
    """Seal `manifest` and write it beside `engine`, in place of an old one at once."""
    sealed = manifest.model_copy(update={"seal": _seal(manifest)})
    write_atomic(manifest_path(engine), sealed.model_dump_json(indent=2) + "\n")


def changed_fields(manifest: EngineManifest, wanted: Mapping[str, Any]) -> list[str]:
    """A line for each field of `manifest` whose value is not the wanted one, with both values."""
    found = manifest.model_dump(mode="json")
    return [
        f"{name}: found {_short(found[name])}, wanted {_short(value)}"
        for name, value in wanted.items()
        if found[name] != value
    ]


def read_engine(path: Path, *, trust_engines: Collection[str] = ()) -> EngineFile:
    """Read an engine that this user built and that is unchanged since, or one that the user trusts by its digest.

    Engines are programs: whoever can change one runs code on this machine. TensorRT is not called here.

    Args:
        path: the engine, with its manifest beside it.
        trust_engines: sha256 of engines to load no matter who wrote them, with or without a manifest.

    Raises:
        EngineError: the file or its manifest is missing, they do not match, or others could have changed them.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise EngineError(f"{path} cannot be read: {exc.strerror}; build it with kd-pipeline build-engine") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest in map(str.lower, trust_engines):
        return EngineFile(path, content, read_manifest(path) if manifest_path(path).exists() else None)
    manifest = read_manifest(path)
    if manifest.engine_sha256 != digest:
        raise EngineError(
            f"{path} was changed since the build: engine_sha256: found {digest}, wanted {manifest.engine_sha256}; "
            f"build it again: {manifest.command}"
        )
    for file in (path, manifest_path(path), path.resolve().parent):
        _refuse_foreign(file, digest)
    return EngineFile(path, content, manifest)


def _refuse_foreign(path: Path, digest: str) -> None:
    """Raise if `path` belongs to another user or others may write to it."""
    status = path.stat()
    advice = f"if you trust it anyway, set trust_engine to {digest}"
    if status.st_uid not in (os.geteuid(), 0):
        raise EngineError(f"{path} belongs to user {status.st_uid} and you are {os.geteuid()}; {advice}")
    # In a folder with the sticky bit, such as /tmp, only the owner of a file can replace it.
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise EngineError(f"{path} is writable by every user of this machine; chmod o-w it and build again; {advice}")


def _seal(manifest: EngineManifest) -> dict[str, str]:
    fields = manifest.model_dump(mode="json", exclude={"seal"})
    return {name: _digest(value)[:16] for name, value in fields.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
