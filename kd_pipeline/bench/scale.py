"""How the cost of a loader grows with the number of files, and with the processes that share them."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from pydantic import Field, PositiveInt

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import environment, prepare_out, spread
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.bench.starts import RESUMED_AT, Case, Start, in_process, run_ranks
from kd_pipeline.data.sources.base import ImageFolder
from kd_pipeline.errors import ConfigError, DataError

__all__ = ["BenchScaleSettings", "RanksRow", "ScaleResult", "ScaleRow", "bench_scale"]

_NUM_FILES = 250
"""Real files that all entries of a list refer to."""
_NUM_CLASSES = 10
_FILE_SIZE = (64, 48)
"""Width and height of those: reading them is not what is measured."""
_DISK = 2.5
"""Bytes on disk for each byte of a list: the list and its index, and what is left free."""


class BenchScaleSettings(Settings):
    """Which sizes are tried."""

    root: Path | None = None
    """Images in class folders, of which small copies are made; `data/photographs`, which is made where it is not there
    yet, where left out."""
    sizes: tuple[PositiveInt, ...] = Field(default=(10**3, 10**4, 10**5, 10**6, 10**7), min_length=1)
    """Entries in the lists."""
    ranks: tuple[PositiveInt, ...] = (1, 2, 4)
    """Processes that share one list."""
    ranks_size: int = Field(default=10**5, gt=0)
    """Entries in the list that they share."""
    batch_size: int = Field(default=256, gt=0)
    num_batches: int = Field(default=100, gt=0)
    """Timed batches of each process that shares a list, in every repeat."""
    repeats: int = Field(default=3, gt=0)
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of DALI, shared among the processes; the cores this process may use where left out."""
    out: Path | None = None
    """JSON file for the result."""


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """What a list of one size costs."""

    num_entries: int
    list_bytes: int
    index_bytes: int
    """Of the index that is kept; 0 for a list that is so short that none is."""
    first: Start
    """The first process, which parses the list."""
    again: tuple[Start, ...]
    """Later ones, which find the index."""


