"""What the benchmarks here share as commands: settings from options, errors and exit status."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.settings import Settings
from kd_pipeline.cli.arguments import add_common, add_options, checked, given, print_progress, run_command

__all__ = ["benchmark_parser", "run_benchmark"]


def benchmark_parser(
    name: str,
    description: str | None,
    settings: type[Settings],
    *,
    left_out: Collection[str] = (),
    flags: Mapping[str, Sequence[str]] | None = None,
) -> argparse.ArgumentParser:
    """A parser with an option for each setting, and `--out`, which defaults to `runs/bench_NAME.json`.

    Args:
        name: of the module.
        description: its docstring, shown as it is if it has several lines.
        settings: of the benchmark.
        left_out: settings that get no option here.
        flags: spellings of an option, by the setting.
    """
    is_text = "\n" in (description or "")
    formatter = argparse.RawDescriptionHelpFormatter if is_text else argparse.HelpFormatter
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description, formatter_class=formatter)
    fields = [field for field in settings.model_fields if field not in ("out", *left_out)]
    add_options(parser, settings, *fields, flags=flags)
    out = Path(f"runs/bench_{name}.json")
    parser.add_argument("--out", type=Path, default=out, help="JSON file for the result")
    return parser


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
