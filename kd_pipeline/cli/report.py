"""`kd-pipeline report`."""

import argparse
import time
from typing import Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_permissions, path_option, permissions, print_progress
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline report runs/mine
  kd-pipeline report runs/mine runs/other --out comparison.html
  kd-pipeline report runs/mine --no-samples
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "report",
        parents=[common],
        help="write one HTML file on a run, or a comparison of several, to send on",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=path_option, metavar="FILE", help="the file (default: report.html in the folder of the first run)"
    )
    parser.add_argument(
        "--no-samples",
        action="store_true",
        help="show no picture of the data, and read nothing but the folders of the runs: no answers to single images "
        "where a run kept none",
    )
    parser.add_argument(
        "--remote", action="store_true", help="read images from URLs that the config of a run names, too"
    )
    add_permissions(parser, "factories")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.workflows.reporting.report import write_report

    started = time.monotonic()
    file = write_report(
        parsed.runs,
        parsed.out,
        samples=not parsed.no_samples,
        remote=parsed.remote,
        **permissions(parsed),
        report=print_progress,
    )
    print_result(printable(file))
    print_progress(f"{file.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
    return 0
