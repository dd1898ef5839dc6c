"""What the benchmarks here share as commands: settings from options, errors and exit status."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_pipeline._core.settings import Settings
from kd_pipeline.cli.arguments import add_common, checked, given, print_progress, run_command

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
    add_common(parser)

    def run(parsed: argparse.Namespace) -> int:
        print(benchmark(checked(settings, options, **given(parsed, settings)), report=print_progress).table())
        print(f"all repeats: {parsed.out}")
        return 0

    return run_command(run, parser.parse_args(arguments), prog=parser.prog)
