"""`kd-pipeline doctor`."""

import argparse
from typing import Any

from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "doctor",
        parents=[common],
        help="report what this machine has, which backends work, and what to install",
        add_options=lambda parser: parser.add_argument("--json", action="store_true", help="print JSON"),
        run=_run,
    )


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.workflows.doctor import diagnose

    report = diagnose()
    print_result(report.model_dump_json(indent=2) if parsed.json else report.to_text())
    return 0 if report.is_usable else 1
