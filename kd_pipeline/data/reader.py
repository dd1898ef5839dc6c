"""Batches of the plan, read by DALI, with substitutes for samples that cannot be read."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.bad_samples import BadSamples
from kd_pipeline.data.dali import FileChecker, Graph
from kd_pipeline.data.file_reading import read_sample
from kd_pipeline.data.graph_settings import GraphInput, GraphSettings
from kd_pipeline.data.mixing import MixSettings, plan_mixing
from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.sources import Source, masks_of
from kd_pipeline.data.views import Draws, Sizes, Views

__all__ = ["INDEX", "LABEL", "MIXING", "VALID", "GroupPlan", "ReadBatch", "ReadGroup", "Reader", "group_size"]

INDEX, LABEL, VALID = range(3)
"""Rows of a batch's metadata, which reach a GPU in one copy. The label is -1 for unlabeled data, and valid is 0 for
padding and substitutes."""
MIXING = slice(3, None)
"""Rows of the metadata that say how images are mixed, if they are."""

_GROUP_IMAGES, _GROUP_PER_THREAD, _GROUP_SIDE, _GROUP_FILE_PIXELS = 256, 32, 224, 2**26
"""Largest group of batches for DALI: images; on a CPU also images for each thread, as more are no faster, and several
groups are held at once; height and width of images after the transform, of larger ones fewer form a group; and the
pixels of their files, 200 MB. A single batch may be larger."""
_ALIGNMENT = 256
"""Every batch starts at a multiple of so many bytes, or a TensorRT engine would need a copy of it."""
_BLOCK = 4096
"""Samples of files or bytes that are prepared at once: for 64 images, a NumPy call takes as long as for a thousand."""
_BLOCK_OF_BYTES = 1024
"""The same of bytes on a CPU, which is slow enough: what a source is told of, it fetches."""
_MAX_RECYCLED = 31 * 2**20
"""Bytes of pixels that are read at once, unless a single batch has more. For 32 MiB and more, the C library asks the
system for new memory each time, which takes as long as to copy them into it."""

T = TypeVar("T")
_logger = logging.getLogger("kd_pipeline")


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Batches of one epoch that DALI processes at once."""

    epoch: int
    number: int
    """Number of the first batch."""
    ends: list[int]
    """0, and the row after the last of each batch."""
    plan: BatchPlan
    """What was planned, of all batches."""
    metadata: NDArray[np.int64]
    """`[F, M]`, what the images of all batches show, substitutes included; its rows are named above."""
    sizes: list[Sizes]
    """Of the images of each batch, where they change."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    def rows(self, place: int) -> slice:
        """The rows of the batch at `place` in the group."""
        return slice(self.ends[place], self.ends[place + 1])

    def part(self, start: int, stop: int) -> "GroupPlan":
        """The batches at `start` to `stop - 1` in the group."""
        first, ends = self.ends[start], self.ends[start : stop + 1]
        rows = slice(first, ends[-1])
        own = self.plan.part(rows), np.ascontiguousarray(self.metadata[:, rows])
        return GroupPlan(self.epoch, self.number + start, [end - first for end in ends], *own, self.sizes[start:stop])

    def end(self, start: int, most: int) -> int:
        """The batch after those from `start` on that DALI can process at once: `most`, all of the same sizes."""
        stop = min(start + most, len(self))
        return next((place for place in range(start, stop) if self.sizes[place] != self.sizes[start]), stop)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ReadGroup:
    """Batches as DALI returns them, at once."""

    views: Mapping[str, Any]
    """DALI's dense tensors by name, `[M, 3, H, W]` or `[M, count, 3, H, W]`."""
    planned: GroupPlan
    masks: NDArray[Any] | None = None
    """`[M, H, W]` of small integers: the classes of the pixels of `images`; None without masks."""


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A batch of a group."""

    group: ReadGroup
    place: int
    """Its place in the group."""

    @property
    def rows(self) -> slice:
        """The rows of the group's views that are this batch."""
        return self.group.planned.rows(self.place)

    @property
    def metadata(self) -> NDArray[np.int64]:
        """`[F, N]`, what the images show, substitutes included; its rows are named above."""
        return self.group.planned.metadata[:, self.rows]

    @property
    def plan(self) -> BatchPlan:
        """What was planned."""
        return self.group.planned.plan.part(self.rows)


