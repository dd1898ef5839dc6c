"""`kd-pipeline tune`."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_config, add_options, checked, given, path_option, permissions, print_progress
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]

_MAX_IMPORTS_S = 60.0

_EXAMPLES = """\
examples:
  kd-pipeline tune -c mine.yaml
  kd-pipeline tune -c mine.yaml --write                     change mine.yaml itself; its comments stay
  kd-pipeline tune -c mine.yaml --write-to tuned.yaml
  kd-pipeline tune -c mine.yaml --allow train.precision     choose the student's precision too

Nothing is trained, and the run's folder is left alone. Let the machine do nothing else meanwhile.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "tune",
        parents=[common],
        help="find the settings that make a run fastest on this machine",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    from kd_pipeline.bench.tune import TuneSettings
    from kd_pipeline.bench.tune_knobs import ALLOWABLE

    add_config(parser, plugins="factories and losses")
    add_options(parser, TuneSettings, "seconds", "out")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=[*ALLOWABLE],
        help="what to choose although it changes more than the speed; may be given several times",
    )
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--write", action="store_true", help="write the settings into the config file itself")
    written.add_argument(
        "--write-to", type=path_option, metavar="PATH", help="write a copy of the config file with the settings in it"
    )


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline._core.output import prepare_output
    from kd_pipeline.config.config import load_config

    config = load_config(parsed.config, parsed.overrides)  # an error in it should not wait for Lightning

    from kd_pipeline.bench.tune import TuneSettings, tune

    target: Path | None = parsed.config if parsed.write else parsed.write_to
    if target is not None:
        prepare_output(target, kind="YAML file")
    settings = checked(TuneSettings, **given(parsed, TuneSettings))
    settings = settings.model_copy(update={"seconds": settings.seconds - _age_s()})
    result = tune(config, settings, **permissions(parsed), report=print_progress)
    print_result(result.table())
    if settings.out is not None:
        print_result(printable(f"all rounds: {settings.out}"))
    if target is not None and not result.values:
        print_result(printable(f"{target} was not written, because there is nothing to change"))
    elif target is not None:
        also = "; the overrides of this command are not in it" if parsed.overrides else ""
        print_result(printable(_write(parsed.config, target, result.values) + also))
    elif result.values:
        print_result("add that line to a command, or let --write or --write-to PATH put it into the file")
    return 0


def _age_s() -> float:
    """Seconds since this process started, most of which went to imports."""
    # The name, in brackets, may contain anything; after it, the start is field 20, in ticks since boot (proc(5)).
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return min(max(age_s, 0.0), _MAX_IMPORTS_S)  # some sandboxes count the two from different moments


def _write(path: Path, target: Path, values: dict[str, Any]) -> str:
    """Write the settings, and say so."""
    from kd_pipeline._core.output import write_output
    from kd_pipeline.config.edit import edited_config

    write_output(target, edited_config(path, values))
    return f"written to {target}"
