"""Time from typing `kd-pipeline train` to its first line and to its first step, on the digits.

    python -m benchmarks.start
    python -m benchmarks.start --against ../another-checkout

With `--against`, the runs of both checkouts take turns on the same machine, which is how two commits are compared.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline.workflows.demo import write_digits

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_all_stages.yaml"
TIMEOUT_S = 300.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one line for each checkout, and write JSON where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this repository, to be measured in turn")
    parser.add_argument("--out", type=Path, help="a JSON file for every repeat")
    options = parser.parse_args(arguments)
    if options.out:
        prepare_output(options.out)
    checkouts = [ROOT, *([options.against.resolve()] if options.against else [])]
    times: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "data", "digits"))
        for repeat in range(options.repeats + 1):
            for checkout in checkouts:
                measured = start_once(checkout, Path(folder), f"{checkouts.index(checkout)}-{repeat}")
                if repeat:  # the first run of each fills the page cache
                    times[checkout].append(measured)
    results = []
    for checkout in checkouts:
        first_line_s, first_step_s = (list(column) for column in zip(*times[checkout], strict=True))
        results.append({"commit": commit_of(checkout), "first_line_s": first_line_s, "first_step_s": first_step_s})
        print(f"{commit_of(checkout)}: first line {spread(first_line_s)}, first step {spread(first_step_s)}")
    if options.out:
        environment = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        write_output(options.out, json.dumps({"environment": environment, "results": results}, indent=2) + "\n")


def start_once(checkout: Path, folder: Path, name: str) -> tuple[float, float]:
    """Seconds until the first byte of output, and until the checkpoint that is saved after the first step."""
    run_dir = folder / "runs" / name
    overrides = ["stage=baseline", f"run_dir={run_dir}", "train.save_every_steps=1"]
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "kd_pipeline", "train", "-c", str(CONFIG), *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        output, first_line_s = b"", None
        try:
            while not list(run_dir.glob("**/*.ckpt")):
                output += process.stdout.read() or b""
                if output and first_line_s is None:
                    first_line_s = time.perf_counter() - started
                if process.poll() is not None or time.perf_counter() - started > TIMEOUT_S:
                    sys.exit(f"{checkout} does not train:\n{(output + (process.stdout.read() or b'')).decode()}")
                time.sleep(0.005)
            first_step_s = time.perf_counter() - started
        finally:
            process.kill()
    return first_step_s if first_line_s is None else first_line_s, first_step_s


def commit_of(checkout: Path) -> str:
    """Its commit, with a mark where files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def spread(seconds: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
