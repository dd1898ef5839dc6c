"""What the benchmarks here share as commands: settings from options, errors and exit status."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_pipeline._core.settings import Settings
from kd_pipeline.cli.arguments import checked, given, print_progress
from kd_pipeline.errors import KDPipelineError

__all__ = ["run_benchmark"]


def run_benchmark(
    parser: argparse.ArgumentParser,
    settings: type[Settings],
    benchmark: Callable[..., Any],
    arguments: Sequence[str] | None,
    options: Mapping[str, str] | None = None,
) -> int:
    """Parse the arguments, run the benchmark, print its table, and return the exit status, as `kd-pipeline` does.

    Args:
        parser: has options for the settings, `--out` among them.
        settings: their class.
        benchmark: gets the settings and `report`, and returns a result with `table()`.
        arguments: of the command line; None uses those of the process.
        options: the option of a setting whose name differs.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--verbose", action="store_true", help="log what is chosen, and why")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    try:
        print(benchmark(checked(settings, options, **given(parsed, settings)), report=print_progress).table())
    except KDPipelineError as error:
        if parsed.debug:
            raise
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    print(f"all repeats: {parsed.out}")
    return 0
