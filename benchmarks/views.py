"""Compare several views of one decoding with as many loaders, each of which decodes the same files for itself."""

import json
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.loader import LOADERS, DecodeTask, read_all, run
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.measure import (
    Candidate,
    Measurement,
    environment,
    format_table,
    measure,
    paired_ratio,
    prepare_out,
    round_up,
    save_result,
    spread,
)
from kd_pipeline.bench.photographs import photographs
from kd_pipeline.bench.torchvision_loaders import PREFETCH, Stream
from kd_pipeline.data.auto_augment import RandAugment
from kd_pipeline.data.decode import resolve_decode
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.views import FollowingView, TrainView, Views, ViewSettings
from kd_pipeline.loader.loader import KDDataLoader

Ops = Literal["crop", "colors"]

_OPS: dict[Ops, dict[str, Any]] = {
    "crop": {},
    "colors": {
        **dict.fromkeys(("brightness", "contrast", "saturation"), 0.4),
        "hue": 0.1,
        "auto_augment": RandAugment(),
    },
}
"""What is done to each view besides crop, flip and normalize."""
_LOCAL_AREA = (0.05, 0.4)
"""Of the crops of DINO (arXiv 2104.14294)."""


class BenchViewsSettings(Settings):
    """How views are compared with loaders."""

    root: Path | None = None
    """JPEG files in class folders, few enough for the page cache; defaults to `data/photographs`, which is created if
    it does not exist."""
    ops: tuple[Ops, ...] = ("crop",)
    """What is done to the images: `crop` for a random resized crop and flips, `colors` for these with color jitter and
    RandAugment. Each gets rows of its own."""
    batch_size: int = Field(default=64, gt=0)
    """Images in a batch."""
    size: int = Field(default=224, gt=0)
    """Height and width of the first view."""
    large_size: int = Field(default=336, gt=0)
    """Height and width of the view that follows it, as for a teacher."""
    local_size: int = Field(default=96, gt=0)
    """Height and width of small crops."""
    num_locals: int = Field(default=8, gt=0)
    """Small crops of each image."""
    num_batches: int = Field(default=12, gt=0)
    """Timed batches of each row in each repeat, rounded up to whole groups of batches that become ready together."""
    repeats: int = Field(default=7, gt=0)
    """How often each row is measured."""
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of DALI; defaults to the cores this process may use."""
    device: str = "auto"
    """Where the batches go: `cpu`, `cuda`, or `auto` for a GPU if there is one."""
    out: Path | None = None
    """JSON file for the result."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one loader makes of each image."""

    transform: TrainTransform
    views: Mapping[str, ViewSettings] | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """Loaders of which a batch each is taken in turn; without any, the bare DALI graph of `benchmarks.loader`."""

    name: str
    parts: tuple[_Part, ...]
    against: str
    """The row with the same images to compare with."""


@dataclass(frozen=True, slots=True)
class ViewsResult:
    """All rows, the settings and the environment."""

    rows: tuple[Measurement, ...]
    against: Mapping[str, str]
    """For each row, the one with the same images that it is compared with."""
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def times(self, row: Measurement) -> list[float]:
        """The time divided by that of the row to compare with, in each repeat."""
        return [other / own for own, other in zip(row.images_per_s, self._other(row).images_per_s, strict=True)]

    def cpu_ratio(self, row: Measurement) -> float:
        """The CPU seconds divided by those of the row to compare with, which other processes disturb less."""
        return paired_ratio(row.cpu_s_per_image, self._other(row).cpu_s_per_image)

    def table(self) -> str:
        """Plain text: a line for each row, and below them what the numbers are."""
        header = ("", "samples/s", "time", "lowest", "highest", "CPU time", "CPU ms/sample", "own ms/batch", "of")
        rows = [
            (
                row.name,
                f"{median(row.images_per_s):,.0f}",
                f"{median(self.times(row)):.3f}",
                f"{min(self.times(row)):.3f}",
                f"{max(self.times(row)):.3f}",
                f"{self.cpu_ratio(row):.3f}",
                f"{1000 * median(row.cpu_s_per_image):.2f}",
                f"{1000 * median(row.own_s_per_batch):.2f}",
                self.against[row.name],
            )
            for row in self.rows
        ]
        note = (
            f"Medians of {len(self.rows[0].images_per_s)} interleaved repeats on {self.environment['num_cores']} "
            f"core(s), {self.settings['device']}. Time and CPU time: divided by those of the row in the last column in "
            "the same repeat, time with the lowest and the highest. Own: CPU time of Python, planning and handing over."
        )
        return "\n".join([*format_table(header, rows), note])

    def to_json(self) -> str:
        """Everything, including every repeat."""
        rows = []
        for row in self.rows:
            numbers = {name: spread(value) for name, value in asdict(row).items() if name != "name"}
            compared = {"against": self.against[row.name], "time": spread(self.times(row))}
            rows.append({"name": row.name, **compared, "cpu_time": self.cpu_ratio(row), **numbers})
        return json.dumps({"rows": rows, "settings": self.settings, "environment": self.environment}, indent=2)

    def _other(self, row: Measurement) -> Measurement:
        return next(other for other in self.rows if other.name == self.against[row.name])


