"""`KDDataLoader` beside the bare DALI graph and torchvision's two ways, on the same JPEG files."""

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.dlpack import from_dlpack

from kd_pipeline.bench.measure import BenchResult, Contender, measure, prepare_out
from kd_pipeline.bench.photographs import photographs, read_jpeg
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.source import ImageFolder
from kd_pipeline.data.transform import TrainTransform
from kd_pipeline.loader import KDDataLoader
from kd_pipeline.optional import require
from kd_pipeline.settings import Settings
from kd_pipeline.threads import num_cores

__all__ = ["LOADERS", "BenchLoaderSettings", "bench_loader", "torchvision_pil", "torchvision_tensor"]

_PREFETCH = 2
"""Batches ahead: of DALI, and of every worker of torch; what both do by default."""
_LARGE_BATCH = 256
"""As on a GPU, where what a batch costs the thread that takes it must not be in the way."""


class BenchLoaderSettings(Settings):
    """How the loaders are compared."""

    root: Path | None = None
    """JPEG files in class folders, no more than fit into the page cache; `data/photographs`, which is made where it
    is not there yet, where left out."""
    batch_size: int = Field(default=64, gt=0)
    size: int = Field(default=224, gt=0)
    """Height and width of the finished images."""
    num_batches: int = Field(default=40, gt=0)
    """Timed batches of every loader in every repeat, rounded up to a multiple of those that one gives at once."""
    repeats: int = Field(default=7, gt=0)
    num_threads: int | None = Field(default=None, gt=0)
    """Threads of DALI and worker processes of torch; the cores this process may use where left out."""
    out: Path | None = None
    """JSON file for the result."""


