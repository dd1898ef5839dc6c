"""From an ONNX file to a TensorRT engine that has been checked: convert, compare, build once, keep the manifest."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from kd_pipeline._core.atomic_write import locked
from kd_pipeline.data.sources.labels import class_names
from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.edit import edit_onnx
from kd_pipeline.onnx.file import OnnxFile, read_onnx
from kd_pipeline.onnx.half_precision import CONVERTER_VERSION, convert_precision, emulate_precision
from kd_pipeline.onnx.quantize import quantize_onnx
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.tensorrt.builder_process import CompileJob, run_compiler
from kd_pipeline.teachers.tensorrt.cache import cache_folder, folder_beside
from kd_pipeline.teachers.tensorrt.load import capability_of, complete_parity
from kd_pipeline.teachers.tensorrt.manifest import (
    Manifest,
    Parity,
    Recipe,
    TensorIO,
    differences,
    manifest_path,
    read_engine,
    write_manifest,
)
from kd_pipeline.teachers.tensorrt.package import TensorRT, open_tensorrt
from kd_pipeline.teachers.tensorrt.parity import (
    Exam,
    Samples,
    compare,
    exam_path,
    generated_samples,
    load_exam,
    set_exam,
)
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["build_engine"]

_SUFFIXES = (".engine", ".plan", ".trt")
_LARGEST_ONNX_BATCH = 64
"""The converted file is compared on a CPU in batches up to this size; the engine itself in those of its profiles."""


def build_engine(
    settings: BuildSettings,
    *,
    save_engine: Path | None = None,
    samples: Callable[[], Samples] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Build the engine that `settings` describe, unless it is there already, and return where it lies.

    The answers of the converted file are compared with the float32 file's before TensorRT sees it, and on a machine
    that can run the engine its own answers too. Whoever asks for an engine that another process builds waits for it.

    Args:
        settings: which engine.
        save_engine: where it goes; a file in `cache_folder()` named after everything that goes into it unless given.
        samples: gives the images for the comparison and for the ranges of int8 and fp8; called when they are needed.
            Without it the images are generated, which is refused for int8 and fp8.
        report: hears what goes on, a line at a time.

    Raises:
        EngineError: the file makes no engine, its answers are too far off, TensorRT cannot build it, or something
            cannot be read or written.
        TeacherError: the file is no teacher.
        MissingPackageError: TensorRT, or what the conversion needs, is not installed.
    """
    try:
        file, tensorrt = read_onnx(settings.onnx), open_tensorrt(settings.runtime)
        image_shape = _image_shape(settings, file)
        samples = _samples(settings, image_shape, samples)
        recipe = _recipe(settings, file, image_shape, samples, tensorrt)
        name = f"{file.path.stem}-{settings.precision}-{recipe.key[:16]}.engine"
        engine = cache_folder() / name if save_engine is None else save_engine.absolute()
        _check_places(settings, engine)
        with locked(engine, lambda: report(f"waiting for another process that builds {engine}")):
            if not _is_there(engine, recipe, report):
                with folder_beside(engine) as folder:
                    _Build(settings, file, recipe, samples, tensorrt, report).run(folder, engine)
    except OSError as error:
        raise EngineError(
            f"{error.filename or save_engine or 'the engine'} cannot be read or written: {error.strerror}; correct "
            "that, or give another place with save_engine (--save-engine)"
        ) from error
    return engine


