"""Measure how start, memory and resuming of a loader grow with the number of samples, and with the number of ranks."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.scale_data import link_folder, link_shards, write_images, write_list
from benchmarks.scale_worker import RESUME_AT, DataTask, Kind, StartSample, run_ranks, start_in_process
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import environment, format_table, prepare_out, save_result, spread
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.errors import ConfigError

_COUNTS = {
    "folders": "images in folders; none to measure no folder (default: 1000000)",
    "shards": "samples in tar shards; none to measure no shards (default: 1000000)",
    "ranks": "numbers of processes that share one list; none for no sharing (default: 1 2 4)",
}
"""Options that may have no value."""
_SETTLE_S = 61.0
"""How long a folder must be unchanged before an index of it is kept, and a bit."""
_ENTRY_BYTES = 38
"""Of a line of a list."""
_DISK_FACTOR = 2.5
"""Bytes on disk for each byte of a list: the list, its index, and some space to spare."""


class BenchScaleSettings(Settings):
    """Which sizes are measured."""

    root: Path | None = None
    """Images in class folders, of which small copies are made. Defaults to `data/photographs`, which is created if it
    does not exist."""
    sizes: tuple[PositiveInt, ...] = Field(default=(10**3, 10**4, 10**5, 10**6, 10**7), min_length=1)
    """Entries in the lists."""
    folders: tuple[Annotated[int, Field(gt=0, le=15_000_000)], ...] = (10**6,)
    """Images in folders; each is a hard link to one of 250 files, and a file system has a limit of these."""
    shards: tuple[PositiveInt, ...] = (10**6,)
    """Samples in tar shards of 10,000, each a hard link to the first; 10**8 need 5 GB of disk and 10 GB of memory."""
    ranks: tuple[PositiveInt, ...] = (1, 2, 4)
    """Numbers of processes that share one list."""
    ranks_size: int = Field(default=10**5, gt=0)
    """Entries in the list that they share."""
    batch_size: int = Field(default=256, gt=0)
    """Images in a batch."""
    num_batches: int = Field(default=100, gt=0)
    """Timed batches of each rank in each repeat."""
    repeats: int = Field(default=3, gt=0)
    """How often each row is measured."""
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of DALI, divided among the ranks; defaults to the cores this process may use."""
    out: Path | None = None
    """JSON file for the result."""


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """What data of one kind and size costs."""

    kind: Kind
    num_samples: int
    list_bytes: int
    """0 for what is no list."""
    index_bytes: int
    """Of the cached index; 0 for data too small to have one."""
    first: StartSample
    """Of the first process, which parses the list, scans the folder or indexes the first shard."""
    again: tuple[StartSample, ...]
    """Of later processes, which find the index."""

    def median(self, value: Callable[[StartSample], float]) -> float:
        """Of a value over the later processes."""
        return median(map(value, self.again))