@dataclass(frozen=True, slots=True)
class RanksRow:
    """How fast so many processes are that share a list at the same time."""

    num_ranks: int
    num_threads: int
    """Of DALI, in each."""
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
    """All rows, and the circumstances."""

    sizes: tuple[ScaleRow, ...]
    ranks: tuple[RanksRow, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def table(self) -> str:
        """Plain text: a line for each size and for each number of ranks, and below what the figures are."""
        early, late = (f"{share:.0%}" for share in RESUMED_AT)
        lines = [
            f"{'entries':>10}  first open s  open s  first batch s  both s  fingerprint s  resume {early} s  "
            f"resume {late} s  order s  plan ms/batch  state bytes  peak MiB"
        ]
        for row in self.sizes:
            lines.append(
                f"{row.num_entries:10,}  {row.first.open_s:12.2f}  {_median(row, lambda it: it.open_s):6.2f}  "
                f"{_median(row, lambda it: it.first_batch_s):13.2f}  "
                f"{_median(row, lambda it: it.open_s + it.first_batch_s):6.2f}  "
                f"{_median(row, lambda it: it.fingerprint_s):13.2f}  "
                f"{_median(row, lambda it: it.resume_s[0]):11.2f}  {_median(row, lambda it: it.resume_s[1]):12.2f}  "
                f"{_median(row, lambda it: it.order_s):7.2f}  {1000 * _median(row, lambda it: it.plan_s):13.3f}  "
                f"{row.again[0].state_bytes:11,}  {max(it.peak_memory_bytes for it in row.again) / 2**20:8,.0f}"
            )
        lines += ["", f"{'ranks':>10}  threads each  images/s in all  lowest  highest  slowest rank  peak MiB each"]
        for shared in self.ranks:
            slowest = median(min(rates) for rates in shared.images_per_s)
            lines.append(
                f"{shared.num_ranks:10}  {shared.num_threads:12}  {median(shared.total):15,.0f}  "
                f"{min(shared.total):6,.0f}  {max(shared.total):7,.0f}  {slowest:12,.0f}  "
                f"{max(shared.peak_memory_bytes) / 2**20:13,.0f}"
            )
        lines.append(
            f"Medians of {len(self.sizes[0].again)} processes or repeats on {self.environment['num_cores']} core(s), "
            "imports not counted. First open: the list is parsed; open: its index is found, from a megabyte on."
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, every process and repeat included."""
        sizes = [
            {
                "num_entries": row.num_entries,
                "list_bytes": row.list_bytes,
                "index_bytes": row.index_bytes,
                "first": asdict(row.first),
                "again": {
                    name: spread([getattr(start, name) for start in row.again])
                    for name in ("open_s", "first_batch_s", "fingerprint_s", "order_s", "plan_s", "peak_memory_bytes")
                }
                | {
                    f"resume_at_{share:.0%}_s": spread([start.resume_s[place] for start in row.again])
                    for place, share in enumerate(RESUMED_AT)
                }
                | {"state_bytes": row.again[0].state_bytes},
            }
            for row in self.sizes
        ]
        ranks = [asdict(row) | {"total_images_per_s": spread(row.total)} for row in self.ranks]
        found = {"sizes": sizes, "ranks": ranks, "settings": self.settings, "environment": self.environment}
        return json.dumps(found, indent=2)


def bench_scale(settings: BenchScaleSettings, *, report: Callable[[str], object] = lambda line: None) -> ScaleResult:
    """Measure what lists of growing size cost before, at and behind the first batch, and how ranks share one.

    The lists are CSV files, made in a temporary folder, of paths and class names that refer to the same 250 small
    JPEG files over and over: an index does not know the difference, and decoding is not what is measured. What was
    written just now is in memory; after a restart of the machine, reading the list or its index comes on top.

    Each start happens in a new process, so that its memory is its own, after all imports. The first one finds no
    index, and the others find what it left. Ranks run at the same time, a process each, with the threads divided
    among them; they begin each repeat together and go through equally many batches.

    Raises:
        ConfigError: `out` is a folder, or the disk has too little room for the largest list.
        DataError: the folder holds no images, or a process ended before it was done.
        MissingPackageError: scikit-learn is needed for the photographs and not installed.
    """
    prepare_out(settings.out)
    root = photographs(settings.root, report)
    num_threads = settings.num_threads or num_cores()
    with tempfile.TemporaryDirectory(prefix="kd_pipeline-bench-") as temporary:
        folder = Path(temporary)
        block = _write_images(folder / "photographs", root)
        _check_disk(folder, max(*settings.sizes, settings.ranks_size) * len(block) // _NUM_FILES)
        sizes = [_measure_size(settings, folder, block, number, num_threads, report) for number in settings.sizes]
        ranks = _measure_ranks(settings, folder, block, num_threads, report)
    settings_shown = settings.model_dump(mode="json") | {"root": str(root), "num_threads": num_threads}
    result = ScaleResult(tuple(sizes), tuple(ranks), settings_shown, environment())
    if settings.out is not None:
        settings.out.write_text(result.to_json() + "\n", encoding="utf-8")
    return result


def _write_images(folder: Path, root: Path) -> bytes:
    """Write small copies of images below `root`; return the lines of a list that refer to each once."""
    source, lines = ImageFolder(root, labeled=False), []
    for number in range(_NUM_FILES):
        original = source.name(number * len(source) // _NUM_FILES)
        name = f"class {number % _NUM_CLASSES}"
        path = folder / name / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Image.open(original) as image:
                image.convert("RGB").resize(_FILE_SIZE).save(path)
        except OSError as exc:
            raise DataError(f"{original}: Pillow cannot read it ({exc}); give another root") from exc
        lines.append(f"{path.relative_to(folder.parent)},{name}\n")
    return "".join(lines).encode()


def _check_disk(folder: Path, list_bytes: int) -> None:
    needed, free = round(_DISK * list_bytes), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"sizes: a list of {list_bytes / 1e9:.1f} GB and its index need {needed / 1e9:.1f} GB in {folder.parent}, "
            f"and {free / 1e9:.1f} GB are free; leave out the largest size, or set TMPDIR to a folder on a larger disk"
        )


def _write_list(folder: Path, block: bytes, num_entries: int, settings: BenchScaleSettings, num_threads: int) -> Case:
    path = folder / f"{num_entries}.csv"
    whole, rest = divmod(num_entries, _NUM_FILES)
    with path.open("wb") as file:
        for _ in range(whole):
            file.write(block)
        file.writelines(block.splitlines(keepends=True)[:rest])
    return Case(path, folder / f"cache of {num_entries}", settings.batch_size, num_threads)


def _measure_size(
    settings: BenchScaleSettings,
    folder: Path,
    block: bytes,
    num_entries: int,
    num_threads: int,
    report: Callable[[str], object],
) -> ScaleRow:
    case = _write_list(folder, block, num_entries, settings, num_threads)
    starts = []
    for number in range(1 + settings.repeats):
        starts.append(in_process(case, number))
        last = starts[-1]
        report(
            f"{num_entries:,} entries, process {number + 1} of {1 + settings.repeats}: open {last.open_s:.2f} s, "
            f"first batch {last.first_batch_s:.2f} s"
        )
    index_bytes = sum(path.stat().st_size for path in case.cache.rglob("*.index"))
    row = ScaleRow(num_entries, case.path.stat().st_size, index_bytes, starts[0], tuple(starts[1:]))
    case.path.unlink()
    shutil.rmtree(case.cache, ignore_errors=True)
    return row


def _measure_ranks(
    settings: BenchScaleSettings,
    folder: Path,
    block: bytes,
    num_threads: int,
    report: Callable[[str], object],
) -> list[RanksRow]:
    rows = []
    for num_ranks in settings.ranks:
        own = max(1, num_threads // num_ranks)
        case = _write_list(folder, block, settings.ranks_size, settings, own)
        rates, memory = run_ranks(case, num_ranks, num_batches=settings.num_batches, repeats=settings.repeats)
        rows.append(RanksRow(num_ranks, own, rates, memory))
        report(f"{num_ranks} rank(s), images/s: {', '.join(f'{total:,.0f}' for total in rows[-1].total)}")
    return rows


def _median(row: ScaleRow, figure: Callable[[Start], float]) -> float:
    return median(map(figure, row.again))