@dataclass(frozen=True)
class _Build:
    """One engine in the making."""

    settings: BuildSettings
    file: OnnxFile
    recipe: Recipe
    samples: Callable[[], Samples]
    tensorrt: TensorRT
    report: Callable[[str], None]

    def run(self, folder: Path, engine: Path) -> None:
        """Make the engine and what belongs to it in `folder`, and move all of it to where `engine` says."""
        made = folder / engine.name
        edited = self._edit(folder)
        converted, acted, kept = self._convert(edited, folder)
        exam, figures, batch_sizes = self._compare(edited, acted)
        content = exam.to_bytes()
        exam_path(made).write_bytes(content)
        started = time.perf_counter()
        self._compile(converted, made)
        build_s = time.perf_counter() - started
        image, outputs = _tensors(read_onnx(converted), exam)
        manifest = Manifest(
            **self.recipe.model_dump(),
            engine_sha256=hashlib.sha256(made.read_bytes()).hexdigest(),
            engine_bytes=made.stat().st_size,
            image=image,
            outputs=outputs,
            kept_float32=kept,
            parity=Parity(
                measured_on="onnx",
                images=exam.source,
                num_images=len(exam.images),
                batch_sizes=batch_sizes,
                **figures,
                tensors_sha256=hashlib.sha256(content).hexdigest(),
            ),
            onnx=str(self.file.path),
            command=self.settings.command(engine, calibrate=self.samples().config),
            build_s=round(build_s, 3),
        )
        write_manifest(made, manifest)
        if torch.cuda.is_available():
            self.report("comparing the engine with the float32 file")
            complete_parity(made, torch.device("cuda", torch.cuda.current_device()), report=self.report)
        if read_onnx(self.file.path).sha256 != self.file.sha256:
            raise EngineError(f"{self.file.path} was changed during the build; build again when it stays as it is")
        # The engine last: what lies there is whole, or does not fit its manifest and is built again.
        for path in (exam_path(made), manifest_path(made), made):
            os.replace(path, engine.parent / path.name)

    def _edit(self, folder: Path) -> Path:
        """The float32 file with adapter, outputs and classes as asked for; the file itself where nothing is."""
        settings = self.settings
        if self.file.precision != "fp32":
            raise EngineError(
                f"{self.file.path} holds {self.file.precision} weights; give the float32 file, from which the build "
                "makes every precision and against which it compares"
            )
        OnnxRuntimeTeacher(self.file.path).close()  # weights cut short, or what it does not know: told before any work
        if settings.input_adapter is None and not settings.outputs and settings.classes is None:
            return self.file.path
        return edit_onnx(
            self.file.path,
            folder / "edited.onnx",
            input_adapter=settings.input_adapter,
            outputs=settings.outputs,
            classes=self.recipe.classes,
        )

    def _convert(self, edited: Path, folder: Path) -> tuple[Path, Path, tuple[str, ...]]:
        """The file for TensorRT, one that ONNX Runtime can act it out with, and the nodes that stayed in float32."""
        precision, converted = self.settings.precision, folder / "converted.onnx"
        match precision:
            case "fp32":
                return edited, edited, ()
            case "fp16" | "bf16":
                self.report(f"converting to {precision}")
                images = self.samples().images
                kept = convert_precision(edited, converted, precision, images, half_io=self.settings.half_io)
                return converted, emulate_precision(converted, folder / "acted.onnx"), kept
            case "int8" | "fp8":
                self.report(f"finding the ranges for {precision}")
                quantize_onnx(edited, converted, precision, self.samples().images)
                return converted, converted, ()

    def _compare(self, edited: Path, acted: Path) -> tuple[Exam, dict[str, float], tuple[int, ...]]:
        """Hold the converted file against the float32 one, both in ONNX Runtime."""
        samples = self.samples()
        self.report(f"comparing {self.settings.precision} with float32 on {len(samples.images)} images")
        dtype = torch.float16 if self.settings.half_io else torch.float32
        sizes = {min(size, _LARGEST_ONNX_BATCH) for each in self.recipe.profiles for size in (1, each.opt, each.max)}
        reference = OnnxRuntimeTeacher(edited)
        exam = set_exam(reference, samples)
        reference.close()
        # ONNX Runtime's optimizer would take roundings out.
        teacher = OnnxRuntimeTeacher(acted, as_written=self.settings.precision != "fp32")
        batch_sizes = tuple(sorted(sizes))
        figures = compare(
            exam, lambda images: teacher(images.to(dtype)), batch_sizes=batch_sizes, precision=self.settings.precision
        )
        teacher.close()
        return exam, figures, batch_sizes

    def _compile(self, converted: Path, engine: Path) -> None:
        settings = self.settings
        job = CompileJob(
            onnx=converted,
            engine=engine,
            input_name=self.file.input_name,
            image_shape=self.recipe.image_shape,
            batch_sizes=tuple((each.min, each.opt, each.max) for each in settings.profiles),
            runtime=self.tensorrt.runtime,
            tf32=settings.precision != "fp32",
            workspace=settings.workspace,
            builder_optimization_level=settings.builder_optimization_level,
            timing_cache=settings.timing_cache and settings.timing_cache.absolute(),
            version_compatible=settings.version_compatible,
            hardware_compatible=settings.hardware_compatible,
            compute_capability=settings.compute_capability,
        )
        self.report(f"building with {self.tensorrt.runtime} {self.tensorrt.version}")
        run_compiler(job, engine.parent, self.report)


def _samples(
    settings: BuildSettings, image_shape: tuple[int, int, int], samples: Callable[[], Samples] | None
) -> Callable[[], Samples]:
    """What gives the images, and gives the same ones the second time without work."""
    if samples is None and settings.precision in ("int8", "fp8"):
        raise EngineError(
            f"{settings.precision} takes its ranges from real images, and there are none; pass samples (--calibrate "
            "with a config), or take fp16 or bf16"
        )
    return cache(lambda: generated_samples(image_shape) if samples is None else _fitting(samples(), image_shape))


def _fitting(samples: Samples, image_shape: tuple[int, int, int]) -> Samples:
    found = tuple(samples.images.shape[1:])
    if found != image_shape:
        raise EngineError(
            f"the engine takes images {list(image_shape)}, and {samples.source} gives {list(found)}; set the size of "
            "its transform, or export the teacher for that size"
        )
    return samples


