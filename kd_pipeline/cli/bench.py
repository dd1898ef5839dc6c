"""`kd-pipeline bench`."""

import argparse
from pathlib import Path
from typing import Any

from kd_pipeline._core.settings import Settings
from kd_pipeline.cli.arguments import checked, tell
from kd_pipeline.errors import ConfigError

__all__ = ["add_to"]


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("bench", help="measure on this machine what the library is worth")
    subjects = parser.add_subparsers(title="subjects", required=True, metavar="SUBJECT")
    _add_step(subjects, common)
    loader = subjects.add_parser(
        "loader", parents=[common], help="KDDataLoader beside the bare DALI graph and torchvision"
    )
    loader.add_argument("--root", type=Path, help="JPEG files in class folders; made in data/photographs if left out")
    loader.add_argument("--batch-size", type=int, default=64)
    loader.add_argument("--size", type=int, default=224, help="height and width of the finished images")
    loader.add_argument("--num-batches", type=int, default=20, help="timed batches of each loader in each repeat")
    loader.add_argument("--repeats", type=int, default=7)
    loader.add_argument("--num-threads", type=int, help="threads or worker processes; the cores if left out")
    loader.add_argument("--device", default="auto", help="cpu or cuda; a GPU where there is one if left out")
    loader.add_argument(
        "--decode",
        nargs="+",
        choices=("window", "full"),
        default=(),
        help="only windows of the files, or whole images; rows of their own",
    )
    loader.add_argument(
        "--hw-decoder-load",
        type=float,
        nargs="+",
        default=(),
        dest="hw_decoder_loads",
        metavar="SHARE",
        help="of the files for a GPU's hardware decoder; rows of their own",
    )
    loader.add_argument("--out", type=Path, default=Path("runs/bench_loader.json"), help="where the JSON goes")
    loader.set_defaults(run=_run_loader)
    _add_teacher(subjects, common)
    _add_scale(subjects, common)


def _add_step(subjects: Any, common: argparse.ArgumentParser) -> None:
    step = subjects.add_parser(
        "step", parents=[common], help="the whole distillation step, beside what people run in PyTorch alone"
    )
    step.add_argument("-c", "--config", type=Path, metavar="FILE", help="images, teacher and student as in this config")
    step.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    step.add_argument("--root", type=Path, help="JPEG files in class folders; made in data/photographs if left out")
    step.add_argument("--teacher", metavar="NAME", help="a network of torchvision, or timm:NAME; resnet50 if left out")
    step.add_argument("--student", metavar="NAME", help="likewise; resnet18 if left out")
    step.add_argument("--batch", type=int, dest="batch_size", metavar="N", help="images in a step; 32 if left out")
    step.add_argument("--size", type=int, help="height and width of the images; 224 if left out")
    step.add_argument("--precision", help="of the student, in every row: fp32, bf16 or fp16")
    step.add_argument("--teacher-precision", help="of the teacher where it is compiled: bf16, fp16 or fp32")
    step.add_argument("--rows", nargs="+", metavar="ROW", help="some of a b c d e f g; all if left out")
    step.add_argument("--num-steps", type=int, help="timed steps of each row in each repeat; 6 if left out")
    step.add_argument("--repeats", type=int, help="5 if left out")
    step.add_argument("--num-threads", type=int, help="CPU threads for each row; the cores if left out")
    step.add_argument("--device", help="cpu or cuda; a GPU where there is one if left out")
    step.add_argument("--out", type=Path, default=Path("runs/bench_step.json"), help="where the JSON goes, and a PNG")
    step.set_defaults(run=_run_step)


