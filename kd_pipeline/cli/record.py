"""`kd-pipeline record`."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.text import counted
from kd_pipeline.cli.arguments import add_config, add_options, checked, given, print_progress
from kd_pipeline.cli.printing import print_result
from kd_pipeline.errors import shown

if TYPE_CHECKING:
    from kd_pipeline.workflows._record import Progress, RecordingPlan, RecordSettings

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline record -c my.yaml
  kd-pipeline record -c my.yaml --top-k 16 --dtype float16 --epochs 100
  kd-pipeline record -c my.yaml --outputs pooled spatial --grid 7 --dtype int8 --dry-run
  kd-pipeline train -c my.yaml 'teacher={path: runs/mine/recording}'
  kd-pipeline record -c my.yaml --out s3://bucket/recording --part 2/4
  kd-pipeline record -c my.yaml --out s3://bucket/recording --join --license CC-BY-4.0

Run the same command to resume an interrupted recording.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "record",
        parents=[common],
        help="run the teacher of a config once, and save its outputs for trainings that replay them",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.workflows._record import RecordSettings

    add_config(parser)
    add_options(parser, RecordSettings, "outputs", "dtype", "grid", "top_k", "epochs", "out", "part", "license")
    parser.add_argument(
        "--join", action="store_true", help="say which parts are missing, and record none; if there are all, list them"
    )
    parser.add_argument("--verify", action="store_true", help="compare all parts with their sha256, and record none")
    parser.add_argument("--dry-run", action="store_true", help="say what the recording would take, and write nothing")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config
    from kd_pipeline.teachers.recorded.join import verify_recording
    from kd_pipeline.workflows._record import RecordSettings, plan_recording, record
    from kd_pipeline.workflows.record_plan import recording_path

    settings = checked(RecordSettings, **given(parsed, RecordSettings))
    config = load_config(parsed.config, parsed.overrides)
    plugins, trust_engines = parsed.plugin, parsed.trust_engine
    epochs = settings.epochs or config.train.epochs
    if parsed.verify:
        path = recording_path(config, settings)
        num_parts = verify_recording(path)
        are = "is as it was" if num_parts == 1 else "are as they were"
        print_result(f"{counted(num_parts, 'part')} in {shown(str(path))} {are} recorded")
    if parsed.join:
        return int(_print_state(recording_path(config, settings), epochs, settings))
    if parsed.verify:
        return 0
    started = time.monotonic()
    if is_rank_zero():
        print_progress("opening the images and the teacher")
    if parsed.dry_run:
        plan = plan_recording(config, settings, plugins=plugins, trust_engines=trust_engines)
        plan.require_space()
        print_result("\n  ".join(plan.lines))
        return 0
    folder = record(config, settings, plugins=plugins, trust_engines=trust_engines, announce=_announce, report=_show)
    if is_rank_zero():
        print_progress(f"recorded in {time.monotonic() - started:.1f} s")
        _print_state(folder, epochs, settings)
    return 0


def _print_state(folder: Path | str, epochs: int, settings: "RecordSettings") -> bool:
    """Print what the folder holds, and return whether something is missing."""
    from kd_pipeline.teachers.recorded.join import join_recording
    from kd_pipeline.workflows.record_plan import format_bytes
    from kd_pipeline.workflows.record_share import Share, missing_lines

    joined, share = join_recording(folder, epochs, license=settings.license), Share.of_process(settings.part)
    if joined.missing:
        lines = missing_lines(joined.manifest, joined.missing, share.count)
        print_result("\n  ".join([f"missing in {shown(str(folder))}, unless a process is recording it now:", *lines]))
        return True
    num_epochs, row_bytes = joined.parts.num_epochs, joined.manifest.row_bytes
    size = f"{row_bytes:,} bytes each, {format_bytes(joined.manifest.epoch_bytes * num_epochs)} in all"
    print_result(
        f"{joined.manifest.num_rows:,} images x {counted(num_epochs, 'epoch')}, {size}: train with "
        f"teacher: {{path: {_yaml(folder)}}}"
    )
    return False


def _yaml(path: Path | str) -> str:
    """A path as it is written in YAML."""
    text = shown(str(path))
    return text if re.fullmatch(r"[\w/.][\w/.+-]*", text) else json.dumps(text)


def _announce(plan: "RecordingPlan") -> None:
    print_progress("\n".join(plan.lines))


def _show(progress: "Progress") -> None:
    print_progress(progress.line)
