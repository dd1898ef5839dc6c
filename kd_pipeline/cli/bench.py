"""`kd-pipeline bench`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from kd_pipeline.cli.arguments import checked

__all__ = ["add_to"]


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("bench", help="measure on this machine what the library is worth")
    subjects = parser.add_subparsers(title="subjects", required=True, metavar="SUBJECT")
    loader = subjects.add_parser(
        "loader", parents=[common], help="KDDataLoader beside the bare DALI graph and torchvision"
    )
    loader.add_argument("--root", type=Path, help="JPEG files in class folders; made in data/photographs if left out")
    loader.add_argument("--batch-size", type=int, default=64)
    loader.add_argument("--size", type=int, default=224, help="height and width of the finished images")
    loader.add_argument("--num-batches", type=int, default=20, help="timed batches of each loader in each repeat")
    loader.add_argument("--repeats", type=int, default=7)
    loader.add_argument("--num-threads", type=int, help="threads or worker processes; the cores if left out")
    loader.add_argument("--out", type=Path, default=Path("runs/bench_loader.json"), help="where the JSON goes")
    loader.set_defaults(run=_run_loader)


def _run_loader(parsed: argparse.Namespace) -> int:
    from kd_pipeline.bench import BenchLoaderSettings, bench_loader

    values = {name: value for name, value in vars(parsed).items() if name in BenchLoaderSettings.model_fields}
    settings = checked(BenchLoaderSettings, **values)
    print(bench_loader(settings, report=lambda line: print(line, file=sys.stderr)).table())
    print(f"every repeat: {settings.out}")
    return 0
