"""What benchmarks of whole runs on the digits share: this checkout beside another one, taking turns on one machine."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_pipeline._core.output import prepare_output, write_output

__all__ = [
    "ROOT",
    "TIMEOUT_S",
    "command_of",
    "commit_of",
    "environment_of",
    "phases",
    "read_options",
    "write_results",
]

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_all_stages.yaml"
TIMEOUT_S = 300.0


def read_options(description: str | None, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Path]]:
    """The options `repeats` and `out`, whose folder is made now, and the checkouts to measure in turn."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this repository, to be measured in turn")
    parser.add_argument("--out", type=Path, help="a JSON file for every repeat")
    options = parser.parse_args(arguments)
    if options.out:
        prepare_output(options.out)
    return options, [ROOT, *([options.against.resolve()] if options.against else [])]


def write_results(out: Path | None, results: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON, where it was asked for."""
    if out:
        environment = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        write_output(out, json.dumps({"environment": environment, "results": results}, indent=2) + "\n")


def phases(columns: Mapping[str, list[float]]) -> str:
    """Seconds by name, such as `first_step_s`, in one line."""
    return ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {_spread(own)}" for name, own in columns.items())


def command_of(command: str) -> list[str]:
    """A command of the checkout in `PYTHONPATH`, for the digits."""
    return [sys.executable, "-P", "-m", "kd_pipeline", command, "-c", str(CONFIG)]


def environment_of(checkout: Path) -> dict[str, str]:
    """The variables of a run of `checkout`, whose modules are compiled once, as those of an installed package are."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": str(checkout)}


def commit_of(checkout: Path) -> str:
    """Its commit, with a mark where files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def _spread(seconds: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})"
