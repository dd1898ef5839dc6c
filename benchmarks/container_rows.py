"""The loaders that `benchmarks.containers` compares, each an endless stream of batches from one container."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from benchmarks.container_files import Images
from kd_pipeline._core.child_process import spawn_context
from kd_pipeline._core.optional import require
from kd_pipeline.bench.torchvision_loaders import PREFETCH, LoadTask, Stream, tensor_steps, torchvision_tensor
from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.sources import ImageFolder, Parquet, Source, Tar
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.storage import StoreSettings

__all__ = ["ROWS", "ContainerTask", "Row"]

_BUFFER = 1000
"""Samples that are mixed where whole shards are read one after the other."""


@dataclass(frozen=True, slots=True)
class ContainerTask(LoadTask):
    """Where the containers are; `root` has the same images as files."""

    images: Images
    """What is in them."""
    folder: Path
    """Has a folder for each kind of container."""
    url: str
    """The same folder on the server."""
    cache: Path
    """An empty folder for what is downloaded."""

    def shards(self, kind: str, *, remote: bool) -> list[str]:
        """Paths or URLs of all shards of a kind."""
        base = self.url if remote else self.folder
        return [f"{base}/{kind}/{name}.{kind}" for name in self.images.names]


@dataclass(frozen=True, slots=True)
class Row:
    """A loader that is compared."""

    name: str
    order: str
    """In which it reads the samples."""
    open_stream: Callable[[ContainerTask], Stream]
    container: str | None = None
    """What it reads, a name of `WRITERS`; None for files."""
    package: str | None = None
    """What it needs, as it is imported."""


def _files(task: ContainerTask) -> Stream:
    return _ours(ImageFolder(task.root), True, task)


def _tar(task: ContainerTask, *, remote: bool, shuffle: Any, keep: bool = True) -> Stream:
    storage = StoreSettings(cache_dir=task.cache / "files") if keep else StoreSettings(cache_size=0)
    with _index_in(task.cache):
        source = Tar(task.shards("tar", remote=remote), storage=storage)
    return _ours(source, shuffle, task)


def _parquet(task: ContainerTask, *, remote: bool, shuffle: Any) -> Stream:
    files = task.shards("parquet", remote=remote)
    if shuffle is True:
        files = files[: task.images.num_shards]  # what fits into the memory for row groups, without links
    with _index_in(task.cache):
        source = Parquet(files, storage=StoreSettings(cache_dir=task.cache / "files"))
    return _ours(source, shuffle, task)


def _index_in(folder: Path) -> AbstractContextManager[None]:
    """In this block, no index of temporary files gets into the user's cache."""
    return _environment({"XDG_CACHE_HOME": str(folder)})


def _ours(source: Source, shuffle: Any, task: ContainerTask) -> Stream:
    with KDDataLoader(
        source,
        task.transform,
        batch_size=task.batch_size,
        shuffle=shuffle,
        last_batch="drop",
        device=task.device,
        num_threads=task.num_threads,
        prefetch=PREFETCH,
    ) as loader:
        while True:
            for batch in loader:
                yield batch.images


def _webdataset(task: ContainerTask, *, remote: bool) -> Stream:
    webdataset = require("webdataset", extra="bench")
    urls = task.shards("tar", remote=remote)
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(_BUFFER).repeat()
    yield from _batches(dataset, "jpg", task)


def _mds(task: ContainerTask, *, remote: bool) -> Stream:
    streaming = require("streaming", extra="bench")
    where = {"local": str(task.folder / "mds")}
    if remote:
        where = {"local": str(task.cache / "mds"), "remote": "s3://mds"}
    with _s3(task.url):
        dataset = streaming.StreamingDataset(**where, shuffle=True, shuffle_seed=0, batch_size=task.batch_size)
        yield from _batches(dataset, "image", task)


