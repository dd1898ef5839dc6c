"""`KDDataLoader` beside the bare DALI graph and torchvision's two ways, on the same JPEG files."""

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.dlpack import from_dlpack

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import BenchResult, Contender, measure, prepare_out
from kd_pipeline.bench.photographs import photographs, read_jpeg
from kd_pipeline.data.dali import DecodeWay
from kd_pipeline.data.decode import resolve_decode
from kd_pipeline.data.decode_trial import try_decoding
from kd_pipeline.data.reader import group_size
from kd_pipeline.data.sources.base import ImageFolder
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader

__all__ = ["LOADERS", "BenchLoaderSettings", "LoadTask", "bench_loader", "torchvision_pil", "torchvision_tensor"]

_PREFETCH = 2
"""Batches ahead: of DALI, and of every worker of torch; what both do by default."""
_LARGE_BATCH = 256
"""As on a GPU, where what a batch costs the thread that takes it must not be in the way."""
_ON_DALI = ("KDDataLoader", "bare DALI graph")
"""What gets further rows: for the large batch, where the second says how much of the cost of taking one is DALI's own,
and for ways to decode and loads of the hardware decoder, which the others have no use for."""


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
    device: str = "auto"
    """Where the batches are wanted: `cpu`, `cuda`, or `auto` for a GPU where there is one."""
    decode: tuple[DecodeWay, ...] = ()
    """Ways to decode that get rows of their own; the other rows take what `data.decode: auto` takes."""
    hw_decoder_loads: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Shares of the JPEG files for a GPU's hardware decoder, from 0 to 1, that get rows of their own."""
    out: Path | None = None
    """JSON file for the result."""


def bench_loader(settings: BenchLoaderSettings, *, report: Callable[[str], object] = lambda line: None) -> BenchResult:
    """Measure how fast loaders give batches `[N, 3, size, size]` float32; `report` gets lines of progress.

    All do the same work: random resized crop with an antialiased bilinear filter, horizontal flip, normalize. All read
    the same files, from the page cache, in an order that is shuffled anew in every epoch, in whole batches, with as
    many threads or workers as there are cores. Each runs on as one stream through all repeats. For torch's
    `DataLoader` that takes a sampler without an end, which spares it the restart at every epoch that its users have:
    how much that costs depends on the size of the dataset, and it has nothing to do with loading.

    Raises:
        ConfigError: `out` is a folder, there is no such device, or a CPU was to have a hardware decoder.
        DataError: the folder holds other images than JPEG, or too few for one batch.
        MissingPackageError: a package of the extra `bench` is not installed.
    """
    require("torchvision", extra="bench")
    prepare_out(settings.out)
    device = resolve_device(settings.device)
    if settings.hw_decoder_loads and device.type == "cpu":
        raise ConfigError("hw_decoder_load: only a GPU has a hardware decoder for JPEG; leave it out, or set device")
    root = photographs(settings.root, report)
    num_files = _read_all(root)
    report(f"{num_files:,} files read once, so that every loader finds them in the page cache")
    num_threads = settings.num_threads or num_cores()
    taken = resolve_decode("auto", device_id=device.index, hw_decoder_load=0.0)
    task = LoadTask(root, TrainTransform(size=settings.size), settings.batch_size, num_threads, device, taken)
    rows = {name: (open_stream, task) for name, open_stream in LOADERS.items()}

    def add(label: str, **changes: Any) -> None:
        rows.update({f"{name}, {label}": (LOADERS[name], replace(task, **changes)) for name in _ON_DALI})

    if num_files >= _LARGE_BATCH != settings.batch_size:
        add(f"batch of {_LARGE_BATCH}", batch_size=_LARGE_BATCH)
    for way in settings.decode:
        # A way that crashes on this GPU would end all rows.
        if device.type == "cuda" and not (trial := try_decoding(way, device_id=device.index)).works:
            report(f"no rows for decode {way}: {trial}")
            continue
        add(f"decode {way}", decode=way)
    for load in settings.hw_decoder_loads:
        try:
            way = resolve_decode("auto", device_id=device.index, hw_decoder_load=load)
        except ConfigError as exc:
            report(f"no rows for hw_decoder_load {load:g}: {exc}")
            continue
        add(f"hw_decoder_load {load:g}", decode=way, hw_decoder_load=load)
    with ExitStack() as stack:
        contenders = [
            Contender(name, _Runner(stack.enter_context(closing(open_stream(own))), device))
            for name, (open_stream, own) in rows.items()
        ]
        # Workers of torch each make a batch of their own and may deliver all at once, and so does `KDDataLoader` with
        # small batches: only whole rounds are fair.
        at_once = math.lcm(num_threads, group_size(settings.batch_size, task.transform))
        result = measure(
            contenders,
            repeats=settings.repeats,
            num_batches=-(-settings.num_batches // at_once) * at_once,
            # Ready ahead: `_PREFETCH` rounds; with DALI those, its reader's and the teacher's.
            num_warm_up=(_PREFETCH + 2) * at_once,
            settings=settings.model_dump(mode="json")
            | {"root": str(root), "num_threads": num_threads, "device": str(device), "decode_auto": taken},
            report=report,
        )
    if settings.out is not None:
        settings.out.write_text(result.to_json() + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True, slots=True)
class LoadTask:
    """Loading, as every loader does it."""

    root: Path
    """JPEG files in class folders."""
    transform: TrainTransform
    batch_size: int
    num_threads: int
    """Of DALI; also worker processes of torch's `DataLoader`."""
    device: torch.device
    """Where the batches are wanted."""
    decode: DecodeWay = "window"
    hw_decoder_load: float = 0.0
    """Share of the files for a GPU's hardware decoder."""


_Stream = Generator[Tensor, None, None]


def _kd_data_loader(task: LoadTask) -> _Stream:
    with KDDataLoader(
        ImageFolder(task.root),
        task.transform,
        batch_size=task.batch_size,
        last_batch="drop",
        device=task.device,
        num_threads=task.num_threads,
        prefetch=_PREFETCH,
        decode=task.decode,
        hw_decoder_load=task.hw_decoder_load,
    ) as loader:
        while True:
            for batch in loader:
                yield batch.images


def _dali_graph(task: LoadTask) -> _Stream:
    """The shortest graph that does the work: DALI reads, shuffles and draws by itself."""
    dali = require("nvidia.dali", extra="cpu")
    fn, types = require("nvidia.dali.fn", extra="cpu"), dali.types
    source, transform = ImageFolder(task.root), task.transform
    assert source.labels is not None
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
        prefetch_queue_depth=_PREFETCH,
    )
    with pipeline:
        encoded, labels = fn.readers.file(
            files=[source.name(index) for index in range(len(source))],
            labels=source.labels.tolist(),
            shuffle_after_epoch=True,
        )
        crop = {"random_area": transform.area, "random_aspect_ratio": transform.ratio}
        resize = {
            "size": [transform.size, transform.size],
            "interp_type": types.INTERP_TRIANGULAR,
            "antialias": True,
        }
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


