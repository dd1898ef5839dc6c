"""Compare `KDDataLoader` with a bare DALI graph, and on JPEG files with torchvision's decoders."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.dlpack import from_dlpack

from benchmarks.command import benchmark_parser, run_benchmark
from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
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
from kd_pipeline.bench.photographs import photographs, read_jpeg
from kd_pipeline.bench.torchvision_loaders import (
    PREFETCH,
    LoadTask,
    Stream,
    torchvision_cuda,
    torchvision_pil,
    torchvision_tensor,
    why_no_cuda_decoder,
)
from kd_pipeline.data.decode import Decoding, resolve_decode
from kd_pipeline.data.decode_trial import try_decoding
from kd_pipeline.data.graph_settings import DecodeMode
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.sources import Arrays, ImageFolder, Source
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader

_ON_DALI = ("KDDataLoader", "bare DALI graph")
"""These have more rows: those for more batch sizes, to compare the cost of taking a batch with DALI's own, and those
for decode modes and loads of the hardware decoder, which the other loaders do not have."""
_ARRAY = Path("data/photographs.npy")
_NUM_IMAGES, _SIDE = 1000, 256
"""Images in the array that is created, and their height and width: as stored for training at 224 pixels."""


class BenchLoaderSettings(Settings):
    """How the loaders are compared."""

    source: Literal["files", "arrays"] = "files"
    """JPEG files, or an array of images of 256 pixels, which only the loaders on DALI read."""
    root: Path | None = None
    """JPEG files in class folders, or the array in an `.npy` file, few enough for the page cache. Defaults to
    `data/photographs` or `data/photographs.npy`, which is created if it does not exist."""
    batch_size: int = Field(default=64, gt=0)
    """Images in a batch."""
    more_batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = (256,)
    """Batch sizes that get their own rows of as many images, unless there are too few of them. The large default is
    that of a GPU, where the CPU time per batch in the consuming thread matters most."""
    size: int = Field(default=224, gt=0)
    """Height and width of the transformed images."""
    num_batches: int = Field(default=20, gt=0)
    """Timed batches of `batch_size` of each loader in each repeat, rounded up to whole groups of batches that become
    ready together."""
    repeats: int = Field(default=7, gt=0)
    """How often each row is measured."""
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of DALI and worker processes of torch; defaults to the cores this process may use."""
    device: str = "auto"
    """Where the batches go: `cpu`, `cuda`, or `auto` for a GPU if there is one."""
    decode: tuple[DecodeMode, ...] = ()
    """Decode modes, `window` and `full`, that get their own rows; the others use what `data.decode: auto` chooses."""
    hw_decoder_loads: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Fractions of the JPEG files for a GPU's hardware decoder, from 0 to 1, that get their own rows."""
    out: Path | None = None
    """JSON file for the result."""


_BATCH = ", batch of "


@dataclass(frozen=True, slots=True)
class DecodeTask(LoadTask):
    """Also says how DALI decodes; the other loaders ignore it."""

    decode: DecodeMode = "window"
    hw_decoder_load: float = 0.0
    """Fraction of the files for a GPU's hardware decoder."""

    @property
    def source(self) -> Source:
        """The samples in `root`."""
        return Arrays(self.root) if self.root.suffix == ".npy" else ImageFolder(self.root)