class Reader:
    """Reads any batch of any epoch, and the next one fast, as DALI is already processing it."""

    def __init__(
        self,
        source: Source,
        views: Views,
        plan: Plan,
        graph_settings: GraphSettings,
        settings: LoaderSettings,
        mix: MixSettings | None = None,
        record: Path | None = None,
    ) -> None:
        """`record` is a JSON lines file that lists the unreadable samples."""
        self._checker = FileChecker(graph_settings)
        self.bad_samples = BadSamples(source, settings, self._checker, record)
        on_gpu = graph_settings.device_id is not None
        num_threads = graph_settings.num_threads
        self._group_size = group_size(plan.batch_size, views, num_threads=num_threads, on_gpu=on_gpu)
        self._settings = replace(graph_settings, max_batch=plan.batch_size * self._group_size)
        self._source, self._views, self._plan, self._mix = source, views, plan, mix
        self._labels = source.labels
        self._epochs = _Epochs(plan)
        self._thread = ThreadPoolExecutor(1, "kd_pipeline-prepare")
        self._graph: Graph | None = None
        self._pulled: deque[GroupPlan] = deque()
        self._next: tuple[int, int] | None = None
        self._ungrouped: int | None = None
        """Epoch in which batches come one by one, after a group failed."""
        self._retried: tuple[int, int] | None = None
        self._ready: dict[tuple[int, int], ReadBatch] = {}

    def read(self, epoch: int, number: int, stream: Any = None) -> ReadBatch:
        """Batch `number` of `epoch`, with its images ordered on `stream`.

        Raises:
            BadSampleError: a sample cannot be read, and `on_bad_sample` is `raise`.
            TooManyBadSamplesError: more samples are unreadable than `max_bad_fraction` allows.
            RuntimeError: DALI failed twice on the batch, and on none of its samples alone.
            IndexError: an epoch has no such batch.
        """
        if not 0 <= number < self._plan.num_batches(epoch):
            raise IndexError(f"batch {number} of an epoch of {self._plan.num_batches(epoch)} batches")
        while (epoch, number) not in self._ready:
            self._ready = self._take(epoch, number, stream)
        return self._ready.pop((epoch, number))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """All pixels `[H, W, 3]` of a sample, before the transform.

        Raises:
            RuntimeError: it cannot be read.
        """
        if self._source.stores == "pixels":
            pixels: NDArray[np.uint8] = self._source.read(np.array([index]))[0]
            return pixels
        images = self._checker.decode(read_sample(self._source, index, max_bytes=self._checker.max_bytes))
        return np.array((images if self._settings.device_id is None else images.as_cpu())[0])

    def _take(self, epoch: int, number: int, stream: Any) -> dict[tuple[int, int], ReadBatch]:
        """Batch `number` of `epoch` and the others of its group; nothing if it must be requested again."""
        if self._graph is None or self._next != (epoch, number):
            self.stop()
            inputs = self._pull(epoch, number)
            source = self._source
            graph = partial(Graph, inputs, source.stores, self._views, self._settings, self._checker)
            self._graph = graph(source.read, masks_of(source))
        try:
            views = self._graph.take(stream)
            group = ReadGroup(views, self._pulled.popleft(), self._graph.masks)
            numbers = range(group.planned.number, group.planned.number + len(group.planned))
            self._next, self._retried = self._after((epoch, numbers[-1])), None
            return {(epoch, own): ReadBatch(group, place) for place, own in enumerate(numbers)}
        except RuntimeError as failure:
            planned = self._pulled[0] if self._pulled else None  # None if the source itself failed
            self.stop()
            self._explain(failure, planned, epoch, number)
            return {}
        except BaseException:
            self.stop()  # what was pulled may be lost, as after an interrupt
            raise

    def _explain(self, failure: RuntimeError, group: GroupPlan | None, epoch: int, number: int) -> None:
        """Find out why DALI failed on a group that starts with batch `number`; return if it should be requested again.

        Raises:
            BadSampleError, TooManyBadSamplesError: a sample is the reason.
            RuntimeError: `failure` itself, if it is the source's or came for the second time.
        """
        if group is not None and len(group) > 1:
            # An error is raised at the batch that it belongs to.
            _logger.debug("DALI failed on %d batches at once; one by one up to epoch %d", len(group), epoch + 1)
            self._ungrouped = epoch
            return
        if group is not None and self.bad_samples.examine(group.plan.index):
            return
        if group is None or self._retried == (epoch, number):
            self._retried = None
            failure.add_note(f"while DALI worked on batch {number + 1} of epoch {epoch + 1}, {self._plan.shard}")
            raise failure
        # Each image alone decodes: other processes may have taken the memory for a moment.
        _logger.warning(
            "DALI failed on batch %d of epoch %d but on none of its images; trying again", number + 1, epoch + 1
        )
        self._retried = epoch, number

    def _after(self, position: tuple[int, int]) -> tuple[int, int]:
        """Epoch and number of the batch after `position`."""
        epoch, number = position
        return (epoch, number + 1) if number + 1 < self._plan.num_batches(epoch) else (epoch + 1, 0)

    def stop(self) -> None:
        """Stop DALI and drop what it read ahead."""
        self._pulled.clear()
        self._ready.clear()
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def close(self) -> None:
        """Stop DALI and all threads for good."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self._epochs.close()
        self._checker.close()

    def _pull(self, epoch: int, number: int) -> Iterator[GraphInput]:
        """Endless inputs of the graph from batch `number` of `epoch` on, as DALI requests them.

        The first group is one batch, which comes soon, and each further group is twice as large, up to the limits.
        """
        size = 1
        for block, inputs in _one_ahead(self._blocks(epoch, number), self._thread):
            place = 0
            while place < len(block):
                end = block.end(place, size)
                self._pulled.append(block.part(place, end))
                yield inputs.part(slice(block.ends[place], block.ends[end]))
                size = 1 if block.epoch == self._ungrouped else min(2 * size, self._max_batches())
                place = end

    def _max_batches(self) -> int:
        """How many batches may form a group, given the size of the files read last."""
        area = float("nan") if self._graph is None else self._graph.mean_area
        fitting = _GROUP_FILE_PIXELS // (area * self._plan.batch_size) if area > 0 else 1
        return max(1, min(self._group_size, int(fitting)))

    def _blocks(self, epoch: int, number: int) -> Iterator[tuple[GroupPlan, GraphInput]]:
        """Many batches at once, without end.

        The set of unreadable samples does not change meanwhile: whoever finds one stops and starts again.
        """
        are_pixels = self._source.stores == "pixels"
        is_told_on_cpu = self._source.stores == "bytes" and self._settings.device_id is None
        num_samples = 1 if are_pixels else _BLOCK_OF_BYTES if is_told_on_cpu else _BLOCK
        size = max(1, num_samples // self._plan.batch_size)
        while True:
            order = self._epochs.at(epoch)
            while number < len(order):
                plan, lengths = order.batches(number, min(number + size, len(order)))
                ends = [0, *accumulate(lengths)]
                numbers = np.arange(number, number + len(lengths))
                sizes = self._views.sizes(numbers, seed=self._plan.seed, epoch=epoch)
                metadata, inputs = self._prepare(plan, ends, epoch, sizes)
                yield GroupPlan(epoch, number, ends, plan, metadata, sizes), inputs
                number += len(lengths)
                if are_pixels:
                    fitting = _MAX_RECYCLED // (inputs.data[0].nbytes * self._plan.batch_size)
                    size = max(1, min(self._group_size, fitting))
            epoch, number = epoch + 1, 0

    def _prepare(
        self, plan: BatchPlan, ends: list[int], epoch: int, sizes: list[Sizes]
    ) -> tuple[NDArray[np.int64], GraphInput]:
        """The metadata of the batches that `plan` has one after the other, and their samples as one input."""
        index, readable = self.bad_samples.substitute(plan.index)
        data = self._data_of(index)
        valid = plan.valid & readable
        at_least = 0 if self._mix is None else self._mix.num_draws
        draws = self._views.draw(index, seed=self._plan.seed, epoch=epoch, repeat=plan.repeat, at_least=at_least)
        labels = np.full(len(index), -1) if self._labels is None else self._labels[index]
        metadata = np.stack([index, labels, valid])
        if self._mix is not None:
            (own,) = draws[IMAGES]
            mixing = [
                self._plan_mixing(self._mix, own[first:end], valid[first:end], self._views.at(batch))
                for (first, end), batch in zip(pairwise(ends), sizes, strict=True)
            ]
            metadata = np.concatenate([metadata, np.concatenate(mixing).T])
        inputs = GraphInput(
            index=index,
            data=data,
            crops=self._views.crops(draws),
            parameters=self._parameters(draws, ends, sizes),
        )
        return metadata, inputs

    def _parameters(self, draws: Draws, ends: list[int], sizes: list[Sizes]) -> tuple[NDArray[Any], ...]:
        """Parameters of all that follows the crops, with each batch at its sizes."""
        runs = [(own, len(list(batches))) for own, batches in groupby(sizes)]
        if len(runs) == 1:
            return self._views.at(sizes[0]).parameters(draws)
        parts, place = [], 0
        for own, num_batches in runs:
            rows = slice(ends[place], ends[place + num_batches])
            place += num_batches
            part = {name: [numbers[rows] for numbers in copies] for name, copies in draws.items()}
            parts.append(self._views.at(own).parameters(part))
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _data_of(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """What the graph needs of the samples at `index` `[N]`; see `GraphInput.data`."""
        if self._plan.keeps_shards and (masks := masks_of(self._source)) is not None:
            masks.expect(index)
        if self._source.stores == "bytes":
            if self._plan.keeps_shards and (expect := getattr(self._source, "expect", None)) is not None:
                expect(index)
            return index
        data: NDArray[np.uint8] = self._source.read(index)
        return self._checker.kinds.only_files(index, data) if self._source.stores == "files" else data

    def _plan_mixing(
        self, mix: MixSettings, draws: NDArray[np.float64], valid: NDArray[np.bool_], views: Views
    ) -> NDArray[np.int64]:
        return plan_mixing(mix, draws, valid, size=views.images.height_width, repeats=self._plan.repeats)


class _Epochs:
    """Plans of epochs. The next one is made in a thread: ten million samples take a second."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._thread = ThreadPoolExecutor(1, "kd_pipeline-order")
        self._known: dict[int, Future[EpochPlan]] = {}

    def at(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; that one and the next are kept."""
        self._known = {
            number: self._known.get(number) or self._thread.submit(self._plan.epoch, number)
            for number in (epoch, epoch + 1)
        }
        return self._known[epoch].result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def group_size(batch_size: int, views: Views, *, num_threads: int, on_gpu: bool) -> int:
    """How many batches DALI processes at once.

    After each op its threads wait for the slowest image, and the time in Python hardly depends on the number of images.
    """
    for view in views:
        for height, width in view.sizes:
            image_bytes = view.copies * 3 * height * width * np.dtype(view.normalize.dtype).itemsize
            if batch_size * image_bytes % _ALIGNMENT:
                return 1
    images = _GROUP_IMAGES if on_gpu else min(_GROUP_IMAGES, _GROUP_PER_THREAD * num_threads)
    area = sum(view.copies * math.prod(view.height_width) for view in views)
    images = min(images, images * _GROUP_SIDE**2 // area)
    return max(1, images // batch_size)


def _one_ahead(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """The items of an endless iterator; while one is used, `thread` makes the next."""
    coming = thread.submit(next, items)
    while True:
        item, coming = coming.result(), thread.submit(next, items)
        yield item
