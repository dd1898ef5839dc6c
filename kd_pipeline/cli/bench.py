"""`kd-pipeline bench`."""

import argparse
from pathlib import Path
from typing import Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_options, checked, given, path_option, print_progress
from kd_pipeline.cli.printing import print_result
from kd_pipeline.errors import ConfigError

__all__ = ["add_to", "network_by_name"]

_NETWORKS = {"teacher": "resnet50", "student": "resnet18"}
"""Of `bench step`, by name."""

_STEP_EXAMPLES = """\
examples:
  kd-pipeline bench step -c mine.yaml
  kd-pipeline bench step --teacher resnet50 --student resnet18 --precision bf16
  kd-pipeline bench step --headless --teacher timm:vit_small_patch16_224 --student timm:resnet18
  kd-pipeline bench step --headless --teacher timm:vit_base_patch16_224 --student timm:resnet50 --num-steps 3

Each row runs in a process of its own, in turn. Let the machine do nothing else meanwhile.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("bench", help="measure your own configuration or teacher on this machine")
    subjects = parser.add_subparsers(title="subjects", required=True, metavar="SUBJECT")
    step = subjects.add_parser(
        "step",
        parents=[common],
        help="the whole distillation step, next to the usual PyTorch scripts",
        epilog=_STEP_EXAMPLES,
        add_options=_add_step_options,
    )
    step.set_defaults(run=_run_step)
    teacher = subjects.add_parser(
        "teacher",
        parents=[common],
        help="one teacher on every backend, in every precision, at several batch sizes",
        add_options=_add_teacher_options,
    )
    teacher.set_defaults(run=_run_teacher)


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.bench.step import BenchStepSettings

    parser.add_argument(
        "-c", "--config", type=path_option, metavar="FILE", help="take images, teacher and student from it"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the config")
    parser.add_argument("--teacher", metavar="NAME", help="a torchvision model, or timm:NAME (default: resnet50)")
    parser.add_argument("--student", metavar="NAME", help="a torchvision model, or timm:NAME (default: resnet18)")
    text = "of --teacher and --student, leave out the heads: the student learns features instead of logits"
    parser.add_argument("--headless", action="store_true", help=text)
    parser.add_argument("--size", type=int, metavar="N", help="height and width of the images (default: 224)")
    fields = ("root", "precision", "teacher_precision", "batch_size", "rows", "num_steps", "repeats", "num_threads")
    add_options(parser, BenchStepSettings, *fields, "device", flags={"batch_size": ["--batch"]})
    _add_out(parser, "runs/bench_step.json")


def _add_out(parser: argparse.ArgumentParser, path: str) -> None:
    text = "JSON file for the result, with a PNG next to it (default: %(default)s)"
    parser.add_argument("--out", type=path_option, default=Path(path), metavar="PATH", help=text)


def _run_step(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench.step import BenchStepSettings, bench_step, step_settings
    from kd_pipeline.config.config import load_config
    from kd_pipeline.data.transforms import TrainTransform

    if parsed.config is None and parsed.overrides:
        raise ConfigError(f"{parsed.overrides[0]} changes a config; give the config with -c")
    values = given(parsed, BenchStepSettings)
    values |= _networks(parsed)
    if parsed.size is not None:
        values["transform"] = checked(TrainTransform, size=parsed.size)
    settings = checked(BenchStepSettings, {"batch_size": "batch"}, **values)
    if parsed.config is not None:
        settings = step_settings(load_config(parsed.config, parsed.overrides), settings, values)
    print_result(bench_step(settings, report=print_progress).table())
    print_result(printable(f"all repeats: {parsed.out}; where the time goes: {parsed.out.with_suffix('.png')}"))
    return 0


def _networks(parsed: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The networks that options name, those of no config in any case if they have no head."""
    names = {name: text for name in _NETWORKS if (text := getattr(parsed, name)) is not None}
    if not parsed.headless:
        return {name: network_by_name(text) for name, text in names.items()}
    if parsed.config is None:
        names = _NETWORKS | names
    elif not names:
        raise ConfigError("--headless is for --teacher and --student; in a config it is num_classes: 0 of each")
    return {name: network_by_name(text) | {"num_classes": 0} for name, text in names.items()}


def network_by_name(name: str) -> dict[str, Any]:
    """The settings of a network called `NAME`, of torchvision, or `timm:NAME`.

    Raises:
        ConfigError: it is of another library.
    """
    library, _, rest = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise ConfigError(f"{name}: a network is a torchvision name, or timm:NAME")
    return {library or "torchvision": rest}


def _add_teacher_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.bench.teacher import BenchTeacherSettings
    from kd_pipeline.models.registry import ModelSettings

    model = parser.add_argument_group("the teacher, one of (default: torchvision's resnet50)")
    add_options(model, BenchTeacherSettings, "onnx")
    add_options(model, ModelSettings, "torchvision", "timm", "builtin")
    named = parser.add_argument_group("a teacher by name")
    add_options(named, ModelSettings, "checkpoint", "checkpoint_key", "pretrained", "num_classes")
    fields = ("root", "size", "batch_sizes", "precisions", "num_images", "repeats", "num_threads", "device")
    add_options(parser, BenchTeacherSettings, *fields)
    text = "batch sizes at which PyTorch is also compiled and captured; none for neither (default: the largest)"
    parser.add_argument("--compile-at", nargs="*", metavar="N", help=text)
    _add_out(parser, "runs/bench_teacher.json")


def _run_teacher(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench.teacher import BenchTeacherSettings, bench_teacher
    from kd_pipeline.models.registry import ModelSettings

    values, model = given(parsed, BenchTeacherSettings), given(parsed, ModelSettings)
    if parsed.onnx is None:
        is_named = model.keys() & {"torchvision", "timm", "builtin"}
        values["model"] = checked(ModelSettings, **({} if is_named else {"torchvision": "resnet50"}), **model)
    elif model:
        option = next(iter(model)).replace("_", "-")
        raise ConfigError(f"--{option} is for a model by name, and {parsed.onnx} is a file")
    print_result(bench_teacher(checked(BenchTeacherSettings, **values), report=print_progress).table())
    print_result(printable(f"all repeats: {parsed.out}; the curves: {parsed.out.with_suffix('.png')}"))
    return 0
