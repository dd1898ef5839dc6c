"""The only module that builds DALI pipelines: planned samples in, transformed images out."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline.data.auto_augment import Node
from kd_pipeline.data.file_kinds import FileKinds
from kd_pipeline.data.file_reading import CallThread, ReadThread, require_encoded
from kd_pipeline.data.graph_settings import GraphInput, GraphSettings
from kd_pipeline.data.headers import Decoder, check_size, max_file_bytes, read_header
from kd_pipeline.data.headers.base import PLAIN_PIXEL_BYTES
from kd_pipeline.data.mask_reader import MaskReader
from kd_pipeline.data.rendering import Rendering, Stores, decode_windows, peek_shape
from kd_pipeline.data.sources.base import Encoded
from kd_pipeline.data.sources.masks.masks import Masks
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError

__all__ = ["FileChecker", "Graph"]

_READS_AHEAD = 3
"""Groups of batches whose bytes are being read, or wait, so that a store that answers late does not delay them."""


class Graph:
    """Two DALI pipelines, which pull batches from an iterator and return their images in the same order.

    The first pipeline reads the files of a batch; of a source that stores bytes, threads let it read these. Python
    looks at the header of each file once, as DALI decodes some kinds wrongly without an error; Pillow decodes these.
    NumPy computes the windows from the sizes of the images, and the second pipeline decodes and augments these: in a
    pipeline, the same arithmetic takes one node for each step, and each node takes longer than NumPy does for all of
    them. Both run in DALI's own threads. The first is one batch ahead of the second, and the second up to `prefetch`
    batches ahead of the caller.
    """

    def __init__(
        self,
        inputs: Iterator[GraphInput],
        stores: Stores,
        views: Views,
        settings: GraphSettings,
        checker: "FileChecker",
        read: Callable[[NDArray[np.int64]], Encoded] | None = None,
        masks: Masks | None = None,
    ) -> None:
        """`read` is that of a source that stores bytes, and `masks` are those of a source that has some."""
        self._rendering = Rendering(views, stores, settings)
        # DALI asks for the two parts of a batch separately, in any order.
        self._images: deque[Any] = deque()
        self._parameters: deque[tuple[NDArray[Any], ...]] = deque()
        self._failure: Exception | None = None
        self._pipeline = _pipeline(settings, settings.device_id, settings.prefetch)
        with self._pipeline:
            self._pipeline.set_outputs(*self._define())
        self._pipeline.build()
        self.masks: NDArray[Any] | None = None
        """Those of the batch that `take` returned last, `[N, H, W]`, or None."""
        self._masked: deque[NDArray[Any]] = deque()
        self._mask_reader: MaskReader | None = None
        if masks is not None:
            self._mask_reader = MaskReader(masks, views.images, settings.max_pixels)
            inputs = self._mask_reader.following(inputs)
        self._read: _Encoded | _Pixels
        if stores == "pixels":
            self._read = _Pixels(inputs)
        elif stores == "files":
            self._read = _Encoded(_Files(inputs, settings), settings, checker)
        else:
            assert read is not None
            self._read = _Encoded(_Bytes(inputs, read, settings), settings, checker)

    @property
    def mean_area(self) -> float:
        """Mean number of pixels of the images read last, before cropping; NaN before the first batch."""
        return self._read.mean_area

    def take(self, stream: Any = None) -> dict[str, Any]:
        """The views of the next batch by name, `[N, 3, H, W]` or `[N, count, 3, H, W]`, as dense DALI tensors.

        On a GPU they are ordered on `stream` and the host does not wait.

        Raises:
            RuntimeError: DALI cannot read or decode a sample of this batch; close the graph and build a new one.
            StopIteration: there are no more inputs.
        """
        try:
            # The two halves of `run`, which would add a tenth of a millisecond of Python.
            self._pipeline.schedule_run()
            outputs = self._pipeline.outputs(stream)
        except StopIteration:
            if self._failure is None:
                raise
            raise self._failure from None
        if self._mask_reader is not None:
            self.masks = self._masked.popleft()
        return {view.name: output.as_tensor() for view, output in zip(self._rendering.views, outputs, strict=True)}

    def close(self) -> None:
        """Stop DALI's threads. Batches in use stay valid, and a second call does nothing."""
        self._pipeline = None
        self._read.close()
        if self._mask_reader is not None:
            self._mask_reader.close()

    def _advance(self) -> None:
        """Prepare the next batch for DALI."""
        if self._failure is not None:
            raise StopIteration
        try:
            batch = self._read.next()
            if self._mask_reader is not None:
                self._masked.append(self._mask_reader.take(batch.inputs.index, batch.size))
        except Exception as failure:
            self._failure = failure  # raised after the batches before it have been taken
            raise StopIteration from None
        self._images.append(batch.images)
        placed = self._rendering.place(batch.size, batch.inputs.crops)
        self._parameters.append((*placed, *batch.inputs.parameters))

    def _next_images(self) -> Any:
        if not self._images:
            self._advance()
        return self._images.popleft()

    def _next_parameters(self) -> tuple[NDArray[Any], ...]:
        if not self._parameters:
            self._advance()
        return self._parameters.popleft()

    def _define(self) -> list[Node]:
        fn = require("nvidia.dali.fn", extra="cpu")
        rendering = self._rendering
        # Nothing is copied when it is handed over: DALI holds arrays and lists until it has used them. No GPU reads
        # them later than that: what goes there DALI copies into its own pinned memory first, in its threads
        # (`InputOperator::ForwardCurrentData`), and named arguments its ops read on the host before they return.
        if rendering.stores == "pixels":
            images = fn.external_source(self._next_images, ndim=3, layout="HWC", no_copy=True)
            images = images if rendering.settings.device_id is None else images.gpu()
        else:
            images = fn.external_source(self._next_images, ndim=1, no_copy=True)
        ndims = rendering.ndims
        parameters = fn.external_source(self._next_parameters, num_outputs=len(ndims), ndim=ndims, no_copy=True)
        return rendering.make(images, parameters)


