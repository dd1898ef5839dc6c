"""Build a TensorRT engine from an ONNX file: convert it, check its parity, compile it, and write its manifest."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.image_size import height_width
from kd_pipeline.data.sources.labels import class_names
from kd_pipeline.errors import EngineError, TeacherError
from kd_pipeline.onnx.edit import edit_onnx
from kd_pipeline.onnx.file import OnnxFile, read_onnx
from kd_pipeline.onnx.half_precision import CONVERTER_VERSION, convert_precision, emulate_precision
from kd_pipeline.onnx.quantize import quantize_onnx
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.parity import (
    CalibrationSet,
    ParityReference,
    check_parity,
    generate_calibration_set,
    images_digest,
    make_reference,
)
from kd_pipeline.teachers.tensorrt.builder_process import BuilderJob, run_builder
from kd_pipeline.teachers.tensorrt.load import capability_of, record_engine_parity
from kd_pipeline.teachers.tensorrt.manifest import (
    EngineManifest,
    Parity,
    Recipe,
    TensorIO,
    changed_fields,
    manifest_path,
    read_own_engine,
    write_manifest,
)
from kd_pipeline.teachers.tensorrt.output import (
    build_folder,
    cache_folder,
    check_paths,
    engine_errors,
    lock_engine,
)
from kd_pipeline.teachers.tensorrt.package import TensorRT, open_tensorrt
from kd_pipeline.teachers.tensorrt.parity import load_reference, parity_path
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["build_engine"]

_MAX_ONNX_BATCH = 64
"""Largest batch in which the converted file is checked, as that runs on a CPU; the engine is checked in all of them."""
_BUILDER_OPTIONS = {"workspace", "builder_optimization_level", "version_compatible", "hardware_compatible"}
"""Settings that recipe and builder take as they are."""


def build_engine(
    settings: BuildSettings,
    *,
    save_engine: Path | None = None,
    calibration_set: Callable[[], CalibrationSet] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Build the engine that `settings` describe, unless it exists already, and return its path.

    The outputs of the converted file are compared with those of the float32 file before TensorRT is called, and on a
    machine that can run the engine its own outputs too. While one process builds an engine, others wait for it.

    Args:
        settings: which engine to build.
        save_engine: where to save it; defaults to a file in `cache_folder()` whose name depends on all its settings.
        calibration_set: returns the images for the parity check and for the ranges of int8 and fp8. It is called only
            if they are needed. Without it the images are generated, which is an error for int8 and fp8.
        report: called with each line of progress.

    Raises:
        EngineError: the file makes no engine, its outputs are too far off, TensorRT cannot build it, a file cannot be
            read or written, or somebody else could replace the engine.
        TeacherError: the file is no teacher.
        MissingPackageError: TensorRT or a package for the conversion is not installed.
    """
    with engine_errors(save_engine):
        file, tensorrt = read_onnx(settings.onnx), open_tensorrt(settings.runtime)
        image_shape = _image_shape(settings, file)
        calibration_set = _checked(calibration_set, settings, image_shape)
        recipe = _recipe(settings, file, image_shape, calibration_set, tensorrt)
        name = f"{file.path.stem}-{settings.precision}-{recipe.key[:16]}.engine"
        engine = cache_folder() / name if save_engine is None else save_engine.absolute()
        check_paths(engine, settings.timing_cache)
        with lock_engine(engine, lambda: report(f"waiting for another process that builds {engine}")):
            if not _is_current(engine, recipe, report):
                with build_folder(engine) as folder:
                    _Build(settings, file, recipe, calibration_set, tensorrt, report).run(folder, engine)
    return engine


