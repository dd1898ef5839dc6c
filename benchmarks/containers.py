"""Compare the speed of loading the same images from files, tar shards, Parquet and over HTTP, beside other loaders.

The other loaders are webdataset (BSD-3-Clause), mosaicml-streaming and litdata (Apache-2.0), of which those that are
installed get rows. The second asks for an old NumPy and SDKs of all clouds, but needs neither here:

    pip install webdataset litdata
    pip install --no-deps mosaicml-streaming
    pip install Brotli python-snappy zstd catalogue
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field, field_validator

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.container_files import WRITERS, read_images
from benchmarks.container_rows import ROWS, ContainerTask, Row
from benchmarks.file_server import FileServer, serving
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.bench.measure import (
    Candidate,
    Measurement,
    environment,
    format_table,
    measure,
    prepare_out,
    round_up,
    save_result,
    spread,
)
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.bench.torchvision_loaders import PREFETCH, Stream
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.views import Views

_PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}
"""Modules of other loaders and the packages that have them."""


class BenchContainersSettings(Settings):
    """How the containers are compared."""

    root: Path | None = None
    """JPEG files in class folders, few enough for the page cache; defaults to `data/photographs`, which is created if
    it does not exist."""
    rows: tuple[str, ...] = ()
    """Names of the rows to measure beside the first; defaults to all whose packages are installed."""
    batch_size: int = Field(default=64, gt=0)
    """Images in a batch."""
    size: int = Field(default=224, gt=0)
    """Height and width of the transformed images."""
    num_batches: int = Field(default=16, gt=0)
    """Timed batches of each row in each repeat, rounded up to a multiple of the threads."""
    repeats: int = Field(default=5, gt=0)
    """How often each row is measured."""
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of DALI and worker processes of torch; defaults to the cores this process may use."""
    num_shards: int = Field(default=8, gt=0)
    """Shards of each container that are files."""
    num_links: int = Field(default=20, gt=0)
    """Names of each shard in the dataset, so that what was downloaded under one is not read again under another. Many
    repeats need more of them to stay within an epoch."""
    latency_ms: float = Field(default=20.0, ge=0)
    """Time that the HTTP server waits before it answers a request."""
    out: Path | None = None
    """JSON file for the result."""

    @field_validator("rows")
    @classmethod
    def _knows_the_rows(cls, rows: tuple[str, ...]) -> tuple[str, ...]:
        names = [row.name for row in ROWS]
        for name in rows:
            if name not in names:
                raise ValueError(f"there is no row {name!r}{suggest(name, names)}")
        return rows