@dataclass(frozen=True, slots=True)
class LoaderResult:
    """All rows in the order of the loaders, the settings and the environment."""

    rows: tuple[Measurement, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def ratio_to_first(self, row: Measurement) -> float:
        """How many times as fast as the first row with this batch size."""
        _, *batch = row.name.split(_BATCH)
        first = next(other for other in self.rows if other.name.split(_BATCH)[1:] == batch)
        return paired_ratio(row.images_per_s, first.images_per_s)

    def table(self) -> str:
        """Plain text: a line for each loader, and below them what the numbers are."""
        header = (
            "",
            "images/s",
            "lowest",
            "highest",
            "times as fast",
            "CPU ms/image",
            "own ms/batch",
            "memory growth MiB",
        )
        rows = [
            (
                row.name,
                f"{median(row.images_per_s):,.0f}",
                f"{min(row.images_per_s):,.0f}",
                f"{max(row.images_per_s):,.0f}",
                f"{self.ratio_to_first(row):.2f}",
                f"{1000 * median(row.cpu_s_per_image):.2f}",
                f"{1000 * median(row.own_s_per_batch):.2f}",
                f"{row.memory_growth_bytes / 2**20:.1f}",
            )
            for row in self.rows
        ]
        note = (
            f"Medians of {len(self.rows[0].images_per_s)} interleaved repeats on {self.environment['num_cores']} "
            f"core(s), {self.settings['device']}. Times as fast: as {self.rows[0].name} with this batch size. Own: CPU "
            "time of Python, planning and handing over. Memory: this process, second half over first."
        )
        return "\n".join([*format_table(header, rows), note])

    def to_json(self) -> str:
        """Everything, including every repeat."""
        rows = []
        for row in self.rows:
            own: dict[str, Any] = {
                name: value if name == "name" else spread(value) for name, value in asdict(row).items()
            }
            own |= {"ratio_to_first": self.ratio_to_first(row), "memory_growth_bytes": row.memory_growth_bytes}
            rows.append(own)
        return json.dumps({"rows": rows, "settings": self.settings, "environment": self.environment}, indent=2)


def bench_loader(settings: BenchLoaderSettings, *, report: Callable[[str], object] = lambda line: None) -> LoaderResult:
    """Measure how fast loaders deliver batches `[N, 3, size, size]` float32; `report` receives lines of progress.

    All do the same work: random resized crop with an antialiased bilinear filter, horizontal flip, normalize. All read
    the same files, from the page cache, reshuffled in every epoch, in full batches, with as many threads or workers as
    there are cores. Each runs as one stream through all repeats. For torch's `DataLoader` this needs an endless
    sampler, which saves it the restart at every epoch that its users have: how much that costs depends on the size of
    the dataset, and it has nothing to do with loading.

    Raises:
        ConfigError: `out` is a folder, the device does not exist, or a CPU was to have a hardware decoder.
        DataError: the folder has files other than JPEG, or too few for one batch.
        MissingPackageError: a package of the extra `bench` is not installed.
    """
    prepare_out(settings.out)
    device = resolve_device(settings.device)
    if settings.hw_decoder_loads and device.type == "cpu":
        raise ConfigError("hw_decoder_load: only a GPU has a hardware decoder for JPEG; omit it, or set device")
    if settings.source == "arrays":
        root = _array(settings.root, report)
        num_images = len(Arrays(root).read(np.arange(len(Arrays(root)))))
    else:
        require("torchvision", extra="bench")
        root = photographs(settings.root, report)
        num_images = read_all(root)
    report(f"{num_images:,} {settings.source} read once, so every loader finds them in the page cache")
    num_threads = settings.num_threads or num_cores()
    decoding = resolve_decode("auto", None, device_id=device.index)
    task = DecodeTask(root, TrainTransform(size=settings.size), settings.batch_size, num_threads, device, *decoding)
    used = {"root": str(root), "num_threads": num_threads, "device": str(device), "decode_auto": decoding._asdict()}
    rows: list[Measurement] = []

    def result_with(more: Sequence[Measurement]) -> LoaderResult:
        return LoaderResult((*rows, *more), settings.model_dump(mode="json") | used, environment())

    def save(more: Sequence[Measurement]) -> None:
        save_result(settings.out, result_with(more).to_json, report)

    rows += _measure(settings, _tasks(settings, task, report), report, save)
    for batch_size in settings.more_batch_sizes:
        if num_images >= batch_size != settings.batch_size:
            own = replace(task, batch_size=batch_size)
            named = {f"{name}{_BATCH}{batch_size}": (LOADERS[name], own) for name in _ON_DALI}
            rows += _measure(settings, named, report, save)
    result = result_with(())
    save_result(settings.out, result.to_json, report)
    return result


_Tasks = dict[str, tuple[Callable[[DecodeTask], Stream], DecodeTask]]


def _measure(
    settings: BenchLoaderSettings,
    tasks: _Tasks,
    report: Callable[[str], object],
    save: Callable[[Sequence[Measurement]], None],
) -> list[Measurement]:
    """Measure loaders with one batch size."""
    task = next(own for _, own in tasks.values())
    num_batches = -(-settings.num_batches * settings.batch_size // task.batch_size)
    # Each of torch's workers prepares a batch of its own, and all may become ready together, as do the small batches
    # of a group in `KDDataLoader`: only full rounds are a fair measure.
    on_gpu = task.device.type == "cuda"
    group = group_size(task.batch_size, Views.of(task.transform), num_threads=task.num_threads, on_gpu=on_gpu)
    at_once = math.lcm(task.num_threads, group)
    with ExitStack() as stack:
        candidates = [
            Candidate(
                name,
                partial(run, stack.enter_context(closing(open_stream(own))), own.device),
                # With many workers the warm-up of torch's loaders takes longer than what is timed.
                num_warm_up=(PREFETCH + 2) * group if name.startswith(_ON_DALI) else None,
            )
            for name, (open_stream, own) in tasks.items()
        ]
        return measure(
            candidates,
            repeats=settings.repeats,
            num_batches=round_up(num_batches, at_once),
            # Prefetched: `PREFETCH` rounds; with DALI also those of its reader and of the teacher.
            num_warm_up=(PREFETCH + 2) * at_once,
            report=report,
            save=save,
        )


def _tasks(settings: BenchLoaderSettings, task: DecodeTask, report: Callable[[str], object]) -> _Tasks:
    """Every row with `batch_size` by name; what does not work on this GPU is reported and has none."""
    if settings.source == "arrays":
        return {name: (LOADERS[name], task) for name in _ON_DALI}
    tasks = {name: (open_stream, task) for name, open_stream in LOADERS.items()}
    if task.device.type == "cuda":
        if reason := why_no_cuda_decoder(task.device):
            report(f"no row for {', '.join(GPU_LOADERS)}: {reason}")
        else:
            tasks |= {name: (open_stream, task) for name, open_stream in GPU_LOADERS.items()}

    def add(label: str, **changes: Any) -> None:
        tasks.update({f"{name}, {label}": (LOADERS[name], replace(task, **changes)) for name in _ON_DALI})

    def obstacle(decode: DecodeMode) -> str:
        """Why a decode mode has no rows: one that crashes on this GPU would end the whole benchmark."""
        if task.device.type == "cpu":
            return ""
        trial = try_decoding(decode, device_id=task.device.index, hw_decoder_load=task.hw_decoder_load)
        return "" if trial.works else str(trial)

    def with_load(load: float) -> Decoding | ConfigError:
        try:
            return resolve_decode("auto", load, device_id=task.device.index)
        except ConfigError as exc:
            return exc

    with ThreadPoolExecutor() as pool:  # a trial is a process that takes seconds to start
        obstacles, decodings = pool.map(obstacle, settings.decode), pool.map(with_load, settings.hw_decoder_loads)
    for decode, reason in zip(settings.decode, obstacles, strict=True):
        if reason:
            report(f"no rows for decode {decode}: {reason}")
        else:
            add(f"decode {decode}", decode=decode)
    for load, decoding in zip(settings.hw_decoder_loads, decodings, strict=True):
        if isinstance(decoding, ConfigError):
            report(f"no rows for hw_decoder_load {load:g}: {decoding}")
        else:
            add(f"hw_decoder_load {load:g}", **decoding._asdict())
    return tasks


def _kd_data_loader(task: DecodeTask) -> Stream:
    with KDDataLoader(
        task.source,
        task.transform,
        batch_size=task.batch_size,
        last_batch="drop",
        device=task.device,
        num_threads=task.num_threads,
        prefetch=PREFETCH,
        decode=task.decode,
        hw_decoder_load=task.hw_decoder_load,
    ) as loader:
        while True:
            for batch in loader:
                yield batch.images


def _dali_graph(task: DecodeTask) -> Stream:
    """The shortest graph that does the work: DALI itself reads files, shuffles and draws random numbers."""
    dali = require("nvidia.dali", extra="cpu")
    fn, types = require("nvidia.dali.fn", extra="cpu"), dali.types
    source, transform = task.source, task.transform
    stream: torch.cuda.Stream | None = None
    decoder: dict[str, Any] = {"device": "cpu"}
    if task.device.type == "cuda":
        stream = torch.cuda.current_stream(task.device)
        decoder = {"device": "mixed", "hw_decoder_load": task.hw_decoder_load}
    pipeline = dali.Pipeline(
        batch_size=task.batch_size,
        num_threads=task.num_threads,
        device_id=task.device.index,
        seed=0,
        prefetch_queue_depth=PREFETCH,
    )
    with pipeline:
        crop = {"random_area": transform.area, "random_aspect_ratio": transform.ratio}
        size = [*transform.height_width]
        resize = {"size": size, "interp_type": types.INTERP_TRIANGULAR, "antialias": True}
        if source.stores == "pixels":
            pixels, labels = fn.external_source(
                _shuffled(task), num_outputs=2, ndim=[3, 0], layout=["HWC", ""], no_copy=task.device.type == "cpu"
            )
            if task.device.type == "cuda":
                pixels = pixels.gpu()
            images = fn.random_resized_crop(pixels, **crop, **resize)
        else:
            assert source.labels is not None
            encoded, labels = fn.readers.file(
                files=[source.name(index) for index in range(len(source))],
                labels=source.labels.tolist(),
                shuffle_after_epoch=True,
            )
            if task.decode == "full":
                images = fn.decoders.image(encoded, output_type=types.RGB, **decoder)
                images = fn.random_resized_crop(images, **crop, **resize)
            else:
                images = fn.decoders.image_random_crop(encoded, output_type=types.RGB, **crop, **decoder)
                images = fn.resize(images, **resize)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=transform.flip),
            mean=[255 * channel for channel in transform.mean],
            std=[255 * channel for channel in transform.std],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images, labels)
    while True:
        images, labels = pipeline.run(stream)
        from_dlpack(labels.as_tensor())
        yield from_dlpack(images.as_tensor())