def _run_step(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench.step import BenchStepSettings, bench_step, step_settings
    from kd_pipeline.config.config import load_config
    from kd_pipeline.data.transforms import TrainTransform

    if parsed.config is None and parsed.overrides:
        raise ConfigError(f"{parsed.overrides[0]} changes a config, and there is none; give one with -c")
    values = _said(parsed, BenchStepSettings)
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("teacher", "student"):
        if name in given:
            given[name] = _network(given[name])
    if parsed.size is not None:
        given["transform"] = checked(TrainTransform, size=parsed.size)
    settings = checked(BenchStepSettings, **given)
    if parsed.config is not None:
        settings = step_settings(load_config(parsed.config, parsed.overrides), settings, given)
    print(bench_step(settings, report=tell).table())
    print(f"every repeat: {parsed.out}; where the time goes: {parsed.out.with_suffix('.png')}")
    return 0


def _said(parsed: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """Those of the arguments that are settings of this kind."""
    return {name: value for name, value in vars(parsed).items() if name in kind.model_fields}


def _network(name: str) -> dict[str, str]:
    library, _, rest = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise ConfigError(f"{name}: a network is a name in torchvision, or timm:NAME")
    return {library or "torchvision": rest}


def _run_loader(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench import BenchLoaderSettings, bench_loader

    values = _said(parsed, BenchLoaderSettings)
    settings = checked(BenchLoaderSettings, {"hw_decoder_loads": "hw-decoder-load"}, **values)
    print(bench_loader(settings, report=tell).table())
    print(f"every repeat: {settings.out}")
    return 0


def _add_teacher(subjects: Any, common: argparse.ArgumentParser) -> None:
    teacher = subjects.add_parser(
        "teacher", parents=[common], help="one teacher on every backend, in every precision, at several batch sizes"
    )
    model = teacher.add_argument_group("the teacher, one of; torchvision's resnet50 if left out")
    model.add_argument("--onnx", type=Path, metavar="FILE", help="an exported classifier")
    model.add_argument("--torchvision", metavar="NAME", help="a model of torchvision's, measured in PyTorch too")
    model.add_argument("--timm", metavar="NAME", help="a model of timm's, likewise")
    model.add_argument("--builtin", metavar="NAME", help="one of ours, likewise")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of a model by name; random if left out")
    model.add_argument("--pretrained", action="store_true", help="weights that timm or torchvision downloads")
    model.add_argument("--num-classes", type=int, metavar="K")
    teacher.add_argument("--root", type=Path, help="images; made in data/photographs if left out")
    teacher.add_argument("--size", type=int, help="height and width of the images; the model's own if left out")
    teacher.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N")
    teacher.add_argument(
        "--compile-at", type=int, nargs="*", metavar="N", help="batch sizes for torch.compile; the largest if left out"
    )
    teacher.add_argument("--num-images", type=int, default=64, help="timed images in each repeat")
    teacher.add_argument("--repeats", type=int, default=3)
    teacher.add_argument("--num-threads", type=int, help="of every backend; the cores if left out")
    teacher.add_argument("--device", default="auto", help="cpu or cuda; a GPU where there is one if left out")
    teacher.add_argument(
        "--out", type=Path, default=Path("runs/bench_teacher.json"), help="where the JSON goes, and a PNG"
    )
    teacher.set_defaults(run=_run_teacher)


def _run_teacher(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench import BenchTeacherSettings, bench_teacher
    from kd_pipeline.models.registry import ModelSettings

    values = _said(parsed, BenchTeacherSettings)
    about = {name: value for name, value in vars(parsed).items() if name in ModelSettings.model_fields and value}
    if parsed.onnx is None:
        named = about.keys() & {"torchvision", "timm", "builtin"}
        values["model"] = checked(ModelSettings, **({} if named else {"torchvision": "resnet50"}), **about)
    elif about:
        raise ConfigError(
            f"--{next(iter(about)).replace('_', '-')} is for a model by name, and {parsed.onnx} is a file"
        )
    settings = checked(BenchTeacherSettings, **values)
    print(bench_teacher(settings, report=tell).table())
    print(f"every repeat: {settings.out}; the curves: {parsed.out.with_suffix('.png')}")
    return 0


def _add_scale(subjects: Any, common: argparse.ArgumentParser) -> None:
    scale = subjects.add_parser(
        "scale", parents=[common], help="how start, memory and resuming grow with the number of files, and ranks"
    )
    scale.add_argument("--root", type=Path, help="images; made in data/photographs if left out")
    scale.add_argument(
        "--sizes", type=int, nargs="+", default=[10**power for power in range(3, 8)], metavar="N", help="entries"
    )
    scale.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], metavar="N", help="processes at a time")
    scale.add_argument("--ranks-size", type=int, default=10**5, metavar="N", help="entries in the list they share")
    scale.add_argument("--batch-size", type=int, default=256)
    scale.add_argument("--num-batches", type=int, default=100, help="timed batches of each rank in each repeat")
    scale.add_argument("--repeats", type=int, default=3)
    scale.add_argument("--num-threads", type=int, help="of DALI in all ranks together; the cores if left out")
    scale.add_argument("--out", type=Path, default=Path("runs/bench_scale.json"), help="where the JSON goes")
    scale.set_defaults(run=_run_scale)


def _run_scale(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench import BenchScaleSettings, bench_scale

    values = _said(parsed, BenchScaleSettings)
    settings = checked(BenchScaleSettings, **values)
    print(bench_scale(settings, report=tell).table())
    print(f"every process and repeat: {settings.out}")
    return 0
