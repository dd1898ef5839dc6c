"""Measurements in separate processes: opening data and its first batch, or ranks that share a list."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kd_pipeline._core.child_process import spawn_context
from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.measure import peak_memory_bytes
from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.plan import Plan, Shard, uniforms
from kd_pipeline.data.sources import FileList, ImageFolder, Source
from kd_pipeline.data.sources.tar.index import Shard as TarShard
from kd_pipeline.data.sources.tar.samples import ShardSamples
from kd_pipeline.data.sources.tar.source import Tar
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import DataError
from kd_pipeline.loader.loader import KDDataLoader

__all__ = ["RESUME_AT", "DataTask", "Kind", "StartSample", "run_ranks", "start_in_process"]

Kind = Literal["list", "folder", "shards"]

RESUME_AT = (0.01, 0.9)
"""Fractions of an epoch after which a loader resumes."""
_SIZE = 32
"""Height and width of the transformed images."""
_BUFFER = 100_000
"""Samples of shards that are mixed."""
_NUM_PLANNED = 200
"""Batches whose planning is timed."""
_NUM_WARM_UP = 5
"""Batches before the timed ones; more than a loader prefetches."""
_BARRIER_TIMEOUT_S = 300.0
"""How long ranks wait for each other."""
_ADVICE = "usually for lack of memory: measure less, or fewer ranks"


@dataclass(frozen=True, slots=True)
class DataTask:
    """What a process opens."""

    path: Path
    """The list, the folder, or the pattern of the shards."""
    cache: Path
    """Folder of its index, in place of the user's own cache."""
    batch_size: int
    num_threads: int
    kind: Kind = "list"

    def open_source(self) -> Source:
        """Open the data, from its index if there is one."""
        os.environ["XDG_CACHE_HOME"] = str(self.cache)
        match self.kind:
            case "list":
                return FileList(self.path)
            case "folder":
                return ImageFolder(self.path)
            case "shards":
                return Tar(self.path)

    def open_loader(self, source: Source, shard: Shard | None = None) -> KDDataLoader:
        """Open a loader of small images."""
        return KDDataLoader(
            source,
            TrainTransform(size=_SIZE),
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            shard=shard or Shard(),
            device="cpu",
            num_threads=self.num_threads,
        )

    @property
    def shuffle(self) -> bool | ShardShuffle:
        """Shards stay together, with samples mixed over ten of them."""
        return ShardShuffle(buffer=_BUFFER) if self.kind == "shards" else True


@dataclass(frozen=True, slots=True)
class StartSample:
    """What one process measured while opening data and starting on it."""

    open_s: float
    first_batch_s: float
    """From the opened data to the first batch."""
    fingerprint_s: float
    """Added to the first `state_dict` or `load_state_dict` of a process, which must identify the data."""
    resume_s: tuple[float, ...]
    """From `load_state_dict` to the next batch, early and late in an epoch, with the fingerprint known."""
    state_bytes: int
    """Of the state as JSON."""
    peak_memory_bytes: int
    order_s: float
    """Shuffling, once for each epoch; also part of the first batch."""
    plan_s: float
    """Planning a batch: which samples, their paths, their random numbers."""


def start_in_process(task: DataTask, number: int) -> StartSample:
    """Open data and start on it in a new process; the parity of `number` sets in which order it resumes.

    Raises:
        DataError: the process was killed.
    """
    with ProcessPoolExecutor(1, spawn_context()) as pool:
        try:
            return pool.submit(_start, task, number).result()
        except BrokenProcessPool as exc:
            raise DataError(f"the process that opened {task.path.name} was killed, {_ADVICE}") from exc


def run_ranks(
    task: DataTask, num_ranks: int, *, num_batches: int, repeats: int
) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """Load a list with so many processes at once, each its own shard of every batch.

    Returns:
        Images per second by repeat and rank, and the peak memory of each rank.

    Raises:
        DataError: one of the processes was killed.
    """
    context = spawn_context()
    barrier = context.Barrier(num_ranks)
    with ProcessPoolExecutor(num_ranks, context, initializer=_set_barrier, initargs=(barrier,)) as pool:
        jobs = [pool.submit(_run_rank, task, Shard(rank, num_ranks), num_batches, repeats) for rank in range(num_ranks)]
        try:
            rates, memory = zip(*(job.result() for job in jobs), strict=True)
        except BrokenProcessPool as exc:
            raise DataError(f"one of {num_ranks} ranks was killed, {_ADVICE}") from exc
    return tuple(zip(*rates, strict=True)), memory