def _shuffled(task: DecodeTask) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Full batches of an array and of their positions, without end."""
    images = np.load(task.root, mmap_mode="r")
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(images))
        for first in range(0, len(images) - task.batch_size + 1, task.batch_size):
            index = order[first : first + task.batch_size]
            yield images[index], index


LOADERS: dict[str, Callable[[DecodeTask], Stream]] = {
    "KDDataLoader": _kd_data_loader,
    "bare DALI graph": _dali_graph,
    "torchvision, PIL": torchvision_pil,
    "torchvision, decode_jpeg": torchvision_tensor,
}
"""What is compared."""
GPU_LOADERS: dict[str, Callable[[DecodeTask], Stream]] = {"torchvision, CUDA decode_jpeg": torchvision_cuda}
"""What is compared as well on a GPU, if torchvision was built for it."""


def run(stream: Stream, device: torch.device, num_batches: int) -> int:
    """Take so many batches and return the number of images in them."""
    num_images = sum(len(next(stream)) for _ in range(num_batches))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the batches are finished, not just queued
    return num_images


def _array(path: Path | None, report: Callable[[str], object]) -> Path:
    """Return `path`; None is `data/photographs.npy`, of crops of the photographs, which is created if it is missing."""
    if path is not None:
        return path
    report(f"photographs: {_ARRAY}, created if it does not exist")
    if not _ARRAY.exists():
        photos = np.stack(require("sklearn.datasets", extra="bench").load_sample_images().images)
        height, width = photos.shape[1:3]
        rng = np.random.default_rng(0)
        tops, lefts = (rng.integers(side - _SIDE, size=_NUM_IMAGES, endpoint=True) for side in (height, width))
        places = enumerate(zip(tops, lefts, strict=True))
        crops = [photos[number % 2, top : top + _SIDE, left : left + _SIDE] for number, (top, left) in places]
        _ARRAY.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(_ARRAY) as file:
            np.save(file, np.stack(crops))
    return _ARRAY


def read_all(root: Path) -> int:
    """Read every file once; return their number."""
    source = ImageFolder(root)
    for index in range(len(source)):
        read_jpeg(Path(source.name(index)))
    return len(source)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("loader", __doc__, BenchLoaderSettings, flags={"hw_decoder_loads": ["--hw-decoder-load"]})
    return run_benchmark(parser, BenchLoaderSettings, bench_loader, arguments, {"hw_decoder_loads": "hw-decoder-load"})


if __name__ == "__main__":
    sys.exit(main())