def bench_views(settings: BenchViewsSettings, *, report: Callable[[str], object] = lambda line: None) -> ViewsResult:
    """Measure how fast batches of several views come; `report` receives lines of progress.

    All rows read the same files from the page cache, reshuffled in every epoch, in full batches, and give
    float32. Loaders of one row run at the same time, and one batch of each is a batch of the row. One view is compared
    with a bare DALI graph, a large view of the same window with a loader for each, and small crops likewise.

    Raises:
        ConfigError: `out` is a folder, or the device does not exist.
        DataError: the folder has files other than JPEG, or too few for one batch.
        MissingPackageError: a package of the extra `bench` is not installed.
    """
    prepare_out(settings.out)
    root = photographs(settings.root, report)
    report(f"{read_all(root):,} files read once, so every loader finds them in the page cache")
    device, num_threads = resolve_device(settings.device), settings.num_threads or num_cores()
    on_gpu = device.type == "cuda"
    task = DecodeTask(
        root,
        TrainTransform(size=settings.size),
        settings.batch_size,
        num_threads,
        device,
        *resolve_decode("auto", None, device_id=device.index),
    )
    rows = [row for ops in settings.ops for row in _rows(settings, ops)]
    # As in `benchmarks.loader`, only full groups are a fair measure.
    groups = [
        group_size(settings.batch_size, Views.of(part.transform, part.views), num_threads=num_threads, on_gpu=on_gpu)
        for row in rows
        for part in row.parts
    ]
    at_once = math.lcm(*groups)
    used = {"root": str(root), "num_threads": num_threads, "device": str(device)}
    against = {row.name: row.against for row in rows}

    def result_of(measured: Sequence[Measurement]) -> ViewsResult:
        return ViewsResult(tuple(measured), against, settings.model_dump(mode="json") | used, environment())

    with ExitStack() as stack:
        measured = measure(
            [Candidate(row.name, partial(run, stack.enter_context(_open(row, task)), device)) for row in rows],
            repeats=settings.repeats,
            num_batches=round_up(settings.num_batches, at_once),
            num_warm_up=(PREFETCH + 2) * at_once,
            report=report,
            save=lambda measured: save_result(settings.out, result_of(measured).to_json, report),
        )
    result = result_of(measured)
    save_result(settings.out, result.to_json, report)
    return result


def _rows(settings: BenchViewsSettings, ops: Ops) -> list[_Row]:
    """The rows of one kind of transform."""
    label = "" if ops == "crop" else f", {ops}"
    first = TrainTransform(size=settings.size, **_OPS[ops])
    large = TrainTransform(size=settings.large_size, **_OPS[ops])
    local = TrainView(size=settings.local_size, area=_LOCAL_AREA, count=settings.num_locals, **_OPS[ops])
    small = TrainTransform(size=settings.local_size, area=_LOCAL_AREA, **_OPS[ops])
    follows = FollowingView(follow="images", size=settings.large_size)
    one, bare = f"one view{label}", "bare DALI graph"
    two, both = f"two loaders{label}", f"{settings.size} and {settings.large_size} of one window{label}"
    crops = f"{settings.size} and {settings.num_locals} crops of {settings.local_size}{label}"
    many = f"{1 + settings.num_locals} loaders{label}"
    return [
        _Row(one, (_Part(first, {}),), bare if ops == "crop" else one),
        *([_Row(bare, (), bare)] if ops == "crop" else []),
        _Row(both, (_Part(first, {"large": follows}),), two),
        _Row(two, (_Part(first), _Part(large)), two),
        _Row(crops, (_Part(first, {"local": local}),), many),
        _Row(many, (_Part(first), *[_Part(small)] * settings.num_locals), many),
    ]


def _open(row: _Row, task: DecodeTask) -> "closing[Stream]":
    return closing(_batches(row.parts, task) if row.parts else LOADERS["bare DALI graph"](task))


def _batches(parts: Sequence[_Part], task: DecodeTask) -> Stream:
    """The images of the first of the loaders, after a batch of each was taken."""
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(
                KDDataLoader(
                    task.root,
                    part.transform,
                    views=part.views,
                    batch_size=task.batch_size,
                    seed=number,
                    last_batch="drop",
                    device=task.device,
                    num_threads=task.num_threads,
                    prefetch=PREFETCH,
                    decode=task.decode,
                    hw_decoder_load=task.hw_decoder_load,
                )
            )
            for number, part in enumerate(parts)
        ]
        streams = [stack.enter_context(closing(_epochs(loader))) for loader in loaders]
        for first, *_ in zip(*streams, strict=True):
            yield first.images


def _epochs(loader: KDDataLoader) -> Generator[KDBatch, None, None]:
    while True:
        yield from loader


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("views", __doc__, BenchViewsSettings)
    return run_benchmark(parser, BenchViewsSettings, bench_views, arguments)


if __name__ == "__main__":
    sys.exit(main())
