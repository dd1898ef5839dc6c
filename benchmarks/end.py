"""Time from the last checkpoint of `kd-pipeline train` to its results, its last line and the end of its process.

    python -m benchmarks.end
    python -m benchmarks.end --against ../another-checkout

On the digits. With `--against`, the runs of both checkouts take turns on the same machine, which is how two commits are
compared.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


class End(NamedTuple):
    """Seconds from the last checkpoint, which is written after the last step and its validation."""

    result_s: float
    """To the line with the metrics."""
    last_line_s: float
    """To the line with the run folder."""
    exit_s: float
    """To the end of the process."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one line for each checkout, and write JSON where it was asked for."""
    options, checkouts = read_options(__doc__, arguments)
    ends: dict[Path, list[End]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "data", "digits"))
        for repeat in range(options.repeats + 1):
            for checkout in checkouts:
                measured = end_once(checkout, Path(folder), f"{checkouts.index(checkout)}-{repeat}")
                if repeat:  # the first run of each fills the page cache
                    ends[checkout].append(measured)
    results = []
    for checkout in checkouts:
        columns = dict(zip(End._fields, map(list, zip(*ends[checkout], strict=True)), strict=True))
        results.append({"commit": commit_of(checkout), **columns})
        print(f"{commit_of(checkout)}: {phases(columns)}")
    write_results(options.out, results)


def end_once(checkout: Path, folder: Path, name: str) -> End:
    """One run."""
    run_dir = folder / "runs" / name
    with subprocess.Popen(
        [*command_of("train"), "stage=baseline", f"run_dir={run_dir}"],
        cwd=folder,
        env=environment_of(checkout),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        # Wall time, because it is compared with the time of a file.
        seen = [(time.time(), line) for line in process.stdout]
        status = process.wait(TIMEOUT_S)
        ended = time.time()
    result = [when for when, line in seen if line.startswith(("val ", "baseline on val"))]  # earlier commits
    last = [when for when, line in seen if line.startswith("run folder")]
    if status or not result or not last:
        sys.exit(f"{checkout} does not train: status {status}\n{''.join(line for _, line in seen)}")
    saved = (run_dir / "baseline" / "checkpoints" / "last.ckpt").stat().st_mtime
    return End(result[0] - saved, last[0] - saved, ended - saved)


if __name__ == "__main__":
    main()
