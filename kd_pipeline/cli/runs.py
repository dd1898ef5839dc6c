"""`kd-pipeline runs`."""

import argparse
from pathlib import Path
from typing import Any

from kd_pipeline.cli.arguments import path_option
from kd_pipeline.cli.printing import print_result
from kd_pipeline.errors import DataError

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline runs                                 the runs in the folder runs, the latest first
  kd-pipeline runs sweep --latest                  the path of the latest one alone
  kd-pipeline predict "$(kd-pipeline runs --latest)" photos
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "runs",
        parents=[common],
        help="list the runs in a folder with their ids, status and results, the latest first",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=path_option, default=Path("runs"), metavar="FOLDER", help="where the runs are"
    )
    parser.add_argument("--latest", action="store_true", help="print the path of the run that was started last")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.training.run_list import list_runs, runs_table

    found = list_runs(parsed.folder)
    if not found:
        raise DataError(f"{parsed.folder} holds no run; name the folder in which the run_dir of your config is")
    print_result(str(found[0].path) if parsed.latest else runs_table(found))
    return 0