def torchvision_pil(task: LoadTask) -> _Stream:
    """What torchvision's `ImageFolder` and torch's `DataLoader` give: batches `[N, 3, H, W]` without end."""
    datasets = require("torchvision.datasets", extra="bench")
    v2 = require("torchvision.transforms.v2", extra="bench")
    steps = [*_torchvision_crop(task.transform), v2.ToImage(), *_torchvision_normalize(task.transform)]
    return _torch_batches(datasets.ImageFolder(task.root, v2.Compose(steps)), task)


def torchvision_tensor(task: LoadTask) -> _Stream:
    """The same from tensors that `decode_jpeg` gives, without PIL."""
    datasets = require("torchvision.datasets", extra="bench")
    v2 = require("torchvision.transforms.v2", extra="bench")
    steps = [*_torchvision_crop(task.transform), *_torchvision_normalize(task.transform)]
    return _torch_batches(datasets.ImageFolder(task.root, v2.Compose(steps), loader=_read_jpeg), task)


LOADERS: dict[str, Callable[[LoadTask], _Stream]] = {
    "KDDataLoader": _kd_data_loader,
    "bare DALI graph": _dali_graph,
    "torchvision, PIL": torchvision_pil,
    "torchvision, decode_jpeg": torchvision_tensor,
}
"""What is compared; each gives batches without end."""


class _Runner:
    def __init__(self, stream: _Stream, device: torch.device) -> None:
        self._stream, self._device = stream, device

    def __call__(self, num_batches: int) -> int:
        num_images = sum(len(next(self._stream)) for _ in range(num_batches))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the batches are there, and not only promised
        return num_images


def _torch_batches(dataset: Any, task: LoadTask) -> _Stream:
    loader = DataLoader(
        dataset,
        task.batch_size,
        # One permutation behind the other, for longer than anybody waits.
        sampler=RandomSampler(dataset, num_samples=2**62, generator=torch.Generator().manual_seed(0)),
        num_workers=task.num_threads,
        prefetch_factor=_PREFETCH,
        drop_last=True,
        pin_memory=task.device.type == "cuda",
        # Forking a process in which DALI's threads run is not safe.
        multiprocessing_context="spawn",
    )
    for images, _ in loader:
        yield images.to(task.device, non_blocking=True)


def _torchvision_crop(transform: TrainTransform) -> list[Any]:
    v2 = require("torchvision.transforms.v2", extra="bench")
    return [
        v2.RandomResizedCrop(transform.size, transform.area, transform.ratio, antialias=True),
        v2.RandomHorizontalFlip(transform.flip),
    ]


def _torchvision_normalize(transform: TrainTransform) -> list[Any]:
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
