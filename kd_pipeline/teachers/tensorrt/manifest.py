"""What the manifest beside a TensorRT engine says about it, checked before TensorRT sees a byte."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import EngineError

__all__ = [
    "EngineFile",
    "Manifest",
    "Parity",
    "Precision",
    "Profile",
    "Recipe",
    "TensorIO",
    "differences",
    "manifest_path",
    "read_engine",
    "read_manifest",
    "write_manifest",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


class Profile(Settings):
    """Batch sizes that one optimization profile of an engine serves, and the one it is tuned for."""

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
    """The engine's own name for it."""
    shape: tuple[int | None, ...]
    """None stands for the batch."""
    dtype: Literal["float32", "float16"]

    def __str__(self) -> str:
        sizes = ", ".join("N" if size is None else str(size) for size in self.shape)
        return f"[{sizes}] {self.dtype}"


class Parity(Settings):
    """How far the numbers of an engine are from the float32 ONNX file on the same images."""

    measured_on: Literal["engine", "onnx"]
    """`engine` is the engine itself on a GPU; `onnx` is the converted file in ONNX Runtime, rounded like the engine."""
    images: str
    """Where the images came from."""
    num_images: int
    batch_sizes: tuple[int, ...]
    cosine: float
    """Smallest cosine between the two answers to one image, over all outputs."""
    top1_agreement: float
    """Part of the images for which both name the same class, or one that float32 holds for as good."""
    kl: float
    """Mean KL divergence of the two softmaxes at temperature 4, in nats."""
    tensors_sha256: str
    """Digest of the `.parity.npz` beside the engine: the images, and the float32 answers to them."""


class Recipe(Settings):
    """Everything that decides what an engine computes and where it runs; two engines of one recipe are the same."""

    onnx_sha256: str
    """Digest over the ONNX file and its external data, before any change."""
    input_adapter: dict[str, Any] | None
    """The `InputAdapter` that was folded in at the build."""
    extra_outputs: tuple[str, ...]
    """Tensors of the ONNX file that became outputs at the build."""
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
    """Name of the GPU it was built for, or `any`."""
    compute_capability: tuple[str, ...]
    """`("9.0",)` and the like, `("8.0+",)` for that and all later ones, or `("any",)`."""
    workspace: int | None
    """MiB."""
    builder_optimization_level: int | None
    version_compatible: bool
    hardware_compatible: bool
    plugins: tuple[str, ...]
    """Plugin libraries it needs; always none, as they are code from elsewhere."""

    @property
    def key(self) -> str:
        """Hex digest of the whole recipe; names the engine in the cache."""
        return _digest(self.model_dump(mode="json", include=set(Recipe.model_fields)))


class Manifest(Recipe):
    """What is known about one engine file; kept beside it as `<engine>.json`."""

    manifest_version: Literal[1] = 1
    engine_sha256: str
    engine_bytes: int
    image: TensorIO
    outputs: dict[str, TensorIO]
    """By the teacher's name for the output; `logits` is among them."""
    kept_float32: tuple[str, ...]
    """Nodes that stayed in float32: for the range of their values, or because TensorRT lacks them in half precision."""
    parity: Parity
    onnx: str
    """The ONNX file it was built from, where it was then."""
    command: str
    """What builds it again."""
    build_s: float
    """Seconds that TensorRT took."""
    seal: dict[str, str] = Field(default_factory=dict)
    """Digest of every other field when it was written, so that one that was changed by hand can be named."""


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine that may be loaded: the bytes that were checked, so that nobody can change them in between."""

    path: Path
    content: bytes
    manifest: Manifest | None
    """None for an engine from elsewhere that the user vouched for by its digest."""


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies: `<engine>.json`."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path) -> Manifest:
    """The manifest beside an engine, every field as it was written.

    Raises:
        EngineError: there is none, it cannot be read, or a field was changed by hand, which is named.
    """
    path = manifest_path(engine)
    try:
        content = json.loads(path.read_bytes())
        manifest = Manifest.model_validate(content)
    except FileNotFoundError:
        raise EngineError(
            f"{engine} has no manifest {path.name} beside it, so nobody knows where it comes from; build it with "
            "kd-pipeline build-engine, or vouch for it with trust_engine and its sha256"
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
                f"another value; build it again: {manifest.command}"
            )
    return manifest


def write_manifest(engine: Path, manifest: Manifest) -> None:
    """Seal `manifest` and put it beside `engine`; whoever reads there finds the old one or the new one."""
    sealed = manifest.model_copy(update={"seal": _seal(manifest)})
    write_whole(manifest_path(engine), sealed.model_dump_json(indent=2) + "\n")


def differences(manifest: Manifest, wanted: Mapping[str, Any]) -> list[str]:
    """One line for each field of `manifest` that is not what is wanted, with both values."""
    found = manifest.model_dump(mode="json")
    return [
        f"{name}: found {_short(found[name])}, wanted {_short(value)}"
        for name, value in wanted.items()
        if found[name] != value
    ]


def read_engine(path: Path, *, trust_engine: str | None = None) -> EngineFile:
    """Read an engine that this user built and nobody changed since, or one that the user vouches for.

    Engines are programs: whoever can change one runs code on this machine. TensorRT is not called here.

    Args:
        path: the engine; its manifest lies beside it.
        trust_engine: sha256 of an engine that may be loaded whoever wrote it, and without a manifest.

    Raises:
        EngineError: there is no such file, its manifest is missing or does not fit, or others could have changed it.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise EngineError(f"{path} cannot be read: {exc.strerror}; build it with kd-pipeline build-engine") from None
    digest = hashlib.sha256(content).hexdigest()
    if trust_engine is not None:
        if trust_engine.lower() != digest:
            raise EngineError(
                f"{path} has the sha256 {digest}, and trust_engine names {trust_engine}; it is not loaded"
            )
        has_manifest = manifest_path(path).exists()
        return EngineFile(path, content, read_manifest(path) if has_manifest else None)
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
    """Refuse what another user owns or may write to."""
    status = path.stat()
    vouch = f"if you know it is good, vouch for it with trust_engine {digest}"
    if status.st_uid not in (os.geteuid(), 0):
        raise EngineError(f"{path} belongs to user {status.st_uid} and you are {os.geteuid()}; {vouch}")
    # In a folder with the sticky bit, such as /tmp, only the owner of a file can replace it.
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise EngineError(f"{path} can be written by every user of this machine; chmod o-w it and build again; {vouch}")


def _seal(manifest: Manifest) -> dict[str, str]:
    fields = manifest.model_dump(mode="json", exclude={"seal"})
    return {name: _digest(value)[:16] for name, value in fields.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
