"""int8 teachers on CPUs: a float32 ONNX file quantized for a runtime, compared with float32, and kept."""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.cpu_features import cpu_name, cpu_precisions
from kd_pipeline._core.files import read_trusted
from kd_pipeline._core.kept_files import kept_folder
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.onnx.file import OnnxFile, read_onnx
from kd_pipeline.onnx.quantize import QUANTIZER_VERSION, quantize_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from kd_pipeline.teachers.parity import CalibrationSet, check_parity, images_digest, make_reference
from kd_pipeline.teachers.tensorrt.manifest import OutputParity

__all__ = ["QuantizedManifest", "quantized_onnx", "read_quantized_manifest"]

_logger = logging.getLogger("kd_pipeline")

Runtime = Literal["openvino", "onnxruntime"]

_FILE, _MANIFEST = "teacher.onnx", "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 20


class _Recipe(Settings):
    """Everything that determines the quantized file and how close it was found to be to float32."""

    onnx_sha256: str
    """Digest of the float32 file and its external weights."""
    images: str
    """Digest of the images that gave the ranges and that the outputs were compared on, or of all they depend on."""
    quantizer: int
    """Version of the code that quantizes."""
    runtime: Runtime
    runtime_version: str
    cpu: str
    batch_sizes: tuple[int, ...]
    """In which the outputs were compared."""

    @property
    def key(self) -> str:
        """Hex digest of all fields."""
        values = self.model_dump(mode="json", include=set(_Recipe.model_fields))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class QuantizedManifest(_Recipe):
    """What is known about a quantized teacher; kept beside it."""

    quantized_sha256: str
    """Digest of the quantized file."""
    onnx: str
    """Path of the float32 file at that time."""
    num_images: int = Field(ge=1)
    outputs: dict[str, OutputParity] = Field(min_length=1)
    """By output, how close it is to that of float32."""


def quantized_onnx(
    onnx: Path,
    runtime: Runtime,
    *,
    calibration_images: Callable[[], Tensor] | None,
    calibration_key: str | None = None,
    batch_size: int | None = None,
    num_threads: int | None = None,
) -> Path:
    """The float32 teacher `onnx` in int8 for a runtime on this CPU: made once, and kept in the user's cache.

    The ranges of the activations come from the images. The outputs of the int8 teacher are compared with those of
    float32 in the same runtime on the same images, one at a time and in batches of `batch_size`.

    Args:
        onnx: a float32 teacher.
        runtime: which runtime the file is for.
        calibration_images: returns images `[N, 3, H, W]` float32 on the CPU, normalized for the teacher.
        calibration_key: digest of what they depend on, by which the file is kept without loading them; without it they
            are loaded at every start.
        batch_size: usual number of images in one call.
        num_threads: threads of the runtime; defaults to the cores of this process.

    Raises:
        ConfigError: there are no images.
        TeacherError: the file is no float32 teacher, has nothing to quantize, the int8 teacher's outputs are too far
            from float32, or the runtime does not compute in int8; what is kept is not what was written.
        OSError: the cache cannot be written.
        MissingPackageError: a package is not installed.
    """
    if calibration_images is None:
        raise ConfigError(
            "precision: int8 takes the ranges of its numbers from real images, and there are none; pass "
            "calibration_images to open_teacher, or use bf16 or fp32"
        )
    file, load = read_onnx(onnx), cache(calibration_images)
    recipe = _Recipe(
        onnx_sha256=file.sha256,
        images=calibration_key or images_digest(load()),
        quantizer=QUANTIZER_VERSION,
        runtime=runtime,
        runtime_version=importlib.metadata.version(runtime),
        cpu=cpu_name(),
        batch_sizes=tuple(sorted({1, batch_size or 1})),
    )
    folder = kept_folder("int8", recipe.key, lambda folder: _make(file, recipe, load(), num_threads, folder))
    manifest = read_quantized_manifest(folder)
    _logger.info(
        "the teacher in int8 for %s, compared with float32 on %d images: %s%s",
        runtime,
        manifest.num_images,
        "; ".join(f"{name!r} {parity}" for name, parity in manifest.outputs.items()),
        ""
        if "int8" in cpu_precisions()
        else "; this CPU has no instructions for int8 (VNNI, AMX), so expect no gain over fp32",
    )
    return folder / _FILE


def read_quantized_manifest(folder: Path) -> QuantizedManifest:
    """The manifest of the quantized teacher in `folder`, whose file is the one that was written with it.

    Raises:
        TeacherError: one of them is missing, was changed, or somebody else could have written it.
    """
    path, advice = folder / _MANIFEST, f"delete the folder {folder}, and start again"
    try:
        manifest = QuantizedManifest.model_validate_json(read_trusted(path, max_bytes=_MAX_MANIFEST_BYTES))
    except OSError as exc:
        raise TeacherError(f"{path} cannot be read: {exc.strerror or exc}; {advice}") from None
    except ValidationError as exc:
        raise TeacherError(printable(f"{path} is no manifest: {exc.errors()[0]['msg']}; {advice}")) from None
    if (manifest.key, manifest.quantized_sha256) != (folder.name, read_onnx(folder / _FILE).sha256):
        raise TeacherError(f"{folder} is not as it was written; {advice}")
    return manifest


def _make(file: OnnxFile, recipe: _Recipe, images: Tensor, num_threads: int | None, folder: Path) -> None:
    """Fill the empty `folder` with the quantized file and its manifest."""
    _logger.info("quantizing the teacher to int8 for %s on %d images, once", recipe.runtime, len(images))
    with closing(_open(recipe.runtime, file.path, "fp32", num_threads)) as teacher:
        reference = make_reference(teacher, CalibrationSet(images, "the calibration images"))
    quantized = quantize_onnx(file.path, folder / _FILE, "int8", images, runtime=recipe.runtime)
    try:
        with closing(_open(recipe.runtime, quantized, "int8", num_threads)) as teacher:
            outputs = check_parity(reference, teacher, batch_sizes=recipe.batch_sizes, precision="int8")
    except TeacherError as exc:  # EngineError is one
        raise type(exc)(str(exc).replace(str(quantized), str(file.path))) from exc
    if read_onnx(file.path).sha256 != recipe.onnx_sha256:
        raise TeacherError(f"{file.path} was changed while it was quantized; start again when it no longer changes")
    manifest = QuantizedManifest(
        **recipe.model_dump(),
        quantized_sha256=read_onnx(quantized).sha256,
        onnx=printable(file.path),
        num_images=len(images),
        outputs=outputs,
    )
    write_atomic(folder / _MANIFEST, f"{manifest.model_dump_json(indent=2)}\n", permissions=0o600)


def _open(runtime: Runtime, onnx: Path, precision: Literal["fp32", "int8"], num_threads: int | None) -> Teacher:
    if runtime == "openvino":
        return OpenVINOTeacher(onnx, precision=precision, num_threads=num_threads)
    return OnnxRuntimeTeacher(onnx, precision=precision, num_threads=num_threads)
