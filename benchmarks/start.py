"""Time from typing `kd-pipeline train` to its first line, the end of its imports and its first step, on the digits.

    python -m benchmarks.start
    python -m benchmarks.start --against ../another-checkout

It measures the student alone (`baseline`) and with a trained teacher (`distill`). With `--against`, the runs of both
checkouts take turns on the same machine, which is how two commits are compared.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.checkouts import (
    TIMEOUT_S,
    command_of,
    commit_of,
    environment_of,
    phases,
    read_options,
    write_results,
)
from kd_pipeline.workflows.demo import write_digits

STAGES = ("baseline", "distill")


class Start(NamedTuple):
    """Seconds of one run, since the command was typed."""

    first_line_s: float
    imports_done_s: float
    """To the first file in the run's folder, which is made before anything is opened."""
    first_step_s: float
    """To the checkpoint that is saved after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one line for each checkout and stage, and write JSON where it was asked for."""
    options, checkouts = read_options(__doc__, arguments)
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
        print(f"{commit_of(checkout)}, {stage}: {phases(columns)}")
    write_results(options.out, results)


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


if __name__ == "__main__":
    main()