def bench_loader(settings: BenchLoaderSettings, *, report: Callable[[str], object] = lambda line: None) -> BenchResult:
    """Measure how fast loaders give batches `[N, 3, size, size]` float32 on the CPU; `report` gets lines of progress.

    All do the same work: random resized crop with an antialiased bilinear filter, horizontal flip, normalise. All read
    the same files, from the page cache, in an order that is shuffled anew in every epoch, in whole batches, with as
    many threads or workers as there are cores. Each runs on as one stream through all repeats. For torch's
    `DataLoader` that takes a sampler without an end, which spares it the restart at every epoch that its users have:
    how much that costs depends on the size of the dataset, and it has nothing to do with loading.

    Raises:
        ConfigError: `out` is a folder.
        DataError: the folder holds other images than JPEG, or too few for one batch.
        MissingPackageError: a package of the extra `bench` is not installed.
    """
    require("torchvision", extra="bench")
    prepare_out(settings.out)
    root = photographs(settings.root, report)
    num_files = _read_all(root)
    report(f"{num_files:,} files read once, so that every loader finds them in the page cache")
    num_threads = settings.num_threads or num_cores()
    transform = TrainTransform(size=settings.size)
    with ExitStack() as stack:
        contenders = []
        rows = [(name, open_stream, settings.batch_size) for name, open_stream in LOADERS.items()]
        if num_files >= _LARGE_BATCH != settings.batch_size:
            rows.append((f"KDDataLoader, batch of {_LARGE_BATCH}", _kd_data_loader, _LARGE_BATCH))
        for name, open_stream, batch_size in rows:
            stream = open_stream(root, transform, batch_size, num_threads)
            contenders.append(Contender(name, _Runner(stack.enter_context(closing(stream)))))
        # Workers of torch each make a batch of their own and may deliver all at once, and so does `KDDataLoader` with
        # small batches: only whole rounds are fair.
        at_once = math.lcm(num_threads, group_size(settings.batch_size, transform))
        result = measure(
            contenders,
            repeats=settings.repeats,
            num_batches=-(-settings.num_batches // at_once) * at_once,
            # Ready ahead: `_PREFETCH` rounds; with DALI those, its reader's and the teacher's.
            num_warm_up=(_PREFETCH + 2) * at_once,
            settings=settings.model_dump(mode="json") | {"root": str(root), "num_threads": num_threads},
            report=report,
        )
    if settings.out is not None:
        settings.out.write_text(result.to_json() + "\n", encoding="utf-8")
    return result


_Stream = Generator[Tensor, None, None]


def _kd_data_loader(root: Path, transform: TrainTransform, batch_size: int, num_threads: int) -> _Stream:
    with KDDataLoader(
        ImageFolder(root),
        transform,
        batch_size=batch_size,
        last_batch="drop",
        device="cpu",
        num_threads=num_threads,
        prefetch=_PREFETCH,
    ) as loader:
        while True:
            for batch in loader:
                yield batch.images


def _dali_graph(root: Path, transform: TrainTransform, batch_size: int, num_threads: int) -> _Stream:
    """The shortest graph that does the work: DALI reads, shuffles and draws by itself."""
    dali = require("nvidia.dali", extra="cpu")
    fn, types = require("nvidia.dali.fn", extra="cpu"), dali.types
    source = ImageFolder(root)
    assert source.labels is not None
    pipeline = dali.Pipeline(batch_size=batch_size, num_threads=num_threads, seed=0, prefetch_queue_depth=_PREFETCH)
    with pipeline:
        encoded, labels = fn.readers.file(
            files=[source.name(index) for index in range(len(source))],
            labels=source.labels.tolist(),
            shuffle_after_epoch=True,
        )
        images = fn.decoders.image_random_crop(
            encoded, random_area=transform.area, random_aspect_ratio=transform.ratio, output_type=types.RGB
        )
        images = fn.resize(
            images, size=[transform.size, transform.size], interp_type=types.INTERP_TRIANGULAR, antialias=True
        )
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
        images, labels = pipeline.run()
        from_dlpack(labels.as_tensor())
        yield from_dlpack(images.as_tensor())


def torchvision_pil(root: Path, transform: TrainTransform, batch_size: int, num_threads: int) -> _Stream:
    """What torchvision's `ImageFolder` and torch's `DataLoader` give: batches `[N, 3, H, W]` without end."""
    datasets = require("torchvision.datasets", extra="bench")
    v2 = require("torchvision.transforms.v2", extra="bench")
    steps = [*_torchvision_crop(transform), v2.ToImage(), *_torchvision_normalise(transform)]
    return _torch_batches(datasets.ImageFolder(root, v2.Compose(steps)), batch_size, num_threads)


def torchvision_tensor(root: Path, transform: TrainTransform, batch_size: int, num_threads: int) -> _Stream:
    """The same from tensors that `decode_jpeg` gives, without PIL."""
    datasets = require("torchvision.datasets", extra="bench")
    v2 = require("torchvision.transforms.v2", extra="bench")
    steps = [*_torchvision_crop(transform), *_torchvision_normalise(transform)]
    return _torch_batches(datasets.ImageFolder(root, v2.Compose(steps), loader=_read_jpeg), batch_size, num_threads)


LOADERS: dict[str, Callable[[Path, TrainTransform, int, int], _Stream]] = {
    "KDDataLoader": _kd_data_loader,
    "bare DALI graph": _dali_graph,
    "torchvision, PIL": torchvision_pil,
    "torchvision, decode_jpeg": torchvision_tensor,
}
"""What is compared: each takes folder, transform, batch size and number of threads, and gives batches without end."""


class _Runner:
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def __call__(self, num_batches: int) -> int:
        return sum(len(next(self._stream)) for _ in range(num_batches))


def _torch_batches(dataset: Any, batch_size: int, num_workers: int) -> _Stream:
    loader = DataLoader(
        dataset,
        batch_size,
        # One permutation behind the other, for longer than anybody waits.
        sampler=RandomSampler(dataset, num_samples=2**62, generator=torch.Generator().manual_seed(0)),
        num_workers=num_workers,
        prefetch_factor=_PREFETCH,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        # Forking a process in which DALI's threads run is not safe.
        multiprocessing_context="spawn",
    )
    for images, _ in loader:
        yield images


def _torchvision_crop(transform: TrainTransform) -> list[Any]:
    v2 = require("torchvision.transforms.v2", extra="bench")
    return [
        v2.RandomResizedCrop(transform.size, transform.area, transform.ratio, antialias=True),
        v2.RandomHorizontalFlip(transform.flip),
    ]


def _torchvision_normalise(transform: TrainTransform) -> list[Any]:
    v2 = require("torchvision.transforms.v2", extra="bench")
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(transform.mean, transform.std)]


def _read_jpeg(path: str) -> Tensor:
    io = require("torchvision.io", extra="bench")
    image: Tensor = io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image


def _read_all(root: Path) -> int:
    """Read every file once; return how many there are."""
    source = ImageFolder(root)
    for index in range(len(source)):
        read_jpeg(Path(source.name(index)))
    return len(source)
