"""Time from typing `kd-pipeline train` to its first line, the end of its imports and its first step, on the digits.

    python -m benchmarks.start
    python -m benchmarks.start --against ../another-checkout

It measures the student alone (`baseline`) and with a trained teacher (`distill`). With `--against`, the runs of both
checkouts take turns on the same machine, which is how two commits are compared.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline.workflows.demo import write_digits

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_all_stages.yaml"
STAGES = ("baseline", "distill")
TIMEOUT_S = 300.0


class Start(NamedTuple):
    """Seconds of one run, since the command was typed."""

    first_line_s: float
    imports_done_s: float
    """To the first file in the run's folder, which is made before anything is opened."""
    first_step_s: float
    """To the checkpoint that is saved after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one line for each checkout and stage, and write JSON where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this repository, to be measured in turn")
    parser.add_argument("--out", type=Path, help="a JSON file for every repeat")
    options = parser.parse_args(arguments)
    if options.out:
        prepare_output(options.out)
    checkouts = [ROOT, *([options.against.resolve()] if options.against else [])]
    times: dict[tuple[Path, str], list[Start]] = {pair: [] for pair in product(checkouts, STAGES)}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "data", "digits"))
        teachers = [train_teacher(checkout, Path(folder)) for checkout in checkouts]
        for repeat in range(options.repeats + 1):
            for checkout, stage in times:
                number = checkouts.index(checkout)
                run_dir = Path(folder, "runs", f"{number}-{stage}-{repeat}")
                if stage == "distill":
                    shutil.copytree(teachers[number], run_dir / "teacher")
                start = start_once(checkout, Path(folder), stage, run_dir)
                if repeat:  # the first run of each fills the page cache, and writes the byte code of the modules
                    times[checkout, stage].append(start)
    results = []
    for (checkout, stage), starts in times.items():
        columns = {name: [getattr(start, name) for start in starts] for name in Start._fields}
        results.append({"commit": commit_of(checkout), "stage": stage, **columns})
        phases = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {spread(columns[name])}" for name in columns)
        print(f"{commit_of(checkout)}, {stage}: {phases}")
    if options.out:
        environment = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        write_output(options.out, json.dumps({"environment": environment, "results": results}, indent=2) + "\n")


def train_teacher(checkout: Path, folder: Path) -> Path:
    """Train the teacher for a few steps, and return its folder; how good it is does not matter."""
    run_dir = folder / "teachers" / commit_of(checkout)
    overrides = ["stage=teacher", f"run_dir={run_dir}", "train.epochs=2", "train.limit_train_batches=2"]
    command = [*command_of("train"), *overrides]
    done = subprocess.run(command, cwd=folder, env=environment_of(checkout), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout} does not train its teacher:\n{done.stderr}")
    return run_dir / "teacher"


def start_once(checkout: Path, folder: Path, stage: str, run_dir: Path) -> Start:
    """The times of one run, which is killed at the checkpoint that is saved after its first step."""
    overrides = [f"stage={stage}", f"run_dir={run_dir}", "train.save_every_steps=1"]
    found: dict[str, float] = {}
    started = time.perf_counter()
    with subprocess.Popen(
        [*command_of("train"), *overrides],
        cwd=folder,
        env=environment_of(checkout),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        output = b""
        try:
            while "first_step_s" not in found:
                output += process.stdout.read() or b""
                now_s = time.perf_counter() - started
                for name, has_happened in (
                    ("first_line_s", bool(output)),
                    ("imports_done_s", any(path.name != "teacher" for path in run_dir.glob("*"))),
                    ("first_step_s", any("teacher" not in path.parts for path in run_dir.glob("**/*.ckpt"))),
                ):
                    if has_happened:
                        found.setdefault(name, now_s)
                if process.poll() is not None or now_s > TIMEOUT_S:
                    sys.exit(f"{checkout} does not train:\n{(output + (process.stdout.read() or b'')).decode()}")
                time.sleep(0.005)
        finally:
            process.kill()
    return Start(**{name: found.get(name, found["first_step_s"]) for name in Start._fields})


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


def spread(seconds: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
