"""`kd-pipeline demo`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.progress import speed_text
from kd_pipeline._core.text import counted, printable
from kd_pipeline.cli.arguments import print_progress
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]

_BACKBONE = "backbone"
_EXAMPLES = """\
examples:
  kd-pipeline demo
  kd-pipeline demo train.epochs=10 distill.loss=dkd
  kd-pipeline demo backbone
  kd-pipeline demo backbone seed=3 epochs=40
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "demo",
        parents=[common],
        run=_run,
        help="distill a small student on handwritten digits, in a minute or two",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="backbone | key.path=value",
        help="backbone: distill features without labels; then overrides, of configs/digits.yaml or, for backbone, of "
        "seed, run_dir, epochs and teacher_epochs",
    )


def _run(parsed: argparse.Namespace) -> int:
    if parsed.arguments[:1] == [_BACKBONE]:
        return _run_backbone(parsed.arguments[1:])
    from kd_pipeline.workflows.demo import run_demo

    _print(_table(run_demo(parsed.arguments, report=print_progress)))
    return 0


def _run_backbone(overrides: Sequence[str]) -> int:
    from kd_pipeline.workflows.demo_backbone import run_backbone_demo

    _print(_backbone_table(run_backbone_demo(overrides, report=print_progress)))
    return 0


def _print(table: Sequence[str]) -> None:
    print_result("\n".join(["", *map(printable, table)]))


def _backbone_table(summary: dict[str, Any]) -> list[str]:
    rows = {"teacher": "teacher, which knows five", "start": "student at the start", "student": "student distilled"}
    return [
        f"{'features of all ten digits':<28}{'k-NN':>8}{'linear probe':>16}",
        *(
            f"{text:<28}{summary[f'{name}_knn_top1']:>8.1%}{summary[f'{name}_linear_top1']:>16.1%}"
            for name, text in rows.items()
        ),
        "",
        f"on {summary['num_val']:,} images, with {summary['num_train']:,} labeled ones to compare with, after "
        f"{_epochs(summary)} without labels",
        f"its weights: {summary['student']}",
        f"what each finds alike: {summary['neighbors']}",
    ]


def _table(summary: dict[str, Any]) -> list[str]:
    rows = [
        ("teacher", f"{summary['teacher_top1']:.1%}", ""),
        ("student alone", f"{summary['student_alone_top1']:.1%}", f"{summary['agreement_alone']:.1%}"),
        ("student distilled", f"{summary['student_distilled_top1']:.1%}", f"{summary['agreement']:.1%}"),
    ]
    return [
        f"{'':<20}{'top-1':>8}{'agrees with teacher':>22}",
        *(f"{name:<20}{top1:>8}{agreement:>22}".rstrip() for name, top1, agreement in rows),
        "",
        f"on {summary['num_val']:,} validation images after {_epochs(summary)} of {summary['num_train']:,} images; "
        f"distilled at {speed_text(summary['images_per_s'])}",
        f"teacher: {summary['teacher_backend']} in {summary['teacher_precision']} on {summary['device']}",
        f"a training batch as both saw it: {summary['grid']}",
        "",
        "the loop that trained the students, and its config, are yours to change:",
        f"  {_command(summary)}",
    ]


def _command(summary: dict[str, Any]) -> str:
    teacher = Path(summary["loop"]).with_name("teacher.onnx")
    return shlex.join(["python", summary["loop"], summary["config"], f"teacher.onnx={teacher}"])


def _epochs(summary: dict[str, Any]) -> str:
    return f"{counted(summary['epochs'], 'epoch')}"
