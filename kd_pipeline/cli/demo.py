"""`kd-pipeline demo`."""

import argparse
from typing import Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "demo", parents=[common], run=_run, help="distill a small student on handwritten digits, in a minute or two"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of configs/digits.yaml")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.workflows.demo import run_demo

    print_result("\n".join(["", *map(printable, _table(run_demo(parsed.overrides)))]))
    return 0


def _table(summary: dict[str, Any]) -> list[str]:
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
