"""The only file that builds a DALI pipeline: planned samples in, finished images out."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.transform import EvalTransform, ImageSize, Node, TrainTransform, ops_of
from kd_pipeline.errors import ConfigError
from kd_pipeline.optional import require

__all__ = ["Graph", "GraphSettings", "Probe", "Samples"]

_JPEG_END = 0xD9FF
"""The last two bytes of a JPEG file, as a little-endian number."""
_TINY = 1e-6
"""Divides the extent of a window of one pixel or more into one that no image has."""
_ABSOLUTE = {"normalized_anchor": False, "normalized_shape": False}
"""Windows are given in pixels."""


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """What a graph is built for, besides source and transform."""

    max_batch: int
    device_id: int | None
    """Ordinal of the GPU, or None for the CPU."""
    num_threads: int
    prefetch: int
    """How many batches DALI works on ahead of the one that is taken."""
    max_pixels: int
    """Images with more pixels than this are refused from their header."""
    hw_decoder_load: float
    """Share of JPEG images that a GPU's hardware decoder gets."""


@dataclass(frozen=True, slots=True)
class Samples:
    """One batch as the graph takes it."""

    data: NDArray[np.uint8]
    """`[N, L]` file names, NUL-padded, or `[N, H, W, 3]` pixels."""
    parameters: tuple[NDArray[np.float32], ...]
    """`[N, ...]` each, what `parameters_of` makes of the transform and the samples' uniform numbers."""
    trusted: NDArray[np.bool_]
    """`[N]`, True for files that need not end like a JPEG: other formats, and those known to decode in full."""

    def split(self, sizes: Iterable[int]) -> Iterator["Samples"]:
        """Batches of so many samples each, one behind the other; nothing is copied."""
        ends = list(itertools.accumulate(sizes, initial=0))
        for own in itertools.starmap(slice, itertools.pairwise(ends)):
            parameters = tuple(part[own] for part in self.parameters)
            yield Samples(self.data[own], parameters, self.trusted[own])


class Graph:
    """A built DALI pipeline; batches are pulled from `samples` and come out in the same order.

    DALI pulls `prefetch` batches ahead and works on them in its own threads while the caller does something else.
    """

    def __init__(
        self,
        samples: Iterator[Samples],
        stores: Literal["files", "pixels"],
        transform: TrainTransform | EvalTransform,
        settings: GraphSettings,
    ) -> None:
        self._samples = samples
        self._transform = transform
        self._stores = stores
        dali = require("nvidia.dali", extra="cpu")
        self._pipeline = dali.Pipeline(
            batch_size=settings.max_batch,
            num_threads=settings.num_threads,
            device_id=settings.device_id,
            prefetch_queue_depth=settings.prefetch,
        )
        if not self._pipeline.exec_dynamic:
            # Only this executor leaves a buffer alone while somebody holds it.
            raise ConfigError("DALI's dynamic executor is off; unset DALI_* variables that select another executor")
        with self._pipeline:
            self._pipeline.set_outputs(self._define(settings))
        self._pipeline.build()

    def take(self, stream: Any = None) -> Any:
        """Images of the next batch, as a dense DALI tensor.

        On a GPU they are ordered on `stream` and nothing waits; on the CPU they are finished.

        Raises:
            RuntimeError: DALI could not read or decode a sample of this batch; the graph is to be thrown away.
            StopIteration: `samples` has ended.
        """
        # The two halves of `run`, which itself adds a tenth of a millisecond of Python.
        self._pipeline.schedule_run()
        (images,) = self._pipeline.outputs(stream)
        return images.as_tensor()

    def close(self) -> None:
        """Stop DALI's threads; batches that somebody still holds stay valid."""
        del self._pipeline

    def _next(self) -> tuple[NDArray[Any], ...]:
        """What DALI's external source calls for the next batch."""
        samples = next(self._samples)
        trusted = (samples.trusted,) if self._stores == "files" else ()
        return (samples.data, *trusted, *samples.parameters)

    def _define(self, settings: GraphSettings) -> Node:
        fn = require("nvidia.dali.fn", extra="cpu")
        types = require("nvidia.dali.types", extra="cpu")
        crop, *ops = ops_of(self._transform)
        inputs = [(types.FLOAT, ndim, "") for op in (crop, *ops) for ndim in op.ndims]
        if self._stores == "files":
            inputs = [(types.UINT8, 1, ""), (types.BOOL, 0, ""), *inputs]
        else:
            inputs = [(types.UINT8, 3, "HWC"), *inputs]
        dtypes, ndims, layouts = (list(column) for column in zip(*inputs, strict=True))
        data, *parameters = fn.external_source(
            self._next, num_outputs=len(inputs), dtype=dtypes, ndim=ndims, layout=layouts
        )
        trusted = parameters.pop(0) if self._stores == "files" else None
        own, rest = parameters[: len(crop.ndims)], parameters[len(crop.ndims) :]
        if self._stores == "files":
            # Reading a file at once is quicker than mapping it: all of it is needed, page by page.
            encoded = fn.io.file.read(data, dont_use_mmap=True)
            images, height, width = self._decode(encoded, trusted, own, settings)
        else:
            images, height, width = self._cut(data, own, settings)
        images = crop.finish(images, height, width)
        for op in ops:
            images = op.apply(images, *rest[: len(op.ndims)])
            rest = rest[len(op.ndims) :]
        return images

    def _decode(
        self, encoded: Node, trusted: Node, parameters: list[Node], settings: GraphSettings
    ) -> tuple[Node, Node, Node]:
        """Decode the crop's window of each file; only that part of a JPEG is ever turned into pixels."""
        fn = require("nvidia.dali.fn", extra="cpu")
        types = require("nvidia.dali.types", extra="cpu")
        math = require("nvidia.dali.math", extra="cpu")
        shape = fn.peek_image_shape(encoded)
        size = ImageSize.of(fn.cast(shape, dtype=types.FLOAT))
        # The window of a cut-off JPEG may lie above the cut and decode well; the file is refused all the same,
        # so that whether a sample is readable does not depend on its view.
        is_whole = (fn.reinterpret(encoded[-2:], dtype=types.UINT16) == _JPEG_END) | trusted
        is_small = size.area <= float(settings.max_pixels)
        corner, extent = self._transform.crop.window(size, *parameters)
        # A window far outside of the image has DALI refuse the sample before it decodes anything.
        extent = extent / math.max(is_whole & is_small, _TINY)
        images = fn.decoders.image_slice(encoded, corner, extent, axes=(0, 1), **_ABSOLUTE, **_decoder(settings))
        return images, shape[0], shape[1]

    def _cut(self, pixels: Node, parameters: list[Node], settings: GraphSettings) -> tuple[Node, Node, Node]:
        """Cut the crop's window out of images that are pixels already."""
        fn = require("nvidia.dali.fn", extra="cpu")
        types = require("nvidia.dali.types", extra="cpu")
        shape = pixels.shape()
        corner, extent = self._transform.crop.window(ImageSize.of(fn.cast(shape, dtype=types.FLOAT)), *parameters)
        images = pixels if settings.device_id is None else pixels.gpu()
        return fn.slice(images, corner, extent, axes=(0, 1), **_ABSOLUTE), shape[0], shape[1]