_barrier: Barrier
"""Of the ranks; set in their processes only."""


def _start(task: DataTask, number: int) -> StartSample:
    if task.kind == "shards" and not number:
        _scan_once()
    open_s, source = _timed(task.open_source)
    started_s = time.perf_counter()
    with closing(task.open_loader(source)) as loader:
        next(iter(loader))
        first_batch_s = time.perf_counter() - started_s
        fingerprint_s, _ = _timed(lambda: source.fingerprint)
        state, resume_s = loader.state_dict(), {}
        for share in RESUME_AT if number % 2 else reversed(RESUME_AT):
            resume_s[share] = _resume(loader, state, share)
        # Before `_plan` shuffles a second time, next to the loader's own order.
        memory_bytes = peak_memory_bytes()
        order_s, plan_s = _plan(source, task)
    return StartSample(
        open_s=open_s,
        first_batch_s=first_batch_s,
        fingerprint_s=fingerprint_s,
        resume_s=tuple(resume_s[share] for share in RESUME_AT),
        state_bytes=len(json.dumps(state)),
        peak_memory_bytes=memory_bytes,
        order_s=order_s,
        plan_s=plan_s,
    )


def _scan_once() -> None:
    """Let this process look through the first shard only, to which all others are links."""
    samples = cache(TarShard.samples)
    first: list[TarShard] = []

    def samples_of_first(shard: TarShard, *rest: Any, **options: Any) -> ShardSamples:
        first.append(shard)
        return samples(first[0], *rest, **options)

    TarShard.samples = samples_of_first  # type: ignore[method-assign,assignment]


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.perf_counter()
    result = function()
    return time.perf_counter() - started_s, result


def _resume(loader: KDDataLoader, state: Mapping[str, Any], share: float) -> float:
    """Seconds until the first batch after that fraction of an epoch."""
    started_s = time.perf_counter()
    loader.load_state_dict({**state, "batch": int(share * len(loader))})
    next(iter(loader))
    return time.perf_counter() - started_s


def _plan(source: Source, task: DataTask) -> tuple[float, float]:
    """Seconds for shuffling an epoch, and for planning a batch as the loader does, anywhere in it."""
    ends = getattr(source, "shard_ends", None)
    plan = Plan(num_samples=len(source), batch_size=task.batch_size, shuffle=task.shuffle, shard_ends=ends)
    num_draws = TrainTransform(size=_SIZE).num_draws
    order_s, epoch = _timed(lambda: plan.epoch(1))
    numbers = np.random.default_rng(0).integers(len(epoch), size=_NUM_PLANNED).tolist()
    started_s = time.perf_counter()
    for number in numbers:
        index = epoch[number].index
        if source.stores == "files":  # which are not read, but named
            source.read(index)
        uniforms(index, seed=plan.seed, epoch=1, count=num_draws)
    return order_s, (time.perf_counter() - started_s) / len(numbers)


def _set_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run_rank(task: DataTask, shard: Shard, num_batches: int, repeats: int) -> tuple[tuple[float, ...], int]:
    """Images per second of one rank in every repeat, and its peak memory."""
    rates = []
    try:
        with task.open_loader(task.open_source(), shard) as loader:
            stream = _endless(loader)
            for _ in range(repeats):
                _barrier.wait(_BARRIER_TIMEOUT_S)
                for _ in range(_NUM_WARM_UP):
                    next(stream)
                started_s = time.perf_counter()
                num_images = sum(len(next(stream)) for _ in range(num_batches))
                rates.append(num_images / (time.perf_counter() - started_s))
    except BaseException:
        _barrier.abort()  # so that no rank waits for this one
        raise
    return tuple(rates), peak_memory_bytes()


def _endless(loader: KDDataLoader) -> Iterator[KDBatch]:
    while True:
        yield from loader