@dataclass(frozen=True)
class _Build:
    """One build of an engine."""

    settings: BuildSettings
    file: OnnxFile
    recipe: Recipe
    calibration_set: Callable[[], CalibrationSet]
    tensorrt: TensorRT
    report: Callable[[str], None]

    def run(self, folder: Path, engine: Path) -> None:
        """Make the engine and its files in `folder`, and then move them to where `engine` is to be."""
        built = folder / engine.name
        with self._source() as source:
            edited = self._edit(source, folder)
            converted, emulated, kept_float32 = self._convert(edited, folder)
            reference, parity = self._check_parity(edited, emulated, built)
            started = time.perf_counter()
            self._compile(converted, built)
            build_s = time.perf_counter() - started
            image, outputs = _tensors(read_onnx(converted), reference)
        manifest = EngineManifest(
            **self.recipe.model_dump(),
            engine_sha256=hashlib.sha256(built.read_bytes()).hexdigest(),
            engine_bytes=built.stat().st_size,
            image=image,
            outputs=outputs,
            kept_float32=kept_float32,
            parity=parity,
            onnx=str(self.file.path),
            arguments=self.settings.arguments(engine, calibrate=self.calibration_set().config),
            build_s=round(build_s, 3),
        )
        write_manifest(built, manifest)
        if torch.cuda.is_available():
            self.report("comparing the engine with the float32 file")
            record_engine_parity(built, torch.device("cuda", torch.cuda.current_device()), report=self.report)
        if read_onnx(self.file.path).sha256 != self.file.sha256:
            raise EngineError(f"{self.file.path} was changed during the build; build again when it no longer changes")
        # The engine comes last: until then there is none, or one that does not match its manifest and is built again.
        for path in (parity_path(built), manifest_path(built), built):
            os.replace(path, engine.parent / path.name)

    @contextmanager
    def _source(self) -> Iterator[Path]:
        """A copy of the file that others cannot change while it is built; errors name the file itself."""
        with self.file.private_copy() as source:
            try:
                yield source
            except TeacherError as exc:  # EngineError is one
                raise type(exc)(str(exc).replace(str(source), str(self.file.path))) from exc

    def _edit(self, source: Path, folder: Path) -> Path:
        """`source` with adapter, outputs and classes of the settings; the file itself if there are none."""
        settings = self.settings
        if self.file.precision != "fp32":
            raise EngineError(
                f"{self.file.path} holds {self.file.precision} weights; give the float32 file, from which the build "
                "makes every precision and with which it compares them"
            )
        OnnxRuntimeTeacher(source).close()  # fail early on truncated weights and unknown operators
        if settings.input_adapter is None and not settings.outputs and settings.classes is None:
            return source
        return edit_onnx(
            source,
            folder / "edited.onnx",
            input_adapter=settings.input_adapter,
            outputs=settings.outputs,
            classes=self.recipe.classes,
        )

    def _convert(self, edited: Path, folder: Path) -> tuple[Path, Path, tuple[str, ...]]:
        """The file for TensorRT, one that emulates it in ONNX Runtime, and the nodes kept in float32."""
        precision, converted = self.settings.precision, folder / "converted.onnx"
        match precision:
            case "fp32":
                return edited, edited, ()
            case "fp16" | "bf16":
                self.report(f"converting to {precision}")
                images = self.calibration_set().images
                kept = convert_precision(edited, converted, precision, images, half_io=self.settings.half_io)
                return converted, emulate_precision(converted, folder / "emulated.onnx"), kept
            case "int8" | "fp8":
                self.report(f"finding the ranges for {precision}")
                quantize_onnx(edited, converted, precision, self.calibration_set().images)
                return converted, converted, ()

    def _check_parity(self, edited: Path, emulated: Path, built: Path) -> tuple[ParityReference, Parity]:
        """Compare the converted file with the float32 file in ONNX Runtime; saves the reference beside `built`."""
        precision, images = self.settings.precision, self.calibration_set()
        self.report(f"comparing {precision} with float32 on {len(images.images)} images")
        dtype = torch.float16 if self.settings.half_io else torch.float32
        sizes = {min(size, _MAX_ONNX_BATCH) for each in self.recipe.profiles for size in (1, each.opt, each.max)}
        batch_sizes = tuple(sorted(sizes))
        with closing(OnnxRuntimeTeacher(edited)) as teacher:
            reference = make_reference(teacher, images)
        # ONNX Runtime's optimizer would drop the roundings that emulate half precision.
        with closing(OnnxRuntimeTeacher(emulated, optimize=precision == "fp32")) as teacher:
            outputs = check_parity(
                reference, lambda images: teacher(images.to(dtype)), batch_sizes=batch_sizes, precision=precision
            )
        content = reference.to_bytes()
        write_atomic(parity_path(built), content, permissions=0o644)
        return reference, Parity(
            measured_on="onnx",
            images=reference.source,
            num_images=len(reference.images),
            batch_sizes=batch_sizes,
            outputs=outputs,
            tensors_sha256=hashlib.sha256(content).hexdigest(),
        )

    def _compile(self, converted: Path, engine: Path) -> None:
        settings = self.settings
        job = BuilderJob(
            onnx=converted,
            engine=engine,
            input_name=self.file.input_name,
            image_shape=self.recipe.image_shape,
            batch_sizes=tuple((each.min, each.opt, each.max) for each in settings.profiles),
            runtime=self.tensorrt.runtime,
            tf32=settings.precision != "fp32",
            timing_cache=settings.timing_cache and settings.timing_cache.absolute(),
            compute_capability=settings.compute_capability,
            **settings.model_dump(include=_BUILDER_OPTIONS),
        )
        self.report(f"building with {self.tensorrt.runtime} {self.tensorrt.version}")
        run_builder(job, engine.parent, self.report)


def _checked(
    calibration_set: Callable[[], CalibrationSet] | None, settings: BuildSettings, image_shape: tuple[int, int, int]
) -> Callable[[], CalibrationSet]:
    """`calibration_set`, or one that generates images; cached and checked for the size of its images."""
    if calibration_set is None and settings.precision in ("int8", "fp8"):
        raise EngineError(
            f"{settings.precision} takes its ranges from real images, and there are none; pass calibration_set "
            "(--calibrate with a config), or use fp16 or bf16"
        )

    @cache
    def checked() -> CalibrationSet:
        found = generate_calibration_set(image_shape) if calibration_set is None else calibration_set()
        if found.images.shape[1:] != image_shape:
            raise EngineError(
                f"the engine takes images {list(image_shape)}, and {found.source} gives "
                f"{list(found.images.shape[1:])}; set the size of its transform, or export the teacher for that size"
            )
        return found

    return checked