@dataclass(frozen=True, slots=True)
class _Batch:
    inputs: GraphInput
    images: Any
    """Encoded files or pixels, as DALI takes them."""
    size: NDArray[np.float64]
    """`[N, 2]`, height and width."""


class _Encoded:
    """Checks the encoded images of each batch; those of the next one are being read meanwhile."""

    def __init__(self, fetch: "_Files | _Bytes", settings: GraphSettings, checker: "FileChecker") -> None:
        self._fetch, self._max_pixels, self._checker = fetch, settings.max_pixels, checker
        self._may_change = isinstance(fetch, _Files)  # and a source of bytes notices itself if they do
        self._failure: Exception | None = None
        self.mean_area = float("nan")
        fn = require("nvidia.dali.fn", extra="cpu")
        self._encoded: Any = None
        self._shapes = _pipeline(settings, None, prefetch=1)
        with self._shapes:
            encoded = fn.external_source(lambda: self._encoded, ndim=1, no_copy=True)
            self._shapes.set_outputs(peek_shape(settings, encoded))
        self._shapes.build()
        self._fetch.request()

    def next(self) -> _Batch:
        """The next batch; the one after it is being read when this returns.

        Raises:
            RuntimeError: a sample cannot be read, has no header that DALI knows, has too many pixels, or is cut off.
            StopIteration: there are no more batches.
        """
        if self._failure is not None:
            raise self._failure
        inputs, encoded = self._fetch.take()
        self._encoded, decoders, pixel_bytes = self._checker.replace_rare(
            inputs.index, encoded, may_change=self._may_change
        )
        (shapes,) = self._shapes.run()
        size = np.asarray(shapes.as_tensor())[:, :2].astype(np.float64)
        area = size[:, 0] * size[:, 1]
        self.mean_area = area.mean()
        try:
            self._fetch.request()
        except Exception as failure:
            self._failure = failure  # of the next batch
        # Not left to the decoder, which would refuse a window outside of the image: when one of DALI's threads refuses
        # a sample of a large batch, the others may continue in memory that was freed (DALI 2.4,
        # `ImageDecoder::SetupImpl` in dali/operators/imgcodec).
        is_large = (area > self._max_pixels) | (area * pixel_bytes > PLAIN_PIXEL_BYTES * self._max_pixels)
        (refused,) = np.nonzero((size.min(axis=1) < 1) | is_large)
        if len(refused):
            raise RuntimeError(f"no pixels, or more than {self._max_pixels}: samples {inputs.index[refused]}")
        for row in np.flatnonzero(decoders == Decoder.DALI_CHECKED):
            self._checker.require_intact(int(inputs.index[row]), np.asarray(encoded[row]))
        return _Batch(inputs, self._encoded, size)

    def close(self) -> None:
        self._shapes = self._encoded = None
        self._fetch.close()


