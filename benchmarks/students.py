"""Compare a run of several students with runs of each alone: the loader and the teacher should be paid for once."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from pydantic import Field

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.loader import read_all
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import environment, format_table, prepare_out, rotated, save_result, spread
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.config.config import Config
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows import train

_LOADER, _TOGETHER = "loader and teacher", "all students"


class BenchStudentsSettings(Settings):
    """How a run of several students is measured."""

    root: Path | None = None
    """JPEG files in class folders; defaults to `data/photographs`, which is created if it does not exist."""
    batch_size: int = Field(default=32, gt=0)
    """Images in a batch."""
    size: int = Field(default=96, gt=0)
    """Height and width of the images."""
    widths: tuple[int, ...] = (16, 24, 32)
    """Of the students, each a small ResNet."""
    teacher_width: int = Field(default=16, gt=0)
    """Of the teacher, one too."""
    num_batches: int = Field(default=12, gt=0)
    """Batches of an epoch."""
    epochs: int = Field(default=4, gt=0)
    """Timed epochs. Each measurement is a run of one epoch more, less a run of one epoch."""
    repeats: int = Field(default=5, gt=0)
    """How often each row is measured."""
    device: str = "auto"
    """Where the runs train: `cpu`, `cuda`, or `auto` for a GPU if there is one."""
    out: Path | None = None
    """JSON file for the result."""


class _Cost(NamedTuple):
    """Of the timed epochs."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class StudentsResult:
    """Costs of a batch in each repeat, by row, and the environment."""

    wall_s: Mapping[str, Sequence[float]]
    cpu_s: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def ratios(self, costs: Mapping[str, Sequence[float]]) -> list[float]:
        """The run of all, divided by loader and teacher once and what each student adds to them, in each repeat."""
        alone = [name for name in costs if name not in (_LOADER, _TOGETHER)]
        return [
            together / (shared + sum(costs[name][repeat] - shared for name in alone))
            for repeat, (together, shared) in enumerate(zip(costs[_TOGETHER], costs[_LOADER], strict=True))
        ]

    def table(self) -> str:
        """Plain text: a line for each row, and below them the ratios."""
        rows = [
            (name, f"{1000 * median(wall):.1f}", f"{1000 * median(self.cpu_s[name]):.1f}")
            for name, wall in self.wall_s.items()
        ]
        lines = [*format_table(("", "ms/batch", "CPU ms/batch"), rows)]
        for what, costs in (("time", self.wall_s), ("CPU time", self.cpu_s)):
            ratios = self.ratios(costs)
            lines.append(
                f"{what} of all students, divided by loader and teacher once and what each student adds to them: "
                f"{median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
            )
        where = f"{self.environment['num_cores']} core(s), {self.settings['device']}"
        lines.append(f"Medians of {len(self.wall_s[_LOADER])} repeats on {where}.")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, including every repeat."""
        rows = [
            {"name": name, "wall_s": spread(self.wall_s[name]), "cpu_s": spread(self.cpu_s[name])}
            for name in self.wall_s
        ]
        ratios = {"time": spread(self.ratios(self.wall_s)), "cpu_time": spread(self.ratios(self.cpu_s))}
        return json.dumps(
            {"rows": rows, "ratios": ratios, "settings": self.settings, "environment": self.environment}, indent=2
        )


def bench_students(
    settings: BenchStudentsSettings, *, report: Callable[[str], object] = lambda line: None
) -> StudentsResult:
    """Measure runs of `train`; `report` receives lines of progress.

    Raises:
        ConfigError: `out` is a folder, or the device does not exist.
        DataError: there are too few images for an epoch.
    """
    prepare_out(settings.out)
    root = photographs(settings.root, report)
    report(f"{read_all(root):,} files read once, so every run finds them in the page cache")
    names = [_LOADER, *(f"width {width}" for width in settings.widths), _TOGETHER]
    costs: dict[str, list[_Cost]] = {name: [] for name in names}
    device = resolve_device(settings.device)
    used = settings.model_dump(mode="json") | {"root": str(root), "device": str(device)}
    for repeat in range(settings.repeats):
        for name in rotated(names, repeat):
            short, long = (_cost(settings, root, name, epochs) for epochs in (1, 1 + settings.epochs))
            num_batches = settings.epochs * settings.num_batches
            costs[name].append(_Cost(*((more - less) / num_batches for more, less in zip(long, short, strict=True))))
        report(f"repeat {repeat + 1} of {settings.repeats} done")
        result = StudentsResult(
            {name: [cost.wall_s for cost in each] for name, each in costs.items()},
            {name: [cost.cpu_s for cost in each] for name, each in costs.items()},
            used,
            environment(),
        )
        save_result(settings.out, result.to_json, report)
    return result


def _cost(settings: BenchStudentsSettings, root: Path, name: str, epochs: int) -> _Cost:
    """Of a whole run of a row."""
    with tempfile.TemporaryDirectory() as folder:
        widths = settings.widths if name in (_LOADER, _TOGETHER) else (int(name.removeprefix("width ")),)
        config = _config(settings, root, Path(folder) / "run", widths, epochs)
        started, cpu_started = time.perf_counter(), time.process_time()
        if name == _LOADER:
            with KDDataLoader.from_config(config) as loader:
                for _ in range(epochs):
                    for number, _ in enumerate(loader, start=1):
                        if number == settings.num_batches:
                            break
                if loader.device.type == "cuda":
                    torch.cuda.synchronize(loader.device)  # the teacher's outputs are finished, not just queued
        else:
            train(config)
        return _Cost(time.perf_counter() - started, time.process_time() - cpu_started)


def _config(settings: BenchStudentsSettings, root: Path, run_dir: Path, widths: Iterable[int], epochs: int) -> Config:
    networks = {f"width{width}": {"builtin": "small_resnet", "kwargs": {"width": width}} for width in widths}
    student = {"students": networks} if len(networks) > 1 else {"student": next(iter(networks.values()))}
    return Config.model_validate({
        "run_dir": run_dir,
        "data": {
            "device": settings.device,
            "batch_size": settings.batch_size,
            "train": {
                "source": {"kind": "image_folder", "root": root},
                "transform": {"preset": "train", "size": settings.size},
            },
        },
        "teacher": {
            "model": {"builtin": "small_resnet", "pretrained": False, "kwargs": {"width": settings.teacher_width}}
        },
        "probe": None,
        **student,
        "train": {
            "epochs": epochs,
            "limit_train_batches": settings.num_batches,
            "loggers": ["csv"],
            "export": {"onnx": False},
        },
    })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("students", __doc__, BenchStudentsSettings)
    return run_benchmark(parser, BenchStudentsSettings, bench_students, arguments)


if __name__ == "__main__":
    sys.exit(main())