class Probe:
    """Looks at one file at a time, with the decoder that the graph uses: at its header, or at all of its pixels."""

    def __init__(self, settings: GraphSettings) -> None:
        self._settings = settings
        self._path: NDArray[np.uint8]
        self._decoding: Any = None

    def size(self, path: NDArray[np.uint8]) -> tuple[int, int]:
        """Height and width that the header of the file `path` `[L]` claims.

        Raises:
            RuntimeError: the file cannot be opened, or DALI does not know such a header.
        """
        fn = require("nvidia.dali.fn", extra="cpu")
        self._path = path
        height, width, _ = np.asarray(self._build(fn.peek_image_shape).run()[0][0])
        return int(height), int(width)

    def decode(self, path: NDArray[np.uint8]) -> None:
        """Decode all of the file `path` `[L]`.

        Raises:
            RuntimeError: DALI cannot, or the header claims more than `max_pixels`.
        """
        self._path = path
        if self._decoding is None:
            self._decoding = self._build(self._whole_image)
        try:
            self._decoding.run()
        except RuntimeError:
            # Nobody promises that a pipeline outlives an error.
            self._decoding = None
            raise

    def close(self) -> None:
        """Stop DALI's threads; the next look starts new ones."""
        self._decoding = None

    def _build(self, look: Callable[[Node], Node]) -> Any:
        dali = require("nvidia.dali", extra="cpu")
        fn = require("nvidia.dali.fn", extra="cpu")
        pipeline = dali.Pipeline(
            batch_size=1, num_threads=1, device_id=self._settings.device_id, prefetch_queue_depth=1
        )
        with pipeline:
            path = fn.external_source(lambda: self._path[None], dtype=dali.types.UINT8, ndim=1)
            pipeline.set_outputs(look(fn.io.file.read(path)))
        return pipeline

    def _whole_image(self, encoded: Node) -> Node:
        fn = require("nvidia.dali.fn", extra="cpu")
        math = require("nvidia.dali.math", extra="cpu")
        types = require("nvidia.dali.types", extra="cpu")
        size = fn.cast(fn.peek_image_shape(encoded), dtype=types.FLOAT)
        is_small = size[0] * size[1] <= float(self._settings.max_pixels)
        extent = size[:2] / math.max(is_small, _TINY)
        return fn.decoders.image_slice(
            encoded, extent * 0.0, extent, axes=(0, 1), **_ABSOLUTE, **_decoder(self._settings)
        )


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