@dataclass(frozen=True, slots=True)
class ContainersResult:
    """All rows, the first of which reads the files, the settings and the environment."""

    rows: tuple[Measurement, ...]
    orders: Mapping[str, str]
    """Of the samples, for each row."""
    server_s_per_image: Mapping[str, float]
    """CPU seconds of the HTTP server, for each row."""
    left_out: Mapping[str, str]
    """Rows that were not measured, and why."""
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def ratios(self, row: Measurement) -> list[float]:
        """How many times as fast as the files, in each repeat."""
        return [own / files for own, files in zip(row.images_per_s, self.rows[0].images_per_s, strict=True)]

    def table(self) -> str:
        """Plain text: a line for each row, and below them what the numbers are."""
        header = ("", "images/s", "times files", "lowest", "highest", "CPU ms/image", "server ms/image", "order")
        rows = [
            (
                row.name,
                f"{median(row.images_per_s):,.0f}",
                f"{median(self.ratios(row)):.3f}",
                f"{min(self.ratios(row)):.3f}",
                f"{max(self.ratios(row)):.3f}",
                f"{1000 * median(row.cpu_s_per_image):.2f}",
                f"{1000 * self.server_s_per_image[row.name]:.2f}",
                self.orders[row.name],
            )
            for row in self.rows
        ]
        note = (
            f"Medians of {len(self.rows[0].images_per_s)} interleaved repeats on {self.environment['num_cores']} "
            "core(s). Times files: as fast as the files in the same repeat, with the lowest and the highest. Over HTTP "
            f"no sample is read twice, an answer takes {self.settings['latency_ms']:g} ms, and the server runs on the "
            "same cores."
        )
        left_out = [f"no row {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*format_table(header, rows), *left_out, note])

    def to_json(self) -> str:
        """Everything, including every repeat."""
        rows = []
        for row in self.rows:
            numbers = {name: spread(value) for name, value in asdict(row).items() if name != "name"}
            rows.append(
                {
                    "name": row.name,
                    "order": self.orders[row.name],
                    **numbers,
                    "times_files": spread(self.ratios(row)),
                    "server_s_per_image": self.server_s_per_image[row.name],
                }
            )
        whole = {"rows": rows, "left_out": self.left_out, "settings": self.settings, "environment": self.environment}
        return json.dumps(whole, indent=2)


def bench_containers(
    settings: BenchContainersSettings, *, report: Callable[[str], object] = lambda line: None
) -> ContainersResult:
    """Measure how fast batches `[N, 3, size, size]` float32 come from each container; `report` receives progress.

    All rows do the work of `benchmarks.loader` on the CPU: random resized crop with an antialiased bilinear filter,
    horizontal flip, normalize, in full batches, without end. In which order they read is part of the result, as most of
    the others cannot read single samples. The containers are written into a temporary folder.

    Raises:
        ConfigError: `out` is a folder.
        DataError: the folder has files other than JPEG.
        MissingPackageError: a package of the extra `bench`, or one that writes a container, is not installed.
    """
    prepare_out(settings.out)
    root = photographs(settings.root, report)
    images = read_images(root, num_shards=settings.num_shards, num_links=settings.num_links)
    left_out = _why_missing()
    for name, reason in left_out.items():
        report(f"no row {name}: {reason}")
    rows = [row for row in ROWS if row.name not in left_out]
    if settings.rows:
        rows = [row for row in rows if row is ROWS[0] or row.name in settings.rows]
    num_threads = settings.num_threads or num_cores()
    with tempfile.TemporaryDirectory(prefix="kd_pipeline-containers-") as temporary:
        folder = Path(temporary)
        for container in sorted({row.container for row in rows if row.container}):
            report(f"writing {container}: {len(images.content):,} images, {settings.num_links} links to each shard")
            (folder / "data" / container).mkdir(parents=True)
            WRITERS[container](images, folder / "data" / container)
        with serving(folder / "data", latency_s=settings.latency_ms / 1000) as server:
            task = ContainerTask(
                root,
                TrainTransform(size=settings.size),
                settings.batch_size,
                num_threads,
                torch.device("cpu"),
                images,
                folder / "data",
                server.url,
                folder / "cache",
            )
            measured, server_s = _measure(settings, rows, task, server, report)
    used = {"root": str(root), "num_threads": num_threads}
    result = ContainersResult(
        tuple(measured),
        {row.name: row.order for row in rows},
        server_s,
        left_out,
        settings.model_dump(mode="json") | used,
        environment() | {"packages": _versions()},
    )
    save_result(settings.out, result.to_json, report)
    return result


def _measure(
    settings: BenchContainersSettings,
    rows: Sequence[Row],
    task: ContainerTask,
    server: FileServer,
    report: Callable[[str], object],
) -> tuple[list[Measurement], dict[str, float]]:
    """Measure the rows; also the server's CPU seconds for each image of each."""
    views, num_threads = Views.of(task.transform), task.num_threads
    at_once = math.lcm(num_threads, group_size(task.batch_size, views, num_threads=num_threads, on_gpu=False))
    with ExitStack() as stack:
        streams = {}
        for number, row in enumerate(rows):
            cache = task.cache / str(number)
            cache.mkdir(parents=True)
            stream = stack.enter_context(closing(row.open_stream(replace(task, cache=cache))))
            streams[row.name] = _Counted(stream, server)
        measured = measure(
            [Candidate(name, stream.run) for name, stream in streams.items()],
            repeats=settings.repeats,
            num_batches=round_up(settings.num_batches, at_once),
            num_warm_up=(PREFETCH + 2) * at_once,  # as in `benchmarks.loader`
            report=report,
        )
    return measured, {name: stream.server_s / stream.num_images for name, stream in streams.items()}


class _Counted:
    """A stream, and what the server did for it."""

    def __init__(self, stream: Stream, server: FileServer) -> None:
        self._stream, self._server = stream, server
        self.server_s, self.num_images = 0.0, 0

    def run(self, num_batches: int) -> int:
        """Take so many batches and return the number of images in them."""
        before_s = self._server.cpu_s()
        num_images = sum(len(next(self._stream)) for _ in range(num_batches))
        self.server_s += self._server.cpu_s() - before_s
        self.num_images += num_images
        return num_images


def _why_missing() -> dict[str, str]:
    """Rows whose packages are not installed."""
    missing = {module: package for module, package in _PACKAGES.items() if find_spec(module) is None}
    return {row.name: f"{missing[row.package]} is not installed" for row in ROWS if row.package in missing}


def _versions() -> dict[str, str]:
    return {package: version(package) for module, package in _PACKAGES.items() if find_spec(module) is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("containers", __doc__, BenchContainersSettings)
    return run_benchmark(parser, BenchContainersSettings, bench_containers, arguments)


if __name__ == "__main__":
    sys.exit(main())
