"""The commands: each parses its arguments, calls one function of the library and prints the result."""

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.secret_values import hide_in_arguments
from kd_pipeline._core.text import printable
from kd_pipeline._core.version import __version__
from kd_pipeline.cli import (
    bench,
    build_engine,
    check,
    config,
    demo,
    distill,
    doctor,
    export,
    init,
    predict,
    record,
    report,
    runs,
    train,
    tune,
    verify,
)
from kd_pipeline.cli import eval as evaluation
from kd_pipeline.cli.arguments import CommandParser, add_common, run_command
from kd_pipeline.cli.printing import print_message

__all__ = ["main"]

_IMPORTS_TAKE_SECONDS = (
    "bench",
    "build-engine",
    "check",
    "demo",
    "distill",
    "eval",
    "export",
    "record",
    "report",
    "train",
    "tune",
    "verify",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kd-pipeline` with `arguments` and return the exit status: 0, 1 for an error, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _IMPORTS_TAKE_SECONDS and not {"-h", "--help"} & {*arguments}:
        _announce(arguments)
        _import_torch()
    parsed = _parser().parse_args(arguments)
    return run_command(parsed.run, parsed, prog="kd-pipeline")


def _announce(arguments: Sequence[str]) -> None:
    """Show at once, on one rank, that a command has started: torch and Lightning take seconds to import."""
    if is_rank_zero():
        print_message(printable(f"kd-pipeline {__version__}: {shlex.join(hide_in_arguments(arguments))}"))


def _import_torch() -> None:
    """Import torch while Ctrl-C ends the process at once.

    Python's own handler would raise in whatever torch's import runs: a traceback, an abort of C++ code, or nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            import_module("torch")
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add_common(common)
    parser = CommandParser(prog="kd-pipeline", description="Knowledge distillation on NVIDIA DALI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        demo,
        init,
        config,
        check,
        distill,
        train,
        record,
        evaluation,
        predict,
        report,
        export,
        build_engine,
        tune,
        bench,
        runs,
        doctor,
        verify,
    ):
        command.add_to(commands, common)
    return parser
