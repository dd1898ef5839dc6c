"""Masks of each batch: read beside its images, and cut, warped and flipped as these are, without DALI.

A pixel of the result has the class of one pixel of the file: the one in which its center lies when it is followed back
through the flip, the warps and the window at once. Nothing is rounded in between, as it would be if each step made an
image of its own; DALI's nearest neighbors would also have to be kept in step with its other filters.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.cpu import num_cores
from kd_pipeline.data.affine import RandomAffine
from kd_pipeline.data.auto_augment import Array, AutoAugment
from kd_pipeline.data.file_reading import CallThread
from kd_pipeline.data.graph_settings import GraphInput
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.ops import Normalize
from kd_pipeline.data.sources.masks.masks import Masks
from kd_pipeline.data.views import View
from kd_pipeline.storage import call_each

__all__ = ["MaskReader", "render_masks"]

_MAX_THREADS = 8


class MaskReader:
    """Reads the masks of batches in a thread, which is ahead as far as the images are.

    Args:
        masks: those of the source.
        view: the view `images`, which they follow.
        max_pixels: larger masks count as unreadable.
    """

    def __init__(self, masks: Masks, view: View, max_pixels: int) -> None:
        self._masks, self._view, self._max_pixels = masks, view, max_pixels
        self._thread = CallThread()
        self._requested: deque[Future[_Rendered]] = deque()

    def following(self, inputs: Iterator[GraphInput]) -> Iterator[GraphInput]:
        """The same inputs; the masks of each are being read from when it is asked for."""
        for batch in inputs:
            self._requested.append(self._thread.call(partial(self._read, batch)))
            yield batch

    def take(self, index: NDArray[np.int64], size: Array) -> NDArray[Any]:
        """The masks of the batch that was asked for first, `[N, H, W]` of the masks' `dtype`.

        Args:
            index: `[N]`, positions in the dataset.
            size: `[N, 2]`, height and width of the images before cropping.

        Raises:
            UnreadableFileError: one of them cannot be read, or has another size than its image.
            StorageError: a store does not give one.
        """
        found = self._requested.popleft().result()
        for row in np.flatnonzero((found.size != size).any(axis=1)).tolist():
            self._masks.require_size(int(index[row]), found.size[row], size[row])
        return found.masks

    def close(self) -> None:
        """Read no more."""
        for read in self._requested:
            read.cancel()
        self._requested.clear()
        self._thread.end()

    def _read(self, batch: GraphInput) -> "_Rendered":
        masks: list[NDArray[Any]] = []
        for mask in self._masks.read(batch.index, max_pixels=self._max_pixels):
            if isinstance(mask, UnreadableFileError):
                raise mask
            masks.append(mask)
        # `images` is the first of the views, and its only window the first of all.
        view, ignore_index = self._view.of_batch(batch.parameters), self._masks.ignore_index
        rendered = render_masks(masks, view, batch.crops[0], batch.parameters, ignore_index=ignore_index)
        return _Rendered(rendered, np.array([mask.shape for mask in masks], np.float64))


class _Rendered(NamedTuple):
    masks: NDArray[Any]
    """`[N, H, W]`."""
    size: Array
    """`[N, 2]`, height and width of the files."""


def render_masks(
    masks: Sequence[NDArray[Any]],
    view: View,
    crop: tuple[Array, ...],
    parameters: Sequence[NDArray[Any]],
    *,
    ignore_index: int,
) -> NDArray[Any]:
    """Masks as their images are in a view.

    Args:
        masks: N of them, `[h, w]` each, of one data type.
        view: what happens to the images. Ops that change colors, blur and erasing leave masks as they are.
        crop: parameters of its crop, `[N, ...]` each.
        parameters: those of its ops, `[N, ...]` each; more may follow.
        ignore_index: for pixels that a warp brings in from outside of the window.

    Returns:
        `[N, H, W]` of the same data type.
    """
    height, width = view.height_width
    size = np.array([mask.shape for mask in masks], np.float64)
    windows = view.crop.windows(size, *crop)
    start, extent = (windows[2], windows[3] - windows[2]) if view.crop.takes_all else windows[:2]
    to_window, steps = _steps(view, parameters, len(masks))
    # From the coordinates (x, y) of pixels of the result to those in the file.
    scale = (extent / (height, width))[:, ::-1, None]
    to_file = scale * to_window
    to_file[:, :, 2] += start[:, ::-1]
    found = np.empty((len(masks), height, width), masks[0].dtype)

    def render(row: int) -> None:
        inside = [step[row] for step, is_moved in steps if is_moved[row]]
        if inside:
            found[row] = _warped(masks[row], to_file[row], inside, (height, width), ignore_index)
        else:
            columns, rows = (
                _nearest(to_file[row, axis, axis] * (np.arange(count) + 0.5) + to_file[row, axis, 2], limit)
                for axis, count, limit in ((0, width, masks[row].shape[1]), (1, height, masks[row].shape[0]))
            )
            found[row] = masks[row][rows][:, columns]

    call_each(render, range(len(masks)), min(num_cores(), _MAX_THREADS))
    return found


def _steps(
    view: View, parameters: Sequence[NDArray[Any]], num: int
) -> tuple[Array, list[tuple[Array, NDArray[np.bool_]]]]:
    """The way back from pixels of the result to the window, as matrices of coordinates (x, y), `[N, 2, 3]` each.

    Returns:
        All of it; and for each warp the way up to before it, with the rows `[N]` in which it moves pixels.
    """
    width = view.height_width[1]
    taken = iter(parameters)
    own = [(op, [next(taken) for _ in op.ndims]) for op in view.ops]
    way: Array = np.tile(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (num, 1, 1))
    steps: list[tuple[Array, NDArray[np.bool_]]] = []
    for op, arrays in reversed(own):
        if isinstance(op, Normalize) and arrays:
            is_flipped = arrays[0] > 0
            way[is_flipped] = [[-1, 0, width], [0, 1, 0]]
        if isinstance(op, AutoAugment | RandomAffine):
            for matrix, is_moved in reversed(op.warps(*arrays)):
                way = matrix[:, :, :2] @ way + matrix[:, :, 2:] * [0, 0, 1]
                steps.append((way, is_moved))
    return way, steps


def _warped(
    mask: NDArray[Any], to_file: Array, inside: Sequence[Array], size: tuple[int, int], ignore_index: int
) -> NDArray[Any]:
    """One mask whose image is warped; `inside` leads to each of the images that its pixels must not lie outside of."""
    height, width = size
    is_there = np.ones(size, np.bool_)
    for matrix in inside:
        x, y = _coordinates(matrix, size)
        is_there &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = _coordinates(to_file, size)
    places = _nearest(y, mask.shape[0]) * np.int32(mask.shape[1]) + _nearest(x, mask.shape[1])
    return np.where(is_there, mask.reshape(-1).take(places, mode="clip"), mask.dtype.type(ignore_index))


def _coordinates(matrix: Array, size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where `matrix` `[2, 3]` leads from the center of each pixel, `[H, W]` each.

    In single precision, which is exact to a thousandth of a pixel and takes half of the time.
    """
    y, x = (np.arange(count) + 0.5 for count in size)
    first, second = (
        (row[0] * x).astype(np.float32) + (row[1] * y + row[2]).astype(np.float32)[:, None] for row in matrix
    )
    return first, second


def _nearest(coordinates: NDArray[Any], limit: int) -> NDArray[np.int32]:
    """The pixels in which coordinates lie, or the outermost of the `limit` ones."""
    nearest: NDArray[np.int32] = np.clip(coordinates, 0, limit - 1).astype(np.int32)  # the floor, as none is negative
    return nearest
