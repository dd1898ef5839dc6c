"""The commands: each parses its arguments, makes one library call and prints what came of it."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kd_pipeline import __version__
from kd_pipeline.errors import ConfigError, KDPipelineError

__all__ = ["main"]

Model = TypeVar("Model", bound=BaseModel)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kd-pipeline` with these arguments and return its exit status: 0, 1 for an error, 130 for Ctrl-C."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    run: Callable[[argparse.Namespace], None] = parsed.run
    try:
        run(parsed)
    except KDPipelineError as error:
        if parsed.debug:
            raise
        print(f"kd-pipeline: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kd-pipeline: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kd-pipeline", description="Knowledge distillation on NVIDIA DALI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="distil a small student on handwritten digits, in a minute or two")
    demo.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to configs/digits.yaml")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure on this machine what the library is worth")
    subjects = bench.add_subparsers(title="subjects", required=True, metavar="SUBJECT")
    loader = subjects.add_parser("loader", help="KDDataLoader beside the bare DALI graph and torchvision")
    loader.add_argument("--root", type=Path, help="JPEG files in class folders; made in data/photographs if left out")
    loader.add_argument("--batch-size", type=int, default=64)
    loader.add_argument("--size", type=int, default=224, help="height and width of the finished images")
    loader.add_argument("--num-batches", type=int, default=20, help="timed batches of each loader in each repeat")
    loader.add_argument("--repeats", type=int, default=7)
    loader.add_argument("--num-threads", type=int, help="threads or worker processes; the cores if left out")
    loader.add_argument("--out", type=Path, default=Path("runs/bench_loader.json"), help="where the JSON goes")
    loader.set_defaults(run=_bench_loader)

    for command in (demo, loader):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_argument("--verbose", action="store_true", help="say what is chosen, and why")
    return parser


def _demo(parsed: argparse.Namespace) -> None:
    from kd_pipeline.demo import run_demo

    summary = run_demo(parsed.overrides)
    print()
    for line in _demo_table(summary):
        print(line)


def _bench_loader(parsed: argparse.Namespace) -> None:
    from kd_pipeline.bench import BenchLoaderSettings, bench_loader

    settings = _settings(BenchLoaderSettings, parsed)
    print(bench_loader(settings, report=lambda line: print(line, file=sys.stderr)).table())
    print(f"every repeat: {settings.out}")


def _settings(model: type[Model], parsed: argparse.Namespace) -> Model:
    """The arguments that the settings know, checked by them."""
    try:
        return model(**{name: value for name, value in vars(parsed).items() if name in model.model_fields})
    except ValidationError as error:
        problems = [f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def _demo_table(summary: dict[str, Any]) -> list[str]:
    rows = [
        ("teacher", f"{summary['teacher_top1']:.1%}", ""),
        ("student alone", f"{summary['student_alone_top1']:.1%}", f"{summary['agreement_alone']:.1%}"),
        ("student distilled", f"{summary['student_distilled_top1']:.1%}", f"{summary['agreement']:.1%}"),
    ]
    return [
        f"{'':<20}{'top-1':>8}{'agrees with teacher':>22}",
        *(f"{name:<20}{top1:>8}{agreement:>22}" for name, top1, agreement in rows),
        "",
        f"on {summary['num_val']} validation images after {summary['epochs']} epochs of {summary['num_train']} images; "
        f"distilled at {summary['images_per_s']:.0f} images/s",
        f"teacher: {summary['teacher_backend']} in {summary['teacher_precision']} on {summary['device']}",
        f"a training batch as both saw it: {summary['grid']}",
    ]
