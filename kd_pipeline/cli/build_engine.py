"""`kd-pipeline build-engine`, also available as `tools/build_engine.py`."""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_options, checked, given, path_option, print_progress
from kd_pipeline.cli.model_options import (
    NAMES,
    add_input_adapter,
    add_names,
    add_weights,
    given_names,
    input_adapter,
    model_plugins,
    named_model,
    refuse_weights,
)
from kd_pipeline.cli.printing import print_result
from kd_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from kd_pipeline.teachers.parity import CalibrationSet
    from kd_pipeline.teachers.tensorrt.manifest import EngineManifest, Profile
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["add_to"]

_EXPORT_BATCH = 8
"""Largest batch that the export is tested with; the build tests larger ones."""
_TRTEXEC = {
    "builder_optimization_level": ("--builder-optimization-level", "--builderOptimizationLevel"),
    "timing_cache": ("--timing-cache", "--timingCacheFile"),
    "version_compatible": ("--version-compatible", "--versionCompatible"),
}
"""Options that trtexec spells differently."""
_EXAMPLES = """\
examples:
  kd-pipeline build-engine --onnx teacher.onnx --precision fp16
  kd-pipeline build-engine --timm vit_base_patch16_224 --pretrained --precision bf16 --batch 1 128 128
  kd-pipeline build-engine --onnx teacher.onnx --precision int8 --calibrate configs/cats.yaml
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "build-engine",
        parents=[common],
        help="build a TensorRT engine from an ONNX file or a model by name, and check it against float32",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings

    model = parser.add_argument_group("the model, one of")
    model.add_argument("--onnx", type=path_option, metavar="FILE", help="a float32 teacher with a dynamic batch size")
    add_names(model)
    add_weights(parser.add_argument_group("a model by name"))

    shapes = parser.add_argument_group("batches and images")
    shapes.add_argument(
        "--batch",
        type=int,
        nargs=3,
        action="append",
        metavar=("MIN", "OPT", "MAX"),
        help="batch sizes, repeated for several profiles (default: 1 32 64)",
    )
    for name in ("min", "opt", "max"):
        shapes.add_argument(f"--{name}-shapes", f"--{name}Shapes", metavar="NAME:NxCxHxW", help="as in trtexec")
    add_options(shapes, BuildSettings, "image_size")
    add_input_adapter(shapes)

    numbers = parser.add_argument_group("numbers")
    add_options(numbers, BuildSettings, "precision", "half_io", "outputs", "classes")
    numbers.add_argument(
        "--calibrate",
        type=path_option,
        metavar="CONFIG",
        help="calibrate and compare on training images of this config",
    )
    numbers.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="module with the source of these images"
    )

    engine = parser.add_argument_group("the engine")
    engine.add_argument("--save-engine", "--saveEngine", type=path_option, metavar="FILE", help="the file to write")
    add_options(engine, BuildSettings, "runtime", "workspace", *_TRTEXEC, flags=_TRTEXEC)
    add_options(engine, BuildSettings, "hardware_compatible", "compute_capability")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.teachers.tensorrt.build import build_engine
    from kd_pipeline.teachers.tensorrt.manifest import read_manifest
    from kd_pipeline.teachers.tensorrt.output import check_paths
    from kd_pipeline.teachers.tensorrt.package import open_tensorrt

    # Check every option before the export, which can take minutes.
    settings, calibration_set = _settings(parsed), _calibration_set(parsed)
    engine = parsed.save_engine or settings.onnx.parent / f"{settings.onnx.stem}.{settings.precision}.engine"
    if parsed.onnx is None:
        open_tensorrt(settings.runtime)
        check_paths(engine.absolute(), settings.timing_cache)
        _export(parsed, settings)
    built = build_engine(settings, save_engine=engine, calibration_set=calibration_set, report=print_progress)
    for name, value in _table(built, read_manifest(built)):
        print_result(printable(f"{name:<11}{value}"))
    return 0


def _settings(parsed: argparse.Namespace) -> "BuildSettings":
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings

    values = given(parsed, BuildSettings) | {"onnx": _onnx(parsed), "input_adapter": input_adapter(parsed)}
    if parsed.classes is not None and parsed.onnx is None and named_model(parsed).is_headless:
        raise ConfigError("--classes names the logits, which --num-classes 0 leaves out; leave one of them out")
    profiles, size = _profiles(parsed)
    if profiles:
        values["profiles"] = profiles
    if size is not None:
        values["image_size"] = size
    return checked(BuildSettings, **values)


def _onnx(parsed: argparse.Namespace) -> Path:
    """The ONNX file that was given, or the one to export the model to."""
    found = given_names(parsed, "onnx")
    if len(found) != 1:
        found_names = " and ".join(f"--{name}" for name in found) or "none of them"
        raise ConfigError(f"give one of {', '.join(f'--{name}' for name in ('onnx', *NAMES))}, got {found_names}")
    onnx: Path | None = parsed.onnx
    if onnx is None:
        stem = re.sub(r"[^\w.-]+", "_", getattr(parsed, found[0]))
        engine: Path = parsed.save_engine or Path(f"{stem}.engine")
        return engine.parent / f"{engine.stem}.onnx"
    refuse_weights(parsed, onnx)
    return onnx


def _export(parsed: argparse.Namespace, settings: "BuildSettings") -> None:
    """Export the model that was named to `settings.onnx`; an existing file is kept, and must be that model."""
    from kd_pipeline._core.progress import timed
    from kd_pipeline.onnx.export import export_onnx
    from kd_pipeline.onnx.file import read_onnx
    from kd_pipeline.workflows._export import network_by_name

    onnx, adapter = settings.onnx, settings.input_adapter
    network = network_by_name(
        named_model(parsed),
        size=(adapter and adapter.size) or settings.image_size,
        input_adapter=adapter,
        plugins=model_plugins(parsed),
        report=print_progress,
    )
    shape = network.image_shape
    print_progress(f"exporting {network.name} for images of {shape[1]} x {shape[2]} to {onnx}")
    with timed("export to ONNX") as report:
        if not onnx.exists():
            export_onnx(network.module, onnx, image_shape=shape, max_batch=_EXPORT_BATCH, report=report)
            return
        with tempfile.TemporaryDirectory(prefix=".export-", dir=onnx.parent) as folder:
            path = Path(folder, onnx.name)
            made = export_onnx(network.module, path, image_shape=shape, max_batch=_EXPORT_BATCH, report=report)
            if read_onnx(made).sha256 != read_onnx(onnx).sha256:
                raise ConfigError(
                    f"{onnx} already exists and is not the export of {network.name}; remove it, or give a different "
                    "name with --save-engine"
                )


def _profiles(parsed: argparse.Namespace) -> "tuple[tuple[Profile, ...], tuple[int, int] | None]":
    """The optimization profiles, and the image size if `--min-shapes` and the like give it."""
    from kd_pipeline.teachers.tensorrt.manifest import Profile

    shapes = [parsed.min_shapes, parsed.opt_shapes, parsed.max_shapes]
    if shapes == [None, None, None]:
        options = dict.fromkeys(("min", "opt", "max"), "batch")
        return tuple(
            checked(Profile, options, min=low, opt=opt, max=high) for low, opt, high in parsed.batch or ()
        ), None
    if None in shapes or parsed.batch:
        raise ConfigError("give --min-shapes, --opt-shapes and --max-shapes together, or --batch MIN OPT MAX alone")
    sizes = [_shape(text, parsed.onnx) for text in shapes]
    images = {size[1:] for size in sizes}
    if len(images) != 1 or any(size[1] != 3 for size in sizes):
        raise ConfigError(f"only the batch may vary, over images of 3 channels, got {' '.join(shapes)}")
    options = {name: f"{name}-shapes" for name in ("min", "opt", "max")}
    profile = checked(Profile, options, **dict(zip(options, (size[0] for size in sizes), strict=True)))
    return (profile,), sizes[0][2:]


def _shape(text: str, onnx: Path | None) -> tuple[int, int, int, int]:
    from kd_pipeline.onnx.file import read_onnx

    match = re.fullmatch(r"(.+):(\d+)x(\d+)x(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"a shape is NAME:NxCxHxW, such as images:1x3x224x224, got {text}")
    name = "images" if onnx is None else read_onnx(onnx).input_name
    if match[1] != name:
        raise ConfigError(
            f"the input of {onnx or 'an exported model'} is called {name!r}, and the shape {text} is for {match[1]!r}"
        )
    batch, channels, height, width = map(int, match.groups()[1:])
    return batch, channels, height, width


def _calibration_set(parsed: argparse.Namespace) -> "Callable[[], CalibrationSet] | None":
    """Reads the images of `--calibrate`; None without it."""
    if parsed.calibrate is None:
        if parsed.precision in ("int8", "fp8"):
            raise ConfigError(f"{parsed.precision} takes its ranges from real images; give --calibrate CONFIG")
        return None
    from kd_pipeline._core.constants import IMAGES
    from kd_pipeline.config.config import load_config
    from kd_pipeline.loader.config_teacher import sample_images
    from kd_pipeline.teachers.parity import CalibrationSet
    from kd_pipeline.teachers.settings import views_of

    path: Path = parsed.calibrate
    config = load_config(path)
    view = IMAGES if config.teacher is None else views_of(config.teacher)[0]
    return lambda: CalibrationSet(
        sample_images(config, plugins=parsed.plugin, view=view), f"the training split of {path}", config=path
    )


def _table(engine: Path, manifest: "EngineManifest") -> list[tuple[str, str]]:
    parity = manifest.parity
    gpus = "any supported GPU" if manifest.gpu == "any" else manifest.gpu
    capabilities = "" if manifest.compute_capability == ("any",) else f" ({', '.join(manifest.compute_capability)})"
    batches = ", ".join(f"{each.min} to {each.max} (best at {each.opt})" for each in manifest.profiles)
    kept = f", {len(manifest.kept_float32)} nodes in fp32" if manifest.kept_float32 else ""
    rows = [
        ("engine", str(engine)),
        ("size", f"{manifest.engine_bytes / 1e6:.1f} MB, built in {manifest.build_s:.1f} s"),
        ("runtime", f"{manifest.runtime} {manifest.runtime_version}, for {gpus}{capabilities}"),
        ("precision", f"{manifest.precision}{kept}"),
        ("images", f"{manifest.image}, {batches} at a time"),
        *(("output", f"{name} {output}") for name, output in manifest.outputs.items()),
        ("parity", f"to float32 on {parity.num_images} images ({parity.images})"),
        *(("", f"{name}: {metrics}") for name, metrics in parity.outputs.items()),
    ]
    if parity.measured_on == "onnx":
        rows.append(("", "measured on the converted ONNX file; the engine is checked when a GPU first opens it"))
    return rows
