"""Compare `kd-pipeline train` with timm's `train.py --kd-*`, and parts of kd_pipeline with lightly-train, on CPUs.

    python -m benchmarks.peers --timm-script pytorch-image-models/train.py --lightly-python lightly/bin/python

The programs of others are run where they are installed, and never imported; without them, their rows are left out. See
`benchmarks.peers_rows` for what is run, and `benchmarks.peers_process` for how it is measured.
"""

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.peers_process import MIN_STEPS, ProgramOptions, ProgramRun, run_program, run_untimed
from benchmarks.peers_result import PeersResult, PeersRow
from benchmarks.peers_rows import (
    LIGHTLY,
    NAMES,
    TIMM,
    Materials,
    Row,
    environment_of,
    make_materials,
    make_rows,
    record_row,
    versions,
    why_missing,
)
from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.bench.measure import environment, prepare_out, rotated, save_result
from kd_pipeline.errors import KDPipelineError


class BenchPeersSettings(Settings):
    """What is compared."""

    timm_script: Path | None = None
    """The `train.py` of pytorch-image-models, which runs with the timm of this environment."""
    lightly_python: Path | None = None
    """The Python of an environment in which lightly-train and timm are installed."""
    rows: tuple[str, ...] = NAMES
    """Names of the rows to measure; defaults to all of `benchmarks.peers_rows.NAMES`."""
    repeats: int = Field(default=3, gt=0)
    """How often each row is measured after a first run with cold caches."""
    steps: int = Field(default=12, ge=MIN_STEPS)
    """Optimizer steps of a run. With few of them no teacher is worth an export to a faster runtime."""
    batch_size: int = Field(default=32, gt=1)
    """Images in a batch."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds after which a run is stopped."""
    out: Path | None = None
    """JSON file for the result; a Markdown file beside it has the tables."""

    @model_validator(mode="after")
    def _knows_the_rows(self) -> Self:
        for name in self.rows:
            if name not in NAMES:
                raise ValueError(f"--rows: there is no {name}{suggest(name, NAMES)}")
        return self


def bench_peers(settings: BenchPeersSettings, *, report: Callable[[str], object] = lambda line: None) -> PeersResult:
    """Run all rows one after another, once with cold caches and then `repeats` times, in an order that rotates.

    A row that fails is left out from then on, and the result says why. The result is saved after each repeat.

    Raises:
        ConfigError: `out` is a folder.
        KDPipelineError: no row is left.
        MissingPackageError: timm or scikit-learn is not installed.
    """
    prepare_out(settings.out)
    if settings.out is not None:
        prepare_output(settings.out.with_suffix(".md"))
    left_out = why_missing(settings.rows, timm=settings.timm_script, lightly=settings.lightly_python)
    for program, reason in left_out.items():
        report(f"no rows of {program}: {reason}")
    timm = None if TIMM in left_out or settings.timm_script is None else settings.timm_script.absolute()
    lightly = None if LIGHTLY in left_out or settings.lightly_python is None else settings.lightly_python.absolute()
    with tempfile.TemporaryDirectory(prefix="kd_pipeline-peers-") as temporary:
        bench = _Bench(Path(temporary), settings, left_out, report)
        materials = make_materials(bench.folder, batch_size=settings.batch_size, num_steps=settings.steps)
        bench.rows = make_rows(materials, settings.rows, timm=timm, lightly=lightly)
        bench.record(materials)
        described = environment() | {"programs": versions(timm=timm, lightly=lightly)}
        for repeat in range(1 + settings.repeats):
            bench.run_all(repeat)
            if repeat:
                result = PeersResult(bench.measured(), left_out, settings.model_dump(mode="json"), described)
                save_result(settings.out, result.to_json, report)
                if settings.out is not None:
                    write_output(settings.out.with_suffix(".md"), result.markdown())
    return result


class _Bench:
    """The rows that are left, and what was measured of them."""

    def __init__(
        self, folder: Path, settings: BenchPeersSettings, left_out: dict[str, str], report: Callable[[str], object]
    ) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._settings, self._left_out, self._report = settings, left_out, report
        self._runs: dict[str, list[ProgramRun]] = {}

    def record(self, materials: Materials) -> None:
        """Record the teacher for the rows that need it, or drop them if that fails."""
        if not any(row.needs_recording for row in self.rows):
            return
        self._report("recording the teacher")
        row = record_row(materials)
        try:
            with self._empty_folder() as folder:
                run_untimed(row.command, **self._how(row, folder))
        except KDPipelineError as exc:
            for each in self.rows:
                if each.needs_recording:
                    self._drop(each, f"the teacher was not recorded: {exc}")

    def run_all(self, repeat: int) -> None:
        """Run all rows that are left, and drop those that fail."""
        for row in rotated(self.rows, repeat):
            try:
                with self._empty_folder() as folder:
                    run = run_program(row.command, num_steps=self._settings.steps, **self._how(row, folder))
            except KDPipelineError as exc:
                self._drop(row, str(exc))
                continue
            self._runs.setdefault(row.name, []).append(run)
            when = f"repeat {repeat} of {self._settings.repeats}" if repeat else "cold run"
            self._report(f"{when}, {row.name}: {self._described(run)}")
        if not self.rows:
            raise KDPipelineError("no row was measured: " + "; ".join(map(": ".join, self._left_out.items())))

    def measured(self) -> tuple[PeersRow, ...]:
        """The rows that are left with all their runs."""
        rows = []
        for row in self.rows:
            cold, *warm = self._runs[row.name]
            rows.append(PeersRow(row.name, row.program, row.options, cold, tuple(warm)))
        return tuple(rows)

    def _how(self, row: Row, folder: Path) -> ProgramOptions:
        environment = environment_of(row, self.folder / "caches" / row.name)
        return {"folder": folder, "environment": environment, "timeout_s": self._settings.timeout_s}

    def _drop(self, row: Row, reason: str) -> None:
        self.rows = [each for each in self.rows if each != row]
        self._left_out[row.name] = reason
        self._report(f"{row.name} is left out: {reason}")

    @contextmanager
    def _empty_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.folder) as folder:
            yield Path(folder)

    def _described(self, run: ProgramRun) -> str:
        return (
            f"{self._settings.batch_size / run.step_s:.1f} images/s, first step after {run.first_step_s:.1f} s, "
            f"end {run.end_s:.1f} s, {run.peak_memory_bytes / 2**30:.2f} GiB"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("peers", __doc__, BenchPeersSettings)
    return run_benchmark(parser, BenchPeersSettings, bench_peers, arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with the program that is running
    sys.exit(main())