class _Files:
    """Reads the files of each batch, one batch ahead."""

    def __init__(self, inputs: Iterator[GraphInput], settings: GraphSettings) -> None:
        self._inputs = inputs
        self._requested: deque[GraphInput] = deque()
        fn = require("nvidia.dali.fn", extra="cpu")
        self._pipeline = _pipeline(settings, None, prefetch=1)
        with self._pipeline:
            # Faster than mapping, as the whole file is needed.
            names = fn.external_source(self._next_names, ndim=1, no_copy=True)
            self._pipeline.set_outputs(fn.io.file.read(names, dont_use_mmap=True))
        self._pipeline.build()
        self._reading = ReadThread(self._pipeline, lambda: (name for inputs in self._requested for name in inputs.data))

    def request(self) -> None:
        """Start to read the next batch."""
        self._pipeline.schedule_run()

    def take(self) -> tuple[GraphInput, Any]:
        """The batch that was requested first, and DALI's list of its files.

        Raises:
            RuntimeError: one of them cannot be read.
        """
        (encoded,) = self._reading.outputs()
        return self._requested.popleft(), encoded

    def close(self) -> None:
        if self._pipeline is not None:
            reference, self._pipeline = weakref.ref(self._pipeline), None
            if not self._reading.close():
                # Or DALI would wait for it when the interpreter exits.
                require("nvidia.dali", extra="cpu").Pipeline._pipes.discard(reference)

    def _next_names(self) -> NDArray[np.uint8]:
        self._requested.append(next(self._inputs))
        return self._requested[-1].data


class _Bytes:
    """Lets the source read the bytes of each batch, a few batches ahead."""

    def __init__(
        self, inputs: Iterator[GraphInput], read: Callable[[NDArray[np.int64]], Encoded], settings: GraphSettings
    ) -> None:
        self._inputs, self._read = inputs, read
        self._max_bytes = max_file_bytes(settings.max_pixels)
        self._requested: deque[tuple[GraphInput, Future[Encoded]]] = deque()
        self._threads = cycle([CallThread() for _ in range(_READS_AHEAD)])
        self._failure: Exception | None = None

    def request(self) -> None:
        """Start to read batches until enough are being read or wait."""
        while self._failure is None and len(self._requested) < _READS_AHEAD:
            try:
                inputs = next(self._inputs)
            except Exception as failure:
                self._failure = failure  # raised after the batches before it
                break
            self._requested.append((inputs, next(self._threads).call(partial(self._read, inputs.data))))
        if not self._requested and self._failure is not None:
            raise self._failure

    def take(self) -> tuple[GraphInput, Any]:
        """The batch that was requested first, and DALI's list of its images, which are not copied.

        Raises:
            UnreadableFileError: a sample has no bytes, or too many.
            StorageError: the store does not give them.
        """
        inputs, read = self._requested[0]
        images = read.result()
        self._requested.popleft()
        for image in images:
            require_encoded(image, max_bytes=self._max_bytes)
        return inputs, _list_of(images)

    def close(self) -> None:
        for _, read in self._requested:
            read.cancel()
        self._requested.clear()
        for _ in range(_READS_AHEAD):
            next(self._threads).end()


class _Pixels:
    """Passes on images that are pixels already."""

    def __init__(self, inputs: Iterator[GraphInput]) -> None:
        self._inputs = inputs
        self.mean_area = float("nan")

    def next(self) -> _Batch:
        inputs = next(self._inputs)
        num_images, *size, _ = inputs.data.shape
        sizes = np.tile(np.array(size, dtype=np.float64), (num_images, 1))
        self.mean_area = sizes[0].prod()
        return _Batch(inputs, inputs.data, sizes)

    def close(self) -> None:
        pass