def _image_shape(settings: BuildSettings, file: OnnxFile) -> tuple[int, int, int]:
    if len(file.images.shape) != 4 or file.images.shape[1] != 3:
        raise EngineError(
            f"{file.path} takes {file.images}, and an engine is built for images [N, 3, H, W]; use "
            "backend: onnxruntime for the file, or backend: pytorch for its network"
        )
    # After a resize the size that the file takes does not matter.
    is_resized = settings.input_adapter is not None and settings.input_adapter.size is not None
    height, width = (None, None) if is_resized else file.images.shape[2:]
    size = None if settings.image_size is None else height_width(settings.image_size)
    if size is None and (height is None or width is None):
        raise EngineError(
            f"{file.path} takes images of any size{' after its resize' if is_resized else ''}, and an engine takes "
            "one; set it with image_size (--image-size)"
        )
    if size is not None and (height not in (None, size[0]) or width not in (None, size[1])):
        raise EngineError(
            f"{file.path} takes images of {height} x {width}, wanted {size[0]} x {size[1]}; give it images of its own "
            "size, or fold a resize into it with an input adapter"
        )
    return (3, *size) if size is not None else (3, height or 0, width or 0)


def _recipe(
    settings: BuildSettings,
    file: OnnxFile,
    image_shape: tuple[int, int, int],
    calibration_set: Callable[[], CalibrationSet],
    tensorrt: TensorRT,
) -> Recipe:
    adapter, is_calibrated = settings.input_adapter, settings.precision in ("int8", "fp8")
    gpu, compute_capability = _hardware(settings, tensorrt)
    return Recipe(
        onnx_sha256=file.sha256,
        input_adapter=None if adapter is None else adapter.model_dump(mode="json"),
        extra_outputs=settings.outputs,
        classes=file.classes if settings.classes is None else class_names(settings.classes),
        calibration_sha256=images_digest(calibration_set().images) if is_calibrated else None,
        converter=CONVERTER_VERSION,
        image_shape=image_shape,
        runtime=tensorrt.runtime,
        runtime_version=tensorrt.version,
        gpu=gpu,
        compute_capability=compute_capability,
        plugins=(),
        **settings.model_dump(include={"precision", "half_io", "profiles"} | _BUILDER_OPTIONS),
    )


def _hardware(settings: BuildSettings, tensorrt: TensorRT) -> tuple[str, tuple[str, ...]]:
    """Name and compute capability of the GPUs that the engine is for."""
    if tensorrt.runtime == "tensorrt_rtx":
        if settings.hardware_compatible:
            raise EngineError("tensorrt_rtx has no --hardware-compatible; name GPUs with --compute-capability")
        return "any", settings.compute_capability or ("any",)
    if settings.compute_capability:
        raise EngineError("tensorrt builds for the GPU it runs on; --compute-capability is for --runtime tensorrt_rtx")
    if not torch.cuda.is_available():
        raise EngineError(
            "tensorrt builds on the GPU that the engine is for, and torch sees none here; build there, or use "
            "--runtime tensorrt_rtx, whose builder needs no GPU"
        )
    if settings.hardware_compatible:
        return "any", ("8.0+",)
    return torch.cuda.get_device_name(), (capability_of(torch.device("cuda", torch.cuda.current_device())),)


def _is_current(engine: Path, recipe: Recipe, report: Callable[[str], None]) -> bool:
    """Whether `engine` exists, is trusted, and was built from `recipe`; reports why it is built again if not."""
    if not engine.exists():
        return False
    try:
        manifest = read_own_engine(engine).manifest
        assert manifest is not None  # only an engine that is trusted by its digest may have none
        load_reference(engine, manifest.parity)
    except EngineError as error:
        report(f"building again, because {error}")
        return False
    if changed := changed_fields(manifest, recipe.model_dump(mode="json")):
        report(f"building again, because {engine} is different: {'; '.join(changed)}")
        return False
    report(f"{engine} already exists")
    return True


def _tensors(converted: OnnxFile, reference: ParityReference) -> tuple[TensorIO, dict[str, TensorIO]]:
    """Input and outputs of the engine, with the sizes that the file may leave open."""
    image_shape = (None, *reference.images.shape[1:])
    image = TensorIO(name=converted.input_name, shape=image_shape, dtype=_name(converted.images.dtype))
    outputs = {}
    for name, spec in converted.outputs.items():
        shape = (None, *reference.outputs[name].shape[1:])
        outputs[name] = TensorIO(
            name=converted.output_names[name],
            shape=shape,
            dtype=_name(spec.dtype),
            num_prefix_tokens=spec.num_prefix_tokens,
        )
    return image, outputs


def _name(dtype: torch.dtype) -> Literal["float32", "float16"]:
    return "float16" if dtype == torch.float16 else "float32"
