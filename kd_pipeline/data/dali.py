"""The only file that builds a DALI pipeline: planned samples in, finished images out."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline.data.transforms import EvalTransform, Node, TrainTransform, ops_of
from kd_pipeline.errors import ConfigError

__all__ = ["DecodeWay", "Graph", "GraphSettings", "Probe", "Samples"]

DecodeWay = Literal["window", "full"]
"""Decode only the crop's window of a file, or the whole image, from which the window is cut afterward."""

_JPEG_START, _JPEG_END = np.frombuffer(b"\xff\xd8\xff\xd9", np.uint16)
_DOUBTFUL = np.frombuffer(b"IIMM\xff\x4f\x00\x00BM", np.uint16)
"""What TIFF and JPEG 2000 files start with, which are decoded in part, and BMP files, whose header says too little."""
_IN_PIXELS = {"axes": (0, 1), "normalized_anchor": False, "normalized_shape": False}
"""How windows are given."""


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """What a graph is built for, besides source and transform."""

    max_batch: int
    device_id: int | None
    """Ordinal of the GPU, or None for the CPU."""
    num_threads: int
    prefetch: int
    """How many batches are in DALI's queue, the one that is taken among them."""
    max_pixels: int
    """Images with more pixels than this are refused from their header."""
    decode: DecodeWay
    """On a CPU both give the same pixels; windows are faster."""
    hw_decoder_load: float
    """Share of JPEG images that a GPU's hardware decoder gets."""


@dataclass(frozen=True, slots=True)
class Samples:
    """One batch as the graph takes it."""

    index: NDArray[np.int64]
    """`[N]`, positions in the dataset."""
    data: NDArray[np.uint8]
    """`[N, L]` file names, NUL-padded, or `[N, H, W, 3]` pixels."""
    crop: tuple[NDArray[np.float64], ...]
    """`[N, ...]` each, what the transform's crop makes of the samples' uniform numbers."""
    parameters: tuple[NDArray[Any], ...]
    """`[N, ...]` each, what `parameters_of` makes of them for all that follows the crop."""

    def part(self, rows: slice) -> "Samples":
        """Some of them; nothing is copied."""
        crop, parameters = (tuple(part[rows] for part in parts) for parts in (self.crop, self.parameters))
        return Samples(self.index[rows], self.data[rows], crop, parameters)


class Graph:
    """Built DALI pipelines; batches are pulled from `samples` and come out in the same order.

    One pipeline reads a batch of files and their headers. From the sizes of its images NumPy computes the windows,
    and with them the second pipeline decodes and augments: the same arithmetic within a pipeline takes one node for
    each step, and each node more time than NumPy needs for all of them. Both work in DALI's own threads while the
    caller does something else, the first one batch ahead of the second, and that up to `prefetch` batches.
    """

    def __init__(
        self,
        samples: Iterator[Samples],
        stores: Literal["files", "pixels"],
        transform: TrainTransform | EvalTransform,
        settings: GraphSettings,
        probe: "Probe",
    ) -> None:
        self._transform = transform
        # DALI asks for the two parts of a batch separately, in an order of its own.
        self._images: deque[Any] = deque()
        self._inputs: deque[tuple[NDArray[Any], ...]] = deque()
        self._failure: Exception | None = None
        self._pipeline = _pipeline(settings, settings.device_id, settings.prefetch)
        with self._pipeline:
            self._pipeline.set_outputs(self._define(stores, settings))
        self._pipeline.build()
        self._read = _Files(samples, settings, probe) if stores == "files" else _Pixels(samples)

    @property
    def mean_area(self) -> float:
        """Pixels of the images that were read last, before anything is cut off; NaN before the first."""
        return self._read.mean_area

    def take(self, stream: Any = None) -> Any:
        """Images of the next batch, as a dense DALI tensor.

        On a GPU they are ordered on `stream` and nothing waits; on the CPU they are finished.

        Raises:
            RuntimeError: DALI could not read or decode a sample of this batch; the graph is to be thrown away.
            StopIteration: `samples` has ended.
        """
        try:
            # The two halves of `run`, which itself adds a tenth of a millisecond of Python.
            self._pipeline.schedule_run()
            (images,) = self._pipeline.outputs(stream)
        except StopIteration:
            if self._failure is None:
                raise
            raise self._failure from None
        return images.as_tensor()

    def close(self) -> None:
        """Stop DALI's threads; batches that somebody still holds stay valid."""
        del self._pipeline
        self._read.close()

    def _advance(self) -> None:
        """Get the next batch ready for DALI to ask for."""
        if self._failure is not None:
            raise StopIteration
        try:
            batch = self._read.next()
        except Exception as failure:
            self._failure = failure  # its turn comes when the batches before it have been taken
            raise StopIteration from None
        cut = self._transform.crop.cut(batch.size, *batch.samples.crop)
        self._images.append(batch.images)
        self._inputs.append((*(part.astype(np.float32) for part in cut), *batch.samples.parameters))

    def _next_images(self) -> Any:
        """What DALI's external source calls for the images of the next batch."""
        if not self._images:
            self._advance()
        return self._images.popleft()

    def _next_inputs(self) -> tuple[NDArray[Any], ...]:
        """What it calls for the numbers that belong to them."""
        if not self._inputs:
            self._advance()
        return self._inputs.popleft()

    def _define(self, stores: Literal["files", "pixels"], settings: GraphSettings) -> Node:
        fn = require("nvidia.dali.fn", extra="cpu")
        if stores == "files":
            images = fn.external_source(self._next_images, ndim=1, no_copy=True)  # what was read is used where it lies
            cut: Callable[..., Node] = partial(_decode_windows, settings)
        else:
            images = fn.external_source(self._next_images, ndim=3, layout="HWC")
            images = images if settings.device_id is None else images.gpu()
            cut = _cut
        ops = (self._transform.crop, *ops_of(self._transform))
        ndims = [1, 1, *(ndim for op in ops for ndim in op.ndims)]
        corner, extent, *inputs = fn.external_source(self._next_inputs, num_outputs=len(ndims), ndim=ndims)
        images = cut(images, corner, extent)
        for op in ops:
            images = op.apply(images, *inputs[: len(op.ndims)])
            inputs = inputs[len(op.ndims) :]
        return images