def _check_places(settings: BuildSettings, engine: Path) -> None:
    """Refuse names that would replace something else than an engine, and make the folders that are missing."""
    if engine.is_dir():
        raise EngineError(f"the engine would go to {engine}, which is a folder; name a file in it")
    if engine.suffix not in _SUFFIXES:
        raise EngineError(f"the engine would go to {engine}; call it {engine.stem}.engine")
    if settings.timing_cache is not None:
        if settings.timing_cache.is_dir():
            raise EngineError(f"timing_cache: {settings.timing_cache} is a folder; name a file in it")
        settings.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    engine.parent.mkdir(parents=True, exist_ok=True)


def _image_shape(settings: BuildSettings, file: OnnxFile) -> tuple[int, int, int]:
    # Behind a resize it does not matter what the file takes.
    is_resized = settings.input_adapter is not None and settings.input_adapter.size is not None
    height, width = (None, None) if is_resized else file.images.shape[2:]
    size = settings.image_size
    if size is None and (height is None or width is None):
        raise EngineError(
            f"{file.path} takes images of any size{' behind its resize' if is_resized else ''}, and an engine takes "
            "one; say which with image_size (--image-size)"
        )
    if size is not None and (height not in (None, size) or width not in (None, size)):
        raise EngineError(
            f"{file.path} takes images of {height} x {width}, wanted are {size} x {size}; give it images of its own "
            "size, or fold a resize into it with an input adapter"
        )
    return 3, size or height or 0, size or width or 0


def _recipe(
    settings: BuildSettings,
    file: OnnxFile,
    image_shape: tuple[int, int, int],
    samples: Callable[[], Samples],
    tensorrt: TensorRT,
) -> Recipe:
    adapter, is_calibrated = settings.input_adapter, settings.precision in ("int8", "fp8")
    gpu, compute_capability = _hardware(settings, tensorrt)
    return Recipe(
        onnx_sha256=file.sha256,
        input_adapter=None if adapter is None else adapter.model_dump(mode="json"),
        extra_outputs=settings.outputs,
        classes=file.classes if settings.classes is None else class_names(settings.classes),
        precision=settings.precision,
        half_io=settings.half_io,
        calibration_sha256=_digest(samples().images) if is_calibrated else None,
        converter=CONVERTER_VERSION,
        image_shape=image_shape,
        profiles=settings.profiles,
        runtime=tensorrt.runtime,
        runtime_version=tensorrt.version,
        gpu=gpu,
        compute_capability=compute_capability,
        workspace=settings.workspace,
        builder_optimization_level=settings.builder_optimization_level,
        version_compatible=settings.version_compatible,
        hardware_compatible=settings.hardware_compatible,
        plugins=(),
    )


def _hardware(settings: BuildSettings, tensorrt: TensorRT) -> tuple[str, tuple[str, ...]]:
    """Name and compute capability of the GPUs that the engine is for."""
    if tensorrt.runtime == "tensorrt_rtx":
        if settings.hardware_compatible:
            raise EngineError("tensorrt_rtx does not know --hardware-compatible; name GPUs with --compute-capability")
        return "any", settings.compute_capability or ("any",)
    if settings.compute_capability:
        raise EngineError("tensorrt builds for the GPU it runs on; --compute-capability is for --runtime tensorrt_rtx")
    if not torch.cuda.is_available():
        raise EngineError(
            "tensorrt builds on the GPU that the engine is for, and torch sees none here; build there, or take "
            "--runtime tensorrt_rtx, whose builder needs no GPU"
        )
    if settings.hardware_compatible:
        return "any", ("8.0+",)
    return torch.cuda.get_device_name(), (capability_of(torch.device("cuda", torch.cuda.current_device())),)


def _is_there(engine: Path, recipe: Recipe, report: Callable[[str], None]) -> bool:
    """Whether `engine` is what `recipe` makes, whole and ours; says why where it is not."""
    if not engine.exists():
        return False
    try:
        manifest = read_engine(engine).manifest
        assert manifest is not None  # as it is not vouched for
        load_exam(engine, manifest.parity)
    except EngineError as error:
        report(f"building again, because {error}")
        return False
    wanted = recipe.model_dump(mode="json")
    if changed := differences(manifest, wanted):
        report(f"building again, because {engine} is another one: {'; '.join(changed)}")
        return False
    report(f"{engine} is there already")
    return True


def _tensors(converted: OnnxFile, exam: Exam) -> tuple[TensorIO, dict[str, TensorIO]]:
    """Input and outputs as the engine will have them, with the sizes that the file may leave open."""
    image_shape = (None, *exam.images.shape[1:])
    image = TensorIO(name=converted.input_name, shape=image_shape, dtype=_name(converted.images.dtype))
    outputs = {}
    for name, spec in converted.outputs.items():
        shape = (None, *exam.answers[name].shape[1:])
        outputs[name] = TensorIO(name=converted.output_names[name], shape=shape, dtype=_name(spec.dtype))
    return image, outputs


def _name(dtype: torch.dtype) -> Literal["float32", "float16"]:
    return "float16" if dtype == torch.float16 else "float32"


def _digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
