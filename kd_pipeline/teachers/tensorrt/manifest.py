"""The manifest beside a TensorRT engine, which is verified before TensorRT reads a byte of the engine."""

import hashlib
import json
import logging
import os
import re
import reprlib
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import UntrustedFileError, open_regular, open_trusted, read_trusted
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError, EngineError

__all__ = [
    "EngineFile",
    "EngineManifest",
    "OutputParity",
    "Parity",
    "Precision",
    "Profile",
    "Recipe",
    "TensorIO",
    "changed_fields",
    "manifest_path",
    "read_engine",
    "read_if_digest",
    "read_manifest",
    "read_own_engine",
    "why_unreadable",
    "write_manifest",
]

_logger = logging.getLogger("kd_pipeline")

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

_MAX_MANIFEST_BYTES = 4 << 20
_MAX_VALUES = 100_000
"""In a manifest, most of which are class names. Each can be wrong, which takes kilobytes to say."""
_MAX_ENGINE_BYTES = 16 << 30
_PART_BYTES = 1 << 20


class Profile(Settings):
    """One optimization profile of an engine: its range of batch sizes, and the one it is tuned for."""

    min: int = Field(ge=1)
    """Smallest batch."""
    opt: int = Field(ge=1)
    """The batch size that the engine is tuned for."""
    max: int = Field(ge=1)
    """Largest batch."""

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
    num_prefix_tokens: int | None = Field(default=None, ge=0)
    """As in `TensorSpec`."""

    @model_validator(mode="after")
    def _has_the_prefix(self) -> Self:
        if self.num_prefix_tokens is not None and (
            len(self.shape) != 3 or self.shape[1] is None or self.num_prefix_tokens >= self.shape[1]
        ):
            raise ValueError(f"{self} cannot have {self.num_prefix_tokens} prefix tokens")
        return self

    def __str__(self) -> str:
        sizes = ", ".join("N" if size is None else str(size) for size in self.shape)
        return f"[{sizes}] {self.dtype}"


class OutputParity(Settings):
    """How close an output is to that of float32, for the same images."""

    cosine: float
    """Smallest cosine similarity over the images, of the whole output for each."""
    position_cosine: float | None = None
    """Of tokens and maps: smallest cosine similarity over the tokens or positions, of the vectors that all images have
    there."""
    pooled_cosine: float | None = None
    """Of tokens and maps: smallest cosine similarity over the images, of the mean over the tokens or positions."""
    norm_ratio: float
    """Ratio of the norms for an image; the one farthest from 1."""
    top1_agreement: float | None = None
    """Of logits: part of the images whose top class is the same in both, or tied with the top class in float32."""
    kl: float | None = None
    """Of logits: mean KL divergence between the two softmaxes at temperature 4, in nats."""

    def __str__(self) -> str:
        parts = [f"cosine {self.cosine:.6f}"]
        if self.position_cosine is not None:
            parts.append(f"of each position {self.position_cosine:.6f}")
        if self.pooled_cosine is not None:
            parts.append(f"pooled {self.pooled_cosine:.6f}")
        parts.append(f"norm ratio {self.norm_ratio:.4f}")
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {self.top1_agreement:.1%}")
        if self.kl is not None:
            parts.append(f"KL {self.kl:.2g}")
        return ", ".join(parts)