@dataclass(frozen=True, slots=True)
class _Batch:
    """What was read of `samples`."""

    samples: Samples
    images: Any
    """Files or pixels as DALI takes them."""
    size: NDArray[np.float64]
    """`[N, 2]`, height and width."""


class _Files:
    """Reads the files of each batch and their headers, one batch ahead."""

    def __init__(self, samples: Iterator[Samples], settings: GraphSettings, probe: "Probe") -> None:
        self._samples, self._max_pixels, self._probe = samples, settings.max_pixels, probe
        self._asked: deque[Samples] = deque()
        self._failure: Exception | None = None
        self.mean_area = float("nan")
        fn = require("nvidia.dali.fn", extra="cpu")
        self._pipeline = _pipeline(settings, None, prefetch=1)
        with self._pipeline:
            # Reading a file at once is quicker than mapping it: all of it is needed, page by page.
            encoded = fn.io.file.read(fn.external_source(self._next_names, ndim=1), dont_use_mmap=True)
            self._pipeline.set_outputs(encoded, fn.peek_image_shape(encoded), encoded[:2], encoded[-2:])
        self._pipeline.build()
        self._pipeline.schedule_run()

    def next(self) -> _Batch:
        """The next batch; the one behind it is being read when this returns.

        Raises:
            RuntimeError: a file cannot be read, has no header that DALI knows, has too many pixels, or has no end.
            StopIteration: there is none.
        """
        if self._failure is not None:
            raise self._failure
        encoded, *facts = self._pipeline.outputs()
        samples = self._asked.popleft()
        shape, start, end = (np.asarray(fact.as_tensor()) for fact in facts)
        size = shape[:, :2].astype(np.float64)
        area = size[:, 0] * size[:, 1]
        self.mean_area = area.mean()
        try:
            self._pipeline.schedule_run()
        except Exception as failure:
            self._failure = failure  # the next batch's
        # Refused here and not by the decoder, although it would do so for a window outside of the image: where one of
        # DALI's threads refuses a sample of a large batch, the others may go on in memory that is gone by then
        # (DALI 2.4, `ImageDecoder::SetupImpl` in dali/operators/imgcodec).
        (refused,) = np.nonzero((size.min(axis=1) < 1) | (area > self._max_pixels))
        if len(refused):
            raise RuntimeError(f"no pixels, or more than {self._max_pixels}: samples {samples.index[refused]}")
        for place in np.flatnonzero(_may_hide_damage(start, end)):
            self._probe.vouch(int(samples.index[place]), samples.data[place])
        return _Batch(samples, encoded, size)

    def close(self) -> None:
        """Stop DALI's threads."""
        del self._pipeline

    def _next_names(self) -> NDArray[np.uint8]:
        """What DALI's external source calls for the next batch."""
        self._asked.append(next(self._samples))
        return self._asked[-1].data


class _Pixels:
    """Hands on images that are pixels already."""

    def __init__(self, samples: Iterator[Samples]) -> None:
        self._samples = samples
        self.mean_area = float("nan")

    def next(self) -> _Batch:
        """The next batch.

        Raises:
            StopIteration: there is none.
        """
        samples = next(self._samples)
        num_images, *size, _ = samples.data.shape
        sizes = np.tile(np.array(size, dtype=np.float64), (num_images, 1))
        self.mean_area = sizes[0].prod()
        return _Batch(samples, samples.data, sizes)

    def close(self) -> None:
        """Nothing runs."""


