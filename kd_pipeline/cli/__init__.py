"""The commands: each parses its arguments, makes one library call and prints what came of it."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from kd_pipeline._core.version import __version__
from kd_pipeline.cli import bench, build_engine, check, demo, doctor, predict, record, train
from kd_pipeline.cli import eval as evaluation
from kd_pipeline.errors import KDPipelineError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kd-pipeline` with these arguments and return its exit status: 0, 1 for an error, 130 for Ctrl-C."""
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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", action="store_true", help="say what is chosen, and why")
    parser = argparse.ArgumentParser(prog="kd-pipeline", description="Knowledge distillation on NVIDIA DALI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, check, train, record, evaluation, predict, build_engine, bench, doctor):
        command.add_to(commands, common)
    return parser
