"""`kd-pipeline doctor`."""

import argparse
from typing import Any

__all__ = ["add_to"]


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "doctor", parents=[common], help="what this machine has, what is usable, and what to install"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.workflows.doctor import diagnose

    report = diagnose()
    print(report.model_dump_json(indent=2) if parsed.json else report.to_text())
    return 0 if report.is_usable else 1