class Probe:
    """Looks at one file at a time, with the decoder that the graph uses: at its header, or at all of its pixels."""

    def __init__(self, settings: GraphSettings) -> None:
        self._settings = settings
        self._sound: set[int] = set()
        self._path: NDArray[np.uint8]
        self._extent = np.zeros(2, dtype=np.float32)
        self._pipelines: dict[str, Any] = {}

    def size(self, path: NDArray[np.uint8]) -> tuple[int, int]:
        """Height and width that the header of the file `path` `[L]` claims.

        Raises:
            RuntimeError: the file cannot be opened, or DALI does not know such a header.
        """
        (shape,) = self._look("header", path)
        height, width, _ = np.asarray(shape[0])
        return int(height), int(width)

    def decode(self, path: NDArray[np.uint8]) -> None:
        """Decode all of the file `path` `[L]`.

        Raises:
            RuntimeError: DALI cannot, or the header claims no pixels or more than `max_pixels`.
        """
        height, width = self.size(path)
        if min(height, width) < 1 or height * width > self._settings.max_pixels:
            raise RuntimeError(f"{width}x{height} pixels, where there may be 1 to {self._settings.max_pixels}")
        self._extent = np.array([height, width], dtype=np.float32)
        self._look("pixels", path)

    def vouch(self, index: int, path: NDArray[np.uint8]) -> None:
        """Decode all of the file `path` `[L]` of sample `index`, unless that is known to succeed.

        Raises:
            RuntimeError: as `decode`.
        """
        if index not in self._sound:
            self.decode(path)
            self._sound.add(index)

    def close(self) -> None:
        """Stop DALI's threads; the next look starts new ones."""
        self._pipelines.clear()

    def _look(self, at: Literal["header", "pixels"], path: NDArray[np.uint8]) -> Any:
        """What DALI makes of the file."""
        self._path = path
        if at not in self._pipelines:
            self._pipelines[at] = self._build(at)
        try:
            return self._pipelines[at].run()
        except RuntimeError:
            # Nobody promises that a pipeline outlives an error.
            del self._pipelines[at]
            raise

    def _build(self, at: Literal["header", "pixels"]) -> Any:
        fn = require("nvidia.dali.fn", extra="cpu")
        pipeline = _pipeline(replace(self._settings, max_batch=1, num_threads=1), self._settings.device_id, prefetch=1)
        with pipeline:
            encoded = fn.io.file.read(fn.external_source(lambda: self._path[None], ndim=1), dont_use_mmap=True)
            if at == "header":
                seen = fn.peek_image_shape(encoded)
            else:
                # In the same way as the graph: what one decoder refuses, another may take.
                extent = fn.external_source(lambda: self._extent[None], ndim=1)
                seen = _decode_windows(self._settings, encoded, extent * 0, extent)
            pipeline.set_outputs(seen)
        return pipeline


def _may_hide_damage(start: NDArray[np.uint8], end: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """`[N]`, True for files that may be damaged although one of their windows decodes well.

    Of their first and last bytes, `[N, 2]` each. Whether a sample is readable is not to depend on its view, so these
    are decoded in full once: JPEG files without their end, and all of the doubtful formats.
    """
    first, last = (two.view(np.uint16)[:, 0] for two in (start, end))
    may: NDArray[np.bool_] = (first == _JPEG_START) & (last != _JPEG_END)
    for start_of_kind in _DOUBTFUL:
        may |= first == start_of_kind
    return may


def _pipeline(settings: GraphSettings, device_id: int | None, prefetch: int) -> Any:
    dali = require("nvidia.dali", extra="cpu")
    pipeline = dali.Pipeline(
        batch_size=settings.max_batch,
        num_threads=settings.num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    if not pipeline.exec_dynamic:
        # Only this executor leaves a buffer alone while somebody holds it.
        raise ConfigError("DALI's dynamic executor is off; unset DALI_* variables that select another executor")
    return pipeline


def _decode_windows(settings: GraphSettings, encoded: Node, corner: Node, extent: Node) -> Node:
    """Windows of encoded images, uint8 HWC."""
    fn, decoder = require("nvidia.dali.fn", extra="cpu"), _decoder(settings)
    if settings.decode == "full":
        return _cut(fn.decoders.image(encoded, **decoder), corner, extent)
    return fn.decoders.image_slice(encoded, corner, extent, **_IN_PIXELS, **decoder)


def _cut(images: Node, corner: Node, extent: Node) -> Node:
    """Windows of images that are pixels already."""
    return require("nvidia.dali.fn", extra="cpu").slice(images, corner, extent, **_IN_PIXELS)


def _decoder(settings: GraphSettings) -> dict[str, Any]:
    types = require("nvidia.dali.types", extra="cpu")
    if settings.device_id is None:
        return {"device": "cpu", "output_type": types.RGB}
    return {
        "device": "mixed",
        "output_type": types.RGB,
        "hw_decoder_load": settings.hw_decoder_load,
        # What libjpeg-turbo does on the CPU, so that both devices give the same pixels.
        "jpeg_fancy_upsampling": True,
    }