class Parity(Settings):
    """How close the outputs of an engine are to those of the float32 ONNX file on the same images."""

    measured_on: Literal["engine", "onnx"]
    """`engine`: the engine itself on a GPU. `onnx`: the converted file in ONNX Runtime, at the engine's precision."""
    images: str
    """Where the images came from."""
    num_images: int = Field(ge=1)
    batch_sizes: tuple[int, ...]
    outputs: dict[str, OutputParity] = Field(min_length=1)
    """By the teacher's name for the output; the worst over the batch sizes."""
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
    """By the teacher's name for the output."""
    kept_float32: tuple[str, ...]
    """Nodes kept in float32, for the range of their values or because TensorRT lacks them in half precision."""
    parity: Parity
    onnx: str
    """Path of the ONNX file at the time of the build."""
    arguments: tuple[str, ...]
    """Those of `kd-pipeline build-engine` that build the engine again."""
    build_s: float
    """Seconds that TensorRT took."""
    seal: dict[str, str] = Field(default_factory=dict)
    """Digest of every other field, to find those that were changed by hand."""

    @property
    def command(self) -> str:
        """The command that builds the engine again; never a different one, and safe to paste into a shell."""
        return printable(shlex.join(("kd-pipeline", "build-engine", *self.arguments)))


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
        EngineError: there is none, somebody else could have written it, it is invalid, or a field was changed by hand;
            names the field.
    """
    path = manifest_path(engine)
    try:
        content = read_trusted(path, max_bytes=_MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise _UnprovenError(
            f"{engine} has no manifest {path.name} beside it, so its origin is unknown; build it with kd-pipeline "
            "build-engine"
        ) from None
    except OSError as exc:
        raise _UnprovenError(why_unreadable(path, exc, "; delete it, and build the engine again")) from None
    if content.count(b",") > _MAX_VALUES:
        raise _UnprovenError(f"{path} holds more than {_MAX_VALUES} values; build the engine again")
    try:
        values = json.loads(content)
        manifest = EngineManifest.model_validate(values)
        seal = _seal(manifest)
    except ValidationError as exc:
        problem = exc.errors()[0]
        field = _cut(".".join(map(str, problem["loc"]))) or "the whole file"
        found = reprlib.repr(problem["input"])
        raise _UnprovenError(f"{path}: {field}: {problem['msg']}, found {found}; build the engine again") from None
    except (ValueError, RecursionError) as exc:
        raise _UnprovenError(f"{path} cannot be read: {exc}; build the engine again") from None
    if manifest.seal.keys() != seal.keys():
        raise _error(f"{path}: the seal does not cover every field; build it again: {manifest.command}")
    for name, digest in seal.items():
        if manifest.seal[name] != digest:
            raise _error(
                f"{path}: {name} was changed since the build: found {_short(values.get(name))}, and its seal is for "
                f"a different value; build it again: {manifest.command}"
            )
    return manifest


def write_manifest(engine: Path, manifest: EngineManifest) -> None:
    """Seal `manifest` and write it beside `engine`, in place of an old one at once.

    Raises:
        EngineError: it is too large to be read again.
        OSError: it cannot be written.
    """
    sealed = manifest.model_copy(update={"seal": _seal(manifest)})
    content = f"{sealed.model_dump_json(indent=2)}\n".encode()
    if len(content) > _MAX_MANIFEST_BYTES or content.count(b",") > _MAX_VALUES:
        raise _error(
            f"{manifest_path(engine)} would be too large, mostly for class names; build from an ONNX file without them"
        )
    write_atomic(manifest_path(engine), content, permissions=0o644)  # whatever the umask, as it is not read else


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
        trust_engines: sha256 digests of engines to load no matter who wrote them, with or without a manifest. They come
            from what a user types, never from a file.

    Raises:
        EngineError: the file or its manifest is missing, they do not match, or others could have changed them.
        ConfigError: one of `trust_engines` is no digest.
    """
    digests = {_checked_digest(each) for each in trust_engines}
    mismatch = ""
    if digests:
        try:
            with open_regular(path, max_bytes=_MAX_ENGINE_BYTES) as file:
                digest, content = read_if_digest(file, digests)
        except OSError as exc:
            raise EngineError(why_unreadable(path, exc)) from None
        if content is not None:
            return EngineFile(path, content, _manifest_of(path, digest))
        mismatch = f"; its sha256 is {digest}, which is none of those that you trust"
    try:
        return read_own_engine(path)
    except _UnprovenError as exc:
        raise EngineError(f"{exc}{mismatch or _advice(path)}") from None