class FileChecker:
    """Checks files before the graph decodes them, or one at a time, with the decoders that the graph uses."""

    def __init__(self, settings: GraphSettings) -> None:
        self._settings = settings
        self.kinds = FileKinds(
            orientation=settings.orientation, max_pixels=settings.max_pixels, num_threads=settings.num_threads
        )
        """What is known about the files."""
        self._file: NDArray[np.uint8]
        self._extent = np.zeros(2, dtype=np.float32)
        self._pipelines: dict[str, Any] = {}

    def replace_rare(
        self, index: NDArray[np.int64], encoded: Any, *, may_change: bool
    ) -> tuple[Any, NDArray[np.uint8], NDArray[np.uint32]]:
        """DALI's list of the files of the samples at `index` `[N]` as DALI can decode them.

        Args:
            index: indices in the dataset.
            encoded: DALI's list of the files.
            may_change: whether a file may be another one than when it was seen before.

        Returns:
            The list, and for each file `[N]` its decoder, and the bytes that DALI takes for a pixel.

        Raises:
            UnreadableFileError: one of them is of a kind that no decoder reads rightly.
        """
        shape = chain.from_iterable(encoded.shape()) if may_change else None
        lengths = None if shape is None else np.fromiter(shape, np.int64, len(index))
        decoders, pixel_bytes = self.kinds.decoders(index, lengths, lambda row: np.asarray(encoded[row]))
        (rare,) = np.nonzero(decoders == Decoder.PILLOW)
        if len(rare):
            files = self.kinds.as_pnm([np.asarray(encoded[row]) for row in rare.tolist()])
            replaced = dict(zip(rare.tolist(), files, strict=True))
            encoded = _list_of([replaced.get(row, encoded[row]) for row in range(len(index))])
            pixel_bytes[rare] = PLAIN_PIXEL_BYTES
        return encoded, decoders, pixel_bytes

    @property
    def max_bytes(self) -> int:
        """The most bytes that an encoded image may have."""
        return max_file_bytes(self._settings.max_pixels)

    def size(self, content: NDArray[np.uint8]) -> tuple[int, int]:
        """Height and width in the header of an encoded image `[L]`.

        Raises:
            RuntimeError: no decoder knows the header.
        """
        self._load(content)
        return self._size()

    def decode(self, content: NDArray[np.uint8]) -> Any:
        """Decode all of an encoded image `[L]`; returns DALI's list with its pixels.

        Raises:
            RuntimeError: this fails, or the header claims no pixels or more than `max_pixels` allows.
        """
        pixel_bytes = self._load(content)
        height, width = self._size()
        check_size(height, width, pixel_bytes, self._settings.max_pixels)
        self._extent = np.array([height, width], dtype=np.float32)
        return self._run("pixels")[0]

    def require_intact(self, index: int, content: NDArray[np.uint8]) -> None:
        """Decode all of the encoded image `[L]` of sample `index`, which is then known as intact.

        Raises:
            RuntimeError: as `decode`.
        """
        self.decode(content)
        self.kinds.set_intact(index)

    def close(self) -> None:
        """Stop all threads; the next file starts new ones."""
        self._pipelines.clear()
        self.kinds.close()

    def _load(self, content: NDArray[np.uint8]) -> int:
        """Read the header of an encoded image; returns the bytes that DALI takes for a pixel of it."""
        header = read_header(content.data)
        is_rare = header.decoder is Decoder.PILLOW
        self._file = self.kinds.as_pnm([content])[0] if is_rare else content
        return PLAIN_PIXEL_BYTES if is_rare else header.pixel_bytes

    def _size(self) -> tuple[int, int]:
        (shape,) = self._run("header")
        height, width, _ = np.asarray(shape[0])
        return int(height), int(width)

    def _run(self, part: Literal["header", "pixels"]) -> Any:
        if part not in self._pipelines:
            self._pipelines[part] = self._build(part)
        try:
            return self._pipelines[part].run()
        except RuntimeError:
            # A pipeline may not survive an error.
            del self._pipelines[part]
            raise

    def _build(self, part: Literal["header", "pixels"]) -> Any:
        fn = require("nvidia.dali.fn", extra="cpu")
        pipeline = _pipeline(replace(self._settings, max_batch=1, num_threads=1), self._settings.device_id, prefetch=1)
        with pipeline:
            encoded = fn.external_source(lambda: [self._file], ndim=1, no_copy=True)  # see `Graph`
            if part == "header":
                output = peek_shape(self._settings, encoded)
            else:
                # In the mode of the graph: a file that one decoder refuses may be fine for the other.
                extent = fn.external_source(lambda: self._extent[None], ndim=1)
                output = decode_windows(self._settings, encoded, extent * 0, extent)
            pipeline.set_outputs(output)
        return pipeline


def _list_of(images: Sequence[Any]) -> Any:
    """DALI's list of encoded images, arrays `[L]` or tensors of DALI's, which it holds and does not copy."""
    backend = require("nvidia.dali.backend", extra="cpu")
    tensors = [backend.TensorCPU(image, "") if isinstance(image, np.ndarray) else image for image in images]
    return backend.TensorListCPU(tensors, "", False)


def _pipeline(settings: GraphSettings, device_id: int | None, prefetch: int) -> Any:
    dali = require("nvidia.dali", extra="cpu")
    pipeline = dali.Pipeline(
        batch_size=settings.max_batch,
        num_threads=settings.num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    if not pipeline.exec_dynamic:
        # Only this executor does not reuse a buffer that is still held.
        raise ConfigError("DALI's dynamic executor is off; unset DALI_* variables that select another executor")
    return pipeline
