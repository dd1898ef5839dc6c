"""`kd-pipeline check`."""

import argparse
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_config, add_options, checked, given, permissions, print_progress
from kd_pipeline.cli.printing import print_result

if TYPE_CHECKING:
    from kd_pipeline.workflows._check import CheckReport, Finding, SplitReport, TeacherReport

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline check -c my.yaml
  kd-pipeline check -c my.yaml --images 10000 data.batch_size=64

The exit status is 1 if a training would stop or be wrong.
"""
_WIDTH = 120
"""Of the table of findings."""
_MOST_NAMED = 10
"""Unreadable files to print per split; all are in `check.json`."""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "check",
        parents=[common],
        help="check a config before training: settings, lists, images, teacher and student, and what to do",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.workflows._check import CheckSettings

    add_config(parser)
    add_options(parser, CheckSettings, "num_images", "out", flags={"num_images": ["--images"]})


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config
    from kd_pipeline.workflows._check import CheckSettings, check

    started = time.monotonic()
    settings = checked(CheckSettings, {"num_images": "images"}, **given(parsed, CheckSettings))
    config = load_config(parsed.config, parsed.overrides)
    found = check(config, settings, **permissions(parsed), report=print_progress)
    print_result("\n".join(_lines(found)))
    print_progress(f"checked in {time.monotonic() - started:.1f} s; all of it: {found.file}")
    return 1 if found.problems else 0


def _lines(found: "CheckReport") -> list[str]:
    lines = [
        f"{'split':<12}{'images':>12}{'decoded':>12}{'unreadable':>12}{'classes':>9}{'of each':>16}{'images/s':>10}"
    ]
    lines += [_row(split) for split in found.splits]
    for split in found.splits:
        for sample in split.unreadable[:_MOST_NAMED]:
            lines.append(printable(f"{split.split}: {sample.path} ({_size(sample.num_bytes)}): {sample.reason}"))
        if (more := len(split.unreadable) - _MOST_NAMED) > 0:
            lines.append(printable(f"{split.split}: and {more} more"))
    if found.teacher is not None:
        lines.append(_teacher(found.teacher))
    if found.grid is not None:
        lines.append(printable(f"first training batch as the models see it: {found.grid}"))
    return [*lines, *_findings(found.findings), _verdict(len(found.problems))]


def _findings(findings: Sequence["Finding"]) -> list[str]:
    """The table of findings; nothing if there are none."""
    if not findings:
        return []
    width = max(len("where"), *(len(printable(finding.where)) for finding in findings)) + 2
    lines = ["", f"{'':<7}{'where':<{width}}what was found, and what to do"]
    for finding in findings:
        indent = " " * (7 + width)
        lines += textwrap.wrap(
            printable(finding.message, keep="\n"),
            _WIDTH,
            initial_indent=f"{finding.severity:<7}{printable(finding.where):<{width}}",
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [*lines, ""]


def _verdict(num_problems: int) -> str:
    match num_problems:
        case 0:
            return "no problems"
        case 1:
            return "1 problem: a training would stop, or be wrong"
        case _:
            return f"{num_problems} problems: a training would stop, or be wrong"


def _row(split: "SplitReport") -> str:
    sizes = split.class_sizes
    classes, of_each = ("", "") if sizes is None else (f"{len(sizes):,}", f"{min(sizes):,}-{max(sizes):,}")
    num_unreadable = len(split.unreadable)
    num_readable = split.num_decoded - num_unreadable
    return (
        f"{printable(split.split):<12}{split.num_images:>12,}{num_readable:>12,}{num_unreadable:>12,}"
        f"{classes:>9}{of_each:>16}{split.images_per_s:>10,.0f}"
    )


def _teacher(teacher: "TeacherReport") -> str:
    known = ""
    for output, probe in teacher.probes.items():
        augmented = ", augmented as for training" if probe.is_augmented else ""
        known += (
            f"{';' if known else ':'}{'' if output == 'logits' else f' {output}'} top-1 {probe.top1:.1%} on "
            f"{probe.num_samples} training images{augmented} (chance {probe.chance:.1%})"
        )
    return f"teacher, {teacher.backend} in {teacher.precision}{known}"


def _size(num_bytes: int | None) -> str:
    return "no file" if num_bytes is None else f"{num_bytes:,} bytes"