def read_own_engine(path: Path) -> EngineFile:
    """Read an engine as `read_engine` does, but none that is only trusted by its digest; it always has a manifest.

    Raises:
        EngineError: as `read_engine`.
    """
    try:
        with open_trusted(path, max_bytes=_MAX_ENGINE_BYTES) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            manifest = read_manifest(path)
            content = file.read(num_bytes) if num_bytes == manifest.engine_bytes else b""
    except FileNotFoundError as exc:
        raise _error(f"{path} cannot be read: {exc.strerror}; build it with kd-pipeline build-engine") from None
    except OSError as exc:
        raise _UnprovenError(why_unreadable(path, exc)) from None
    digest = hashlib.sha256(content).hexdigest()
    if num_bytes != manifest.engine_bytes:
        changed = f"engine_bytes: found {num_bytes}, wanted {manifest.engine_bytes}"
    elif digest != manifest.engine_sha256:
        changed = f"engine_sha256: found {digest}, wanted {manifest.engine_sha256}"
    else:
        return EngineFile(path, content, manifest)
    raise _error(f"{path} was changed since the build: {changed}; build it again: {manifest.command}")


def read_if_digest(file: BinaryIO, digests: Collection[str]) -> tuple[str, bytes | None]:
    """The sha256 of an open file, and its content if that is one of `digests`; else no more than a part is held."""
    num_bytes = left = os.fstat(file.fileno()).st_size  # somebody may add to it for good
    digest = hashlib.sha256()
    while left and (part := file.read(min(left, _PART_BYTES))):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest() not in digests:
        return digest.hexdigest(), None
    file.seek(0)
    content = file.read(num_bytes)
    found = hashlib.sha256(content).hexdigest()  # it may have changed in between
    return found, content if found in digests else None


def why_unreadable(path: Path, exc: OSError, advice: str = "") -> str:
    """What to say about a file that cannot be opened or is not trusted; `advice` is only for the first."""
    if isinstance(exc, UntrustedFileError):
        return printable(f"{path} is not trusted: {exc.strerror}")
    return printable(f"{path} cannot be read: {exc.strerror}{advice}")


class _UnprovenError(EngineError):
    """Nothing shows who built an engine, so there is no command either that builds it again."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def _manifest_of(engine: Path, digest: str) -> EngineManifest | None:
    """The manifest of an engine that is trusted by its digest, if it is trusted itself and names that digest."""
    try:
        manifest = read_manifest(engine)
        if manifest.engine_sha256 == digest:
            return manifest
        reason = printable(f"{manifest_path(engine)} is that of a different engine")
    except EngineError as exc:
        reason = str(exc)
    _logger.warning(
        "%s is opened without a manifest, and its outputs were never compared with the float32 model's: %s",
        printable(engine),
        reason,
    )
    return None


def _advice(path: Path) -> str:
    """How to open the engine all the same; empty if that would not work either."""
    try:
        open_regular(path, max_bytes=_MAX_ENGINE_BYTES).close()
    except OSError:
        return ""
    return (
        "; or, if whoever built it told you its sha256, trust that with --trust-engine DIGEST (in Python "
        'trust_engines=["DIGEST"])'
    )


def _checked_digest(text: str) -> str:
    if re.fullmatch("[0-9a-fA-F]{64}", text) is None:
        raise ConfigError(f"trust_engines is a list of sha256 digests, of 64 hex digits each, and holds {text!r}")
    return text.lower()


def _seal(manifest: EngineManifest) -> dict[str, str]:
    fields = manifest.model_dump(mode="json", exclude={"seal"})
    return {name: _digest(value)[:16] for name, value in fields.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _error(message: str) -> EngineError:
    """An error of one line, whatever strangers wrote into the manifest."""
    return EngineError(printable(message))