def _litdata(task: ContainerTask, *, remote: bool) -> Stream:
    litdata = require("litdata", extra="bench")
    where: dict[str, Any] = {"input_dir": str(task.folder / "litdata")}
    if remote:
        where = {"input_dir": "s3://litdata", "storage_options": {"endpoint_url": task.url}}
    with _s3(task.url):
        dataset = litdata.StreamingDataset(**where, cache_dir=str(task.cache / "litdata"), shuffle=True, seed=0)
        yield from _batches(dataset, "image", task, worker_init_fn=_allow_http)


def _allow_http(worker: int) -> None:
    """Let litdata's S3 client, which has no option for it, do without TLS."""
    require("litdata.streaming.downloader", extra="bench")._OBSTORE_CLIENT_OPTIONS["allow_http"] = True


def _batches(dataset: Any, key: str, task: ContainerTask, **options: Any) -> Stream:
    """Epoch after epoch of a dataset whose samples have an encoded image under `key`."""
    batches = DataLoader(
        dataset,
        task.batch_size,
        num_workers=task.num_threads,
        prefetch_factor=PREFETCH,
        drop_last=True,
        persistent_workers=True,
        collate_fn=partial(_decoded, tensor_steps(task.transform), key),
        # Forking a process in which DALI's threads run is not safe.
        multiprocessing_context=spawn_context(),
        **options,
    )
    while True:
        yield from batches


def _decoded(steps: Callable[[Tensor], Tensor], key: str, samples: Sequence[Any]) -> Tensor:
    """A batch of what `torchvision_tensor` does with each image; runs in the workers."""
    io = require("torchvision.io", extra="bench")
    images = []
    for sample in samples:
        encoded = torch.frombuffer(bytearray(sample[key]), dtype=torch.uint8)  # torch takes nothing that is read-only
        images.append(steps(io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB)))
    batch: Tensor = default_collate(images)
    return batch


def _s3(url: str) -> AbstractContextManager[None]:
    """What is started in this block finds the folders of the server as buckets."""
    key = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    return _environment({"S3_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **key})


@contextmanager
def _environment(own: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_SHARDS = ShardShuffle(buffer=_BUFFER)
_MIXED = f"shards, buffer of {_BUFFER}"
_BUFFERED = f"shards, buffer of {_BUFFER} in each worker"
_PY1E = "shards, blocks of py1e"
_CHUNKS = "shards one by one, windows of 256"

ROWS: tuple[Row, ...] = (
    Row("files", "global", _files),
    Row("files: torchvision", "global", torchvision_tensor),
    Row("tar", "global", partial(_tar, remote=False, shuffle=True), "tar"),
    Row("tar by shards", _MIXED, partial(_tar, remote=False, shuffle=_SHARDS), "tar"),
    Row("Parquet", "global, kept in memory", partial(_parquet, remote=False, shuffle=True), "parquet"),
    Row("Parquet by shards", _MIXED, partial(_parquet, remote=False, shuffle=_SHARDS), "parquet"),
    Row("tar over HTTP", "global", partial(_tar, remote=True, shuffle=True), "tar"),
    Row("tar over HTTP, no cache", "global", partial(_tar, remote=True, shuffle=True, keep=False), "tar"),
    Row("tar over HTTP by shards", _MIXED, partial(_tar, remote=True, shuffle=_SHARDS), "tar"),
    Row("Parquet over HTTP by shards", _MIXED, partial(_parquet, remote=True, shuffle=_SHARDS), "parquet"),
    Row("tar: webdataset", _BUFFERED, partial(_webdataset, remote=False), "tar", "webdataset"),
    Row("MDS: mosaicml-streaming", _PY1E, partial(_mds, remote=False), "mds", "streaming"),
    Row("litdata", _CHUNKS, partial(_litdata, remote=False), "litdata", "litdata"),
    Row("tar over HTTP: webdataset", _BUFFERED, partial(_webdataset, remote=True), "tar", "webdataset"),
    Row("MDS over HTTP: mosaicml-streaming", _PY1E, partial(_mds, remote=True), "mds", "streaming"),
    Row("litdata over HTTP", _CHUNKS, partial(_litdata, remote=True), "litdata", "litdata"),
)
"""What is compared, with the baseline first."""
