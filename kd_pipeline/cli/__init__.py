"""The commands: each parses its arguments, calls one function of the library and prints the result."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from kd_pipeline._core.version import __version__
from kd_pipeline.cli import bench, build_engine, check, demo, doctor, predict, record, train
from kd_pipeline.cli import eval as evaluation
from kd_pipeline.cli.arguments import CommandParser
from kd_pipeline.errors import KDPipelineError

__all__ = ["main"]

_IMPORTS_TAKE_SECONDS = ("bench", "build-engine", "check", "demo", "eval", "record", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kd-pipeline` with `arguments` and return the exit status: 0, 1 for an error, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _announce(arguments)
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except KDPipelineError as error:
        if parsed.debug:
            raise
        print(f"kd-pipeline: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kd-pipeline: stopped", file=sys.stderr)
        return 130


def _announce(arguments: Sequence[str]) -> None:
    """Show at once, on one rank, that a command has started: torch and Lightning take seconds to import."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if arguments[:1] and arguments[0] in _IMPORTS_TAKE_SECONDS and rank == "0" and not {"-h", "--help"} & {*arguments}:
        print(f"kd-pipeline {__version__}: {shlex.join(arguments)}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", action="store_true", help="log what is chosen, and why")
    parser = CommandParser(prog="kd-pipeline", description="Knowledge distillation on NVIDIA DALI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, check, train, record, evaluation, predict, build_engine, bench, doctor):
        command.add_to(commands, common)
    return parser
