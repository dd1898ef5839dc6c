"""`kd-pipeline verify`."""

import argparse
import json
import textwrap
import time
from typing import TYPE_CHECKING, Any

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import (
    add_options,
    add_permissions,
    checked,
    given,
    path_option,
    permissions,
    print_progress,
)
from kd_pipeline.cli.printing import print_result

if TYPE_CHECKING:
    from kd_pipeline.workflows.verification.verify import VerifyReport

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline verify runs/mine
  kd-pipeline verify runs/mine --steps 100 --batches 50
  kd-pipeline verify runs/mine --full             (trains all of it again)
  kd-pipeline verify runs/mine --no-replay --set data.train.source.root=/data/imagenet/train

The exit status is 0 if no fact differs, and 1 if one does.
"""
_WIDTH = 120
_MARKS = {"holds": "holds", "differs": "DIFFERS", "cannot be checked": "unknown"}


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "verify",
        parents=[common],
        help="do parts of a finished run again, and say whether its student came from its config and its data",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.workflows.verification.verify import VerifySettings

    parser.add_argument("folder", type=path_option, metavar="RUN", help="folder of a run; it is only read")
    add_options(parser, VerifySettings, "steps", "batches")
    parser.add_argument("--full", action="store_true", help="train all steps again; takes as long as the run")
    parser.add_argument("--no-replay", action="store_true", help="train no step again")
    parser.add_argument("--no-results", action="store_true", help="do not evaluate the exported student again")
    add_permissions(parser, "factories and losses")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key.path=value",
        help="override of the config, for data and teacher that are elsewhere now",
    )
    parser.add_argument("--out", type=path_option, metavar="FILE", help="write all facts as JSON")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.workflows.verification.verify import VerifySettings, runs_in, verify

    started = time.monotonic()
    names = {"steps": "steps", "batches": "batches"}
    chosen = given(parsed, VerifySettings)
    chosen |= {"full": parsed.full, "replay": not parsed.no_replay, "results": not parsed.no_results}
    settings = checked(VerifySettings, names, **chosen)
    folders = runs_in(parsed.folder)
    if parsed.out is not None:
        prepare_output(parsed.out)
    reports = []
    for folder in folders:
        found = verify(folder, settings, overrides=parsed.set, **permissions(parsed), report=print_progress)
        print_result("\n".join(_lines(found, title=len(folders) > 1)))
        reports.append(found)
    if parsed.out is not None:
        content = [each.to_dict() for each in reports]
        write_output(parsed.out, json.dumps(content[0] if len(content) == 1 else content, indent=2) + "\n")
        print_progress(f"all facts: {parsed.out}")
    print_progress(f"verified in {time.monotonic() - started:.1f} s")
    return 0 if all(each.holds for each in reports) else 1


def _lines(found: "VerifyReport", *, title: bool) -> list[str]:
    """The table of facts, and the verdict."""
    width = max(len(fact.name) for fact in found.facts) + 2
    lines = [printable(f"{found.folder}:")] if title else []
    for fact in found.facts:
        start = f"{_MARKS[fact.state]:<9}{fact.name:<{width}}"
        lines += textwrap.wrap(
            printable(fact.text),
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [*lines, "", *textwrap.wrap(printable(found.verdict), _WIDTH)]
