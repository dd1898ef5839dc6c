"""`kd-pipeline doctor`."""

import argparse
import json
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
    if parsed.json:
        print_result(json.dumps(report.model_dump(mode="json"), indent=2))
    else:
        print_result(report.to_text())
    return 0 if report.is_usable else 1