@dataclass(frozen=True, slots=True)
class RanksRow:
    """How fast so many ranks are that share a list at the same time."""

    num_ranks: int
    num_threads: int
    """Of DALI, in each rank."""
    images_per_s: tuple[tuple[float, ...], ...]
    """By repeat and rank."""
    peak_memory_bytes: tuple[int, ...]
    """By rank."""

    @property
    def total(self) -> tuple[float, ...]:
        """Images per second of all ranks together, by repeat."""
        return tuple(map(sum, self.images_per_s))


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """All rows, the settings and the environment."""

    sizes: tuple[ScaleRow, ...]
    ranks: tuple[RanksRow, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def table(self) -> str:
        """Plain text: a line for each size and each number of ranks, and below them what the numbers are."""
        resume = [f"resume {share:.0%} s" for share in RESUME_AT]
        header = ["data", "samples", "first open s", "open s", "first batch s", "both s", "fingerprint s", *resume]
        header += ["order s", "plan ms/batch", "state bytes", "peak MiB"]
        sizes = [
            [
                f"{row.kind:10}",
                f"{row.num_samples:,}",
                f"{row.first.open_s:.2f}",
                f"{row.median(lambda it: it.open_s):.2f}",
                f"{row.median(lambda it: it.first_batch_s):.2f}",
                f"{row.median(lambda it: it.open_s + it.first_batch_s):.2f}",
                f"{row.median(lambda it: it.fingerprint_s):.2f}",
                f"{row.median(lambda it: it.resume_s[0]):.2f}",
                f"{row.median(lambda it: it.resume_s[1]):.2f}",
                f"{row.median(lambda it: it.order_s):.2f}",
                f"{1000 * row.median(lambda it: it.plan_s):.3f}",
                f"{row.again[0].state_bytes:,}",
                f"{max(it.peak_memory_bytes for it in row.again) / 2**20:,.0f}",
            ]
            for row in self.sizes
        ]
        ranks_header = (
            "ranks",
            "threads each",
            "images/s in all",
            "lowest",
            "highest",
            "slowest rank",
            "peak MiB each",
        )
        ranks = [
            (
                f"{row.num_ranks:10}",
                str(row.num_threads),
                f"{median(row.total):,.0f}",
                f"{min(row.total):,.0f}",
                f"{max(row.total):,.0f}",
                f"{median(min(rates) for rates in row.images_per_s):,.0f}",
                f"{max(row.peak_memory_bytes) / 2**20:,.0f}",
            )
            for row in self.ranks
        ]
        note = (
            f"Medians of {len(self.sizes[0].again)} processes or repeats on {self.environment['num_cores']} core(s), "
            "without imports. First open: a list is parsed, a folder scanned, one shard indexed; open: the index is "
            "found, from lists of a megabyte and folders of 16,384 images on."
        )
        return "\n".join([*format_table(header, sizes), "", *format_table(ranks_header, ranks), note])

    def to_json(self) -> str:
        """Everything, including every process and repeat."""
        spreads = ("open_s", "first_batch_s", "fingerprint_s", "order_s", "plan_s", "peak_memory_bytes")
        sizes = []
        for row in self.sizes:
            again = {name: spread([getattr(start, name) for start in row.again]) for name in spreads}
            for number, share in enumerate(RESUME_AT):
                again[f"resume_at_{share:.0%}_s"] = spread([start.resume_s[number] for start in row.again])
            sizes.append(asdict(row) | {"again": again | {"state_bytes": row.again[0].state_bytes}})
        ranks = [asdict(row) | {"total_images_per_s": spread(row.total)} for row in self.ranks]
        found = {"sizes": sizes, "ranks": ranks, "settings": self.settings, "environment": self.environment}
        return json.dumps(found, indent=2)


def bench_scale(settings: BenchScaleSettings, *, report: Callable[[str], object] = lambda line: None) -> ScaleResult:
    """Measure what lists of growing size cost before, at and after the first batch, and how ranks share one.

    The lists are CSV files in a temporary folder, with paths and class names that refer to the same 250 small JPEG
    files over and over, folders have hard links to these, and shards are hard links to one: this makes no difference to
    an index, and decoding is not what is measured. What was just written is in memory; after a restart of the machine,
    reading the list or the index adds to the times. The first process looks through one shard only.

    Each start happens in a new process, which has its own memory; imports are not timed. The first process finds no
    index, and the others find the one it leaves. Ranks run at the same time, one process each, with the threads
    divided among them; they begin each repeat together and take equally many batches.

    Raises:
        ConfigError: `out` is a folder, or the disk has too little space for the largest list.
        DataError: the folder has no images, or a process was killed.
        MissingPackageError: scikit-learn is needed for the photographs and not installed.
    """
    prepare_out(settings.out)
    root = photographs(settings.root, report)
    num_threads = settings.num_threads or num_cores()
    with tempfile.TemporaryDirectory(prefix="kd_pipeline-bench-") as temporary:
        folder = Path(temporary)
        images = write_images(folder / "photographs", root)
        _check_disk(folder, max(*settings.sizes, settings.ranks_size))
        sizes = []
        samples: dict[Kind, tuple[int, ...]] = {
            "list": settings.sizes, "folder": settings.folders, "shards": settings.shards
        }  # fmt: skip
        for kind, size in ((kind, size) for kind, counts in samples.items() for size in counts):
            task = _prepare(folder, kind, images, size, settings.batch_size, num_threads)
            sizes.append(_measure_size(task, size, settings.repeats, report))
        ranks = []
        for num_ranks in settings.ranks:
            own = max(1, num_threads // num_ranks)
            task = _prepare(folder, "list", images, settings.ranks_size, settings.batch_size, own)
            rates, memory = run_ranks(task, num_ranks, num_batches=settings.num_batches, repeats=settings.repeats)
            ranks.append(RanksRow(num_ranks, own, rates, memory))
            report(f"{num_ranks} rank(s), images/s: {', '.join(f'{total:,.0f}' for total in ranks[-1].total)}")
    used = {"root": str(root), "num_threads": num_threads}
    result = ScaleResult(tuple(sizes), tuple(ranks), settings.model_dump(mode="json") | used, environment())
    save_result(settings.out, result.to_json, report)
    return result


def _check_disk(folder: Path, num_entries: int) -> None:
    list_bytes = num_entries * _ENTRY_BYTES
    needed, free = round(_DISK_FACTOR * list_bytes), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"sizes: a list of {list_bytes / 1e9:.1f} GB and its index need {needed / 1e9:.1f} GB in {folder.parent}, "
            f"and {free / 1e9:.1f} GB are free; omit the largest size, or set TMPDIR to a folder on a larger disk"
        )


def _prepare(
    folder: Path, kind: Kind, images: Sequence[Path], size: int, batch_size: int, num_threads: int
) -> DataTask:
    """Make data of a kind and size; what there was in its place is left."""
    path = folder / (f"{size}.csv" if kind == "list" else f"{kind} of {size}")
    if kind == "list":
        write_list(path, images, size)
    elif kind == "folder":
        link_folder(path, images, size)
        time.sleep(_SETTLE_S)
    else:
        path = link_shards(path, images, size)
    return DataTask(path, folder / f"cache of {kind} {size}", batch_size, num_threads, kind)


def _measure_size(task: DataTask, num_samples: int, repeats: int, report: Callable[[str], object]) -> ScaleRow:
    starts = []
    for number in range(1 + repeats):
        starts.append(start_in_process(task, number))
        last = starts[-1]
        report(
            f"{task.kind} of {num_samples:,}, process {number + 1} of {1 + repeats}: open {last.open_s:.2f} s, "
            f"first batch {last.first_batch_s:.2f} s"
        )
    index_bytes = sum(path.stat().st_size for path in task.cache.rglob("*.index"))
    list_bytes = task.path.stat().st_size if task.kind == "list" else 0
    if task.kind == "list":
        task.path.unlink()
    else:
        shutil.rmtree(task.path if task.kind == "folder" else task.path.parent)
    shutil.rmtree(task.cache, ignore_errors=True)
    return ScaleRow(task.kind, num_samples, list_bytes, index_bytes, starts[0], tuple(starts[1:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("scale", __doc__, BenchScaleSettings, left_out=_COUNTS)
    for name, text in _COUNTS.items():
        parser.add_argument(f"--{name}", nargs="*", metavar="N", help=text)
    return run_benchmark(parser, BenchScaleSettings, bench_scale, arguments)


if __name__ == "__main__":
    sys.exit(main())
