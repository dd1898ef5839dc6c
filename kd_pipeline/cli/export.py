"""`kd-pipeline export`."""

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_permissions, path_option, print_progress, size_option
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
    from kd_pipeline._core.tensor_spec import TensorSpec
    from kd_pipeline.workflows._export import ExportReport, Network

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline export --timm resnet50 --checkpoint teacher.pt -o teacher.onnx
  kd-pipeline export --timm vit_small_patch16_dinov3 --pretrained --num-classes 0     (features, without a head)
  kd-pipeline export runs/mine -o student.onnx --precision fp16
  kd-pipeline export -c my.yaml --part teacher -o teacher.onnx
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "export",
        parents=[common],
        help="export a network by name, the student of a run, or a config's teacher or student to ONNX, and check the "
        "file",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model, one of")
    model.add_argument("folder", nargs="?", type=path_option, metavar="RUN", help="folder of a finished run")
    model.add_argument("-c", "--config", type=path_option, metavar="FILE", help="a config with the model, see --part")
    add_names(model)
    add_weights(parser.add_argument_group("a model by name"))

    part = parser.add_argument_group("a model of a config")
    part.add_argument("--part", choices=("teacher", "student"), help="which one (default: teacher)")
    part.add_argument("--member", metavar="NAME", help="one of several teachers: its name, or number in an ensemble")
    part.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override of the config")
    add_permissions(parser, "factories")

    images = parser.add_argument_group("images")
    images.add_argument(
        "--image-size",
        "--size",
        type=size_option,
        metavar="N or HxW",
        help="height and width (default: that of the model's images)",
    )
    add_input_adapter(images)

    file = parser.add_argument_group("the file")
    file.add_argument("-o", "--out", type=path_option, metavar="FILE", help="the file to write (default: NAME.onnx)")
    file.add_argument("--force", action="store_true", help="replace an existing file")
    file.add_argument(
        "--features", nargs="+", type=_layer, default=[], metavar="LAYER", help="layers to return along with outputs"
    )
    file.add_argument("--classes", type=path_option, metavar="FILE", help="JSON list of class names in logit order")
    file.add_argument(
        "--precision", choices=("fp32", "fp16"), default="fp32", help="of weights and arithmetic (default: fp32)"
    )
    file.add_argument(
        "--calibrate",
        type=path_option,
        metavar="CONFIG",
        help="compare file and model on training images of this config (default: on generated ones)",
    )


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config
    from kd_pipeline.data.sources.labels import class_names
    from kd_pipeline.workflows._export import check_target, export_network

    started = time.monotonic()
    calibrate: Path | None = parsed.calibrate
    images = None if calibrate is None else load_config(calibrate)
    classes = None if parsed.classes is None else class_names(parsed.classes)
    _check_source(parsed)
    out = parsed.out or Path(re.sub(r"[^\w.-]+", "_", _stem(parsed)) + ".onnx")
    check_target(out, overwrite=parsed.force)
    network = _network(parsed).changed(features=parsed.features, classes=classes)
    _, height, width = network.image_shape
    print_progress(f"exporting {network.name} for images of {height} x {width} to {out}")
    found = export_network(
        network, out, precision=parsed.precision, images=images, overwrite=parsed.force, plugins=parsed.plugin
    )
    for name, value in _table(network, found, out):
        print_result(printable(f"{name:<9}{value}"))
    print_progress(f"written in {time.monotonic() - started:.1f} s")
    return 0


def _network(parsed: argparse.Namespace) -> "Network":
    """The network that the command line names."""
    from kd_pipeline.config.config import load_config
    from kd_pipeline.workflows._export import network_by_name, network_of_config, network_of_run

    if parsed.config is not None:
        config = load_config(parsed.config, parsed.set)
        part: Literal["teacher", "student"] = parsed.part or "teacher"
        network = network_of_config(config, part, member=parsed.member, plugins=parsed.plugin)
        return network.changed(size=parsed.image_size, input_adapter=input_adapter(parsed))
    if parsed.folder is not None:
        network = network_of_run(parsed.folder, plugins=parsed.plugin)
        return network.changed(size=parsed.image_size, input_adapter=input_adapter(parsed))
    return network_by_name(
        named_model(parsed),
        size=parsed.image_size,
        input_adapter=input_adapter(parsed),
        plugins=[*parsed.plugin, *model_plugins(parsed)],
        report=print_progress,
    )


def _check_source(parsed: argparse.Namespace) -> None:
    """Check that the command line names one model, and no option of another kind.

    Raises:
        ConfigError: that is not so.
    """
    found = given_names(parsed, "folder", "config")
    if len(found) != 1:
        choices = f"the folder of a run, -c CONFIG, {', '.join(f'--{name}' for name in NAMES)}"
        advice = "; --features takes every word up to the next option, so write the folder before it"
        raise ConfigError(
            f"give one of {choices}, got {' and '.join(map(_option, found)) or 'none of them'}"
            f"{advice if parsed.features and not found else ''}"
        )
    if parsed.config is None:
        for name, value in (("part", parsed.part), ("member", parsed.member), ("set", parsed.set)):
            if value:
                raise ConfigError(f"--{name} is for a model of a config; give the config with -c")
    if found[0] in ("folder", "config"):
        refuse_weights(parsed, parsed.folder or parsed.config)


def _layer(text: str) -> str:
    if "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no layer")
    return text


def _option(name: str) -> str:
    return {"folder": "the folder of a run", "config": "-c"}.get(name, f"--{name}")


def _stem(parsed: argparse.Namespace) -> str:
    """The name of the file, without its suffix, if none is given."""
    if parsed.config is not None:
        return f"{parsed.config.stem}_{parsed.member or parsed.part or 'teacher'}"
    if parsed.folder is not None:
        return str(parsed.folder.absolute().name)
    return str(next(getattr(parsed, name) for name in given_names(parsed)))


def _table(network: "Network", found: "ExportReport", out: Path) -> list[tuple[str, str]]:
    file = found.file
    rows = [
        ("file", f"{out}, {found.num_bytes / 1e6:.1f} MB, opset {file.opset}"),
        ("model", f"{network.name}, {found.num_parameters:,} parameters in {file.precision}"),
        ("input", f"{file.input_name} {_shape(file.images)}"),
        *(("output", f"{name} {_shape(output)}") for name, output in file.outputs.items()),
        ("check", found.parity),
        ("use", f"teacher: {{onnx: {out}}}"),
    ]
    if file.precision == "fp32":
        rows.append(("", f"kd-pipeline build-engine --onnx {out} --precision bf16"))
    return rows


def _shape(spec: "TensorSpec") -> str:
    """With N for the batch, whose size is open."""
    return str(spec).replace("[any", "[N", 1)
