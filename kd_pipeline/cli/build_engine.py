"""`kd-pipeline build-engine`, which `tools/build_engine.py` is too."""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_pipeline.cli.arguments import checked, tell
from kd_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from kd_pipeline.models.input_adapter import InputAdapter
    from kd_pipeline.teachers.tensorrt.manifest import Manifest, Profile
    from kd_pipeline.teachers.tensorrt.parity import Samples
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings

__all__ = ["add_to"]

_DEFAULT_SIZE = 224
_EXPORT_BATCH = 8
"""Largest batch that the export is tried on; the build tries larger ones."""
_MODELS = ("timm", "torchvision", "factory")
_EXAMPLES = """\
examples:
  kd-pipeline build-engine --onnx teacher.onnx --precision fp16
  kd-pipeline build-engine --timm vit_base_patch16_224 --pretrained --precision bf16 --batch 1 128 128
  kd-pipeline build-engine --onnx teacher.onnx --precision int8 --calibrate configs/cats.yaml
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "build-engine",
        parents=[common],
        help="a TensorRT engine from an ONNX file or a model by name, checked against float32",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("the model, one of")
    model.add_argument("--onnx", type=Path, metavar="FILE", help="a float32 classifier with a dynamic batch")
    model.add_argument("--timm", metavar="NAME", help="a model of timm's")
    model.add_argument("--torchvision", metavar="NAME", help="a model of torchvision's")
    model.add_argument("--factory", metavar="MODULE:FUNCTION", help="a function of your own that returns the model")

    named = parser.add_argument_group("a model by name")
    named.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights, as torch.save or safetensors wrote them"
    )
    named.add_argument("--pretrained", action="store_true", help="weights that timm or torchvision downloads")
    named.add_argument("--num-classes", type=int, metavar="K")

    shapes = parser.add_argument_group("batches and images")
    shapes.add_argument(
        "--batch",
        type=int,
        nargs=3,
        action="append",
        metavar=("MIN", "OPT", "MAX"),
        help="batch sizes to serve, 1 32 64 unless given; more than once for several profiles",
    )
    for name in ("min", "opt", "max"):
        shapes.add_argument(f"--{name}-shapes", f"--{name}Shapes", metavar="NAME:NxCxHxW", help="as trtexec spells it")
    shapes.add_argument(
        "--image-size", type=int, metavar="SIZE", help="height and width, where the model leaves it open"
    )
    shapes.add_argument("--input-mean", type=float, nargs=3, metavar="M", help="what the model was trained with")
    shapes.add_argument("--input-std", type=float, nargs=3, metavar="S", help="likewise")
    shapes.add_argument("--input-size", type=int, metavar="SIZE", help="resize to this inside the engine")
    shapes.add_argument("--from-mean", type=float, nargs=3, metavar="M", help="what the loader uses; ImageNet's")
    shapes.add_argument("--from-std", type=float, nargs=3, metavar="S", help="likewise")

    numbers = parser.add_argument_group("numbers")
    numbers.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8", "fp8"), default="fp32")
    numbers.add_argument("--half-io", action="store_true", help="take float16 images")
    numbers.add_argument("--outputs", nargs="+", default=[], metavar="NAME", help="tensors inside that become outputs")
    numbers.add_argument("--classes", type=Path, metavar="FILE", help="JSON list of class names in logit order")
    numbers.add_argument(
        "--calibrate", type=Path, metavar="CONFIG", help="take the images for ranges and comparison from this config"
    )

    engine = parser.add_argument_group("the engine")
    engine.add_argument("--save-engine", "--saveEngine", type=Path, metavar="FILE", help="where it goes")
    engine.add_argument("--runtime", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto")
    engine.add_argument("--workspace", type=int, metavar="MIB", help="most scratch memory of a layer")
    engine.add_argument("--builder-optimization-level", "--builderOptimizationLevel", type=int, metavar="0..5")
    engine.add_argument("--timing-cache", "--timingCacheFile", type=Path, metavar="FILE")
    engine.add_argument(
        "--version-compatible", "--versionCompatible", action="store_true", help="for later versions too"
    )
    engine.add_argument("--hardware-compatible", action="store_true", help="for every GPU from Ampere on")
    engine.add_argument(
        "--compute-capability", nargs="+", default=[], metavar="X.Y", help="GPUs to build for, with tensorrt_rtx"
    )
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.teachers.tensorrt.build import build_engine
    from kd_pipeline.teachers.tensorrt.manifest import read_manifest
    from kd_pipeline.teachers.tensorrt.package import open_tensorrt

    # All that was typed is checked before a model is exported, which can take minutes.
    settings, samples = _settings(parsed), _samples(parsed)
    if parsed.onnx is None:
        open_tensorrt(settings.runtime)
        _export(parsed, settings.onnx)
    engine = parsed.save_engine or settings.onnx.parent / f"{settings.onnx.stem}.{settings.precision}.engine"
    built = build_engine(settings, save_engine=engine, samples=samples, report=tell)
    for name, value in _table(built, read_manifest(built)):
        print(f"{name:<11}{value}")
    return 0


def _settings(parsed: argparse.Namespace) -> "BuildSettings":
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings

    onnx = _onnx(parsed)
    profiles, size = _profiles(parsed)
    return checked(
        BuildSettings,
        onnx=onnx,
        precision=parsed.precision,
        half_io=parsed.half_io,
        **({"profiles": profiles} if profiles else {}),
        image_size=size or parsed.image_size,
        outputs=tuple(parsed.outputs),
        input_adapter=_adapter(parsed),
        classes=parsed.classes,
        runtime=parsed.runtime,
        workspace=parsed.workspace,
        builder_optimization_level=parsed.builder_optimization_level,
        timing_cache=parsed.timing_cache,
        version_compatible=parsed.version_compatible,
        hardware_compatible=parsed.hardware_compatible,
        compute_capability=tuple(parsed.compute_capability),
    )


def _adapter(parsed: argparse.Namespace) -> "InputAdapter | None":
    from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
    from kd_pipeline.models.input_adapter import InputAdapter

    mean, std, size = parsed.input_mean, parsed.input_std, parsed.input_size
    if mean is None and std is None and size is None:
        if parsed.from_mean or parsed.from_std:
            raise ConfigError("--from-mean and --from-std say what --input-mean and --input-std start from; give those")
        return None
    if (mean is None) != (std is None):
        raise ConfigError("--input-mean and --input-std belong together; give both, three numbers each")
    from_mean, from_std = parsed.from_mean or IMAGENET_MEAN, parsed.from_std or IMAGENET_STD
    options = {name: f"input-{name}" for name in ("mean", "std", "size")}
    values = {"mean": mean or from_mean, "std": std or from_std, "size": size}
    return checked(InputAdapter, options, **values, from_mean=from_mean, from_std=from_std)


def _onnx(parsed: argparse.Namespace) -> Path:
    """The ONNX file: the one that was named, or where the model that was named will be exported."""
    names = ("onnx", *_MODELS)
    given = [name for name in names if getattr(parsed, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ConfigError(f"give one of {', '.join(f'--{name}' for name in names)}, got {found}")
    onnx: Path | None = parsed.onnx
    if onnx is None:
        stem = re.sub(r"[^\w.-]+", "_", getattr(parsed, given[0]))
        engine: Path = parsed.save_engine or Path(f"{stem}.engine")
        return engine.parent / f"{engine.stem}.onnx"
    for name in ("checkpoint", "pretrained", "num_classes"):
        if getattr(parsed, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for a model by name; the weights of {onnx} are in it")
    return onnx


def _export(parsed: argparse.Namespace, onnx: Path) -> None:
    """Export the model that was named to `onnx`; what lies there already is kept, and must be that model."""
    import torch

    from kd_pipeline.models.registry import ModelSettings, default_input, open_model
    from kd_pipeline.onnx.export import export_onnx
    from kd_pipeline.onnx.file import read_onnx

    names = {name: getattr(parsed, name) for name in _MODELS}
    (name,) = (name for name in names.values() if name is not None)
    settings = checked(
        ModelSettings,
        **names,
        num_classes=parsed.num_classes,
        pretrained=parsed.pretrained,
        checkpoint=parsed.checkpoint,
    )
    torch.manual_seed(0)  # the same random weights at every call
    # Who types the factory's name allows it to run.
    module = open_model(settings, plugins=[str(parsed.factory).partition(":")[0]])
    if parsed.factory is None and not (parsed.pretrained or parsed.checkpoint):
        tell(f"{name} has random weights; give --pretrained or --checkpoint for trained ones")
    expected = default_input(module)
    size = parsed.input_size or parsed.image_size or (expected.size[0] if expected else _DEFAULT_SIZE)
    if expected is not None and parsed.input_mean is None and not _is_imagenet(expected.mean, expected.std):
        tell(
            f"timm says that {name} was trained with --input-mean {' '.join(map(str, expected.mean))} "
            f"--input-std {' '.join(map(str, expected.std))}; give both if your images are normalized otherwise"
        )
    tell(f"exporting {name} for images of {size} x {size} to {onnx}")
    if not onnx.exists():
        export_onnx(module, onnx, image_shape=(3, size, size), max_batch=_EXPORT_BATCH)
        return
    with tempfile.TemporaryDirectory(prefix=".export-", dir=onnx.parent) as folder:
        made = export_onnx(module, Path(folder, onnx.name), image_shape=(3, size, size), max_batch=_EXPORT_BATCH)
        if read_onnx(made).sha256 != read_onnx(onnx).sha256:
            raise ConfigError(
                f"{onnx} is there already and is not what {name} becomes; remove it, or give another name with "
                "--save-engine"
            )


def _is_imagenet(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD

    return (mean, std) == (IMAGENET_MEAN, IMAGENET_STD)


def _profiles(parsed: argparse.Namespace) -> "tuple[tuple[Profile, ...], int | None]":
    """The profiles asked for, and the size of the images where the shapes say it."""
    from kd_pipeline.teachers.tensorrt.manifest import Profile

    shapes = [parsed.min_shapes, parsed.opt_shapes, parsed.max_shapes]
    if shapes == [None, None, None]:
        batches = parsed.batch or []
        options = dict.fromkeys(("min", "opt", "max"), "batch")
        return tuple(checked(Profile, options, min=low, opt=opt, max=high) for low, opt, high in batches), None
    if None in shapes or parsed.batch:
        raise ConfigError("give --min-shapes, --opt-shapes and --max-shapes together, or --batch MIN OPT MAX alone")
    sizes = [_shape(text, parsed.onnx) for text in shapes]
    images = {size[1:] for size in sizes}
    if len(images) != 1 or any(size[1] != 3 or size[2] != size[3] for size in sizes):
        raise ConfigError(f"only the batch may vary, over square images of 3 channels, got {' '.join(shapes)}")
    options = {name: f"{name}-shapes" for name in ("min", "opt", "max")}
    profile = checked(Profile, options, **dict(zip(options, (size[0] for size in sizes), strict=True)))
    return (profile,), sizes[0][2]


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


def _samples(parsed: argparse.Namespace) -> "Callable[[], Samples] | None":
    """The images of --calibrate, read when they are needed."""
    if parsed.calibrate is None:
        if parsed.precision in ("int8", "fp8"):
            raise ConfigError(f"{parsed.precision} takes its ranges from real images; give --calibrate CONFIG")
        return None
    from kd_pipeline.config.config import load_config
    from kd_pipeline.loader.loader import sample_images
    from kd_pipeline.teachers.tensorrt.parity import Samples

    path: Path = parsed.calibrate
    config = load_config(path)
    return lambda: Samples(sample_images(config), f"the training split of {path}", config=path)


def _table(engine: Path, manifest: "Manifest") -> list[tuple[str, str]]:
    parity = manifest.parity
    gpus = "any GPU that it supports" if manifest.gpu == "any" else manifest.gpu
    capabilities = "" if manifest.compute_capability == ("any",) else f" ({', '.join(manifest.compute_capability)})"
    batches = ", ".join(f"{each.min} to {each.max} (best at {each.opt})" for each in manifest.profiles)
    kept = f", {len(manifest.kept_float32)} nodes of it in fp32" if manifest.kept_float32 else ""
    rows = [
        ("engine", str(engine)),
        ("size", f"{manifest.engine_bytes / 1e6:.1f} MB, built in {manifest.build_s:.1f} s"),
        ("runtime", f"{manifest.runtime} {manifest.runtime_version}, for {gpus}{capabilities}"),
        ("precision", f"{manifest.precision}{kept}"),
        ("images", f"{manifest.image}, {batches} at a time"),
        *(("output", f"{name} {output}") for name, output in manifest.outputs.items()),
        (
            "parity",
            f"to float32: cosine {parity.cosine:.6f}, top-1 agreement {parity.top1_agreement:.1%}, KL {parity.kl:.2g}, "
            f"on {parity.num_images} images ({parity.images})",
        ),
    ]
    if parity.measured_on == "onnx":
        rows.append(("", "measured on the converted ONNX file; the engine is compared when a GPU first opens it"))
    return rows
