"""From encoded images or pixels to views: a batch's windows in NumPy, and the nodes of the graph that cut these."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline.data.auto_augment import Array, Node
from kd_pipeline.data.graph_settings import GraphSettings
from kd_pipeline.data.views import View, Views

__all__ = ["Rendering", "Stores", "decode_windows", "peek_shape"]

Stores = Literal["files", "bytes", "pixels"]
"""What a source has of an image."""

_IN_PIXELS = {"axes": (0, 1), "normalized_anchor": False, "normalized_shape": False}
"""Arguments of the operators that take windows in pixels."""


@dataclass(frozen=True)
class Rendering:
    """How the views of an image are made of one decoding of it.

    A decoder that can decode a window decodes the only one or, of several, the smallest box that contains them all.
    """

    views: Views
    stores: Stores
    settings: GraphSettings

    @property
    def has_box(self) -> bool:
        """Whether windows are cut from a box."""
        return self.stores != "pixels" and self.settings.decode == "window" and len(self.views.windows) > 1

    @property
    def ndims(self) -> list[int]:
        """Dimensions per sample of each array that `make` takes: those of `place`, and the views' parameters."""
        windows = [ndim for view, _ in self.views.windows for ndim in (*self._window_ndims(view), *view.crop.ndims)]
        ops = [ndim for view in self.views for _ in range(view.copies) for ndim in view.ndims]
        return [*([1, 1] if self.has_box else []), *windows, *ops]

    def place(self, size: Array, crops: tuple[tuple[Array, ...], ...]) -> list[NDArray[Any]]:
        """Where the windows are in images of `size` `[N, 2]`, given the parameters of their crops.

        Returns:
            Corner and extent of the box if there is one, `[N, 2]`; then of each window where it is, within the box if
            there is one and unless the window is all there is, and what else its crop takes, `[N, 2]`.
        """
        windows = [view.crop.windows(size, *crop) for (view, _), crop in zip(self.views.windows, crops, strict=True)]
        placed: list[NDArray[Any]] = []
        if self.has_box:
            box = np.minimum.reduce([corner for corner, *_ in windows])
            end = np.maximum.reduce([corner + extent for corner, extent, *_ in windows])
            placed = [box.astype(np.float32), (end - box).astype(np.float32)]
            windows = [(corner - box, *rest) for corner, *rest in windows]
        for (view, _), (corner, extent, *rest) in zip(self.views.windows, windows, strict=True):
            match self._window_ndims(view):
                case (2, 2, 1):
                    corner, extent = corner.astype(np.int32), extent.astype(np.int32)
                    placed += [corner[:, None], extent[:, None], extent]
                case (1, 1):
                    placed += [corner.astype(np.float32), extent.astype(np.float32)]
            placed += [array.astype(np.float32) for array in rest]
        return placed

    def make(self, images: Node, parameters: list[Node]) -> list[Node]:
        """A node for each view, of encoded images or pixels and the nodes of all parameters."""
        remaining = iter(parameters)

        def take(count: int) -> list[Node]:
            return [next(remaining) for _ in range(count)]

        cut = self._cut(images, take)
        windows: dict[tuple[str, int], tuple[Node, list[Node]]] = {}
        for view, copy in self.views.windows:
            window = cut(*take(len(self._window_ndims(view))))
            windows[view.name, copy] = window, take(len(view.crop.ndims))
        return [self._make_view(view, windows, take) for view in self.views]

    def _window_ndims(self, view: View) -> tuple[int, ...]:
        """Dimensions of what says where a window is: nothing for one that is all of what is decoded."""
        if self.stores != "pixels" and self.settings.decode == "window" and not self.has_box:
            return 1, 1
        if view.crop.takes_all:
            return ()
        return (2, 2, 1) if self.settings.device_id is None else (1, 1)

    def _cut(self, images: Node, take: Callable[[int], list[Node]]) -> Callable[..., Node]:
        """What cuts a window, given where it is, or nothing for all of it."""
        if self.stores != "pixels":
            if self.settings.decode == "full":
                images = _decode(self.settings, images)
            elif self.has_box:
                images = decode_windows(self.settings, images, *take(2))
            else:
                return partial(decode_windows, self.settings, images)
        cut = _copy if self.settings.device_id is None else _slice
        return lambda *window: cut(images, *window) if window else images

    def _make_view(
        self,
        view: View,
        windows: dict[tuple[str, int], tuple[Node, list[Node]]],
        take: Callable[[int], list[Node]],
    ) -> Node:
        copies = []
        for copy in range(view.copies):
            images, rest = windows[view.leader or view.name, copy]
            parameters = [take(len(op.ndims)) for op in view.ops]
            size = {} if view.schedule is None else {"size": take(1)[0]}
            images = view.crop.apply(images, *rest, **size)
            for op, own in zip(view.ops, parameters, strict=True):
                images = op.apply(images, *own)
            copies.append(images)
        return copies[0] if view.count is None else _fn().stack(*copies)


def decode_windows(settings: GraphSettings, encoded: Node, corner: Node, extent: Node) -> Node:
    """Windows of encoded images, as uint8 HWC."""
    if settings.decode == "full":
        return _slice(_decode(settings, encoded), corner, extent)
    return _fn().decoders.image_slice(encoded, corner, extent, **_IN_PIXELS, **_options(settings))


def peek_shape(settings: GraphSettings, encoded: Node) -> Node:
    """Height, width and channels in the headers of encoded images, as the decoder turns them."""
    return _fn().peek_image_shape(encoded, adjust_orientation=settings.orientation == "upright")


def _decode(settings: GraphSettings, encoded: Node) -> Node:
    return _fn().decoders.image(encoded, **_options(settings))


def _options(settings: GraphSettings) -> dict[str, Any]:
    """Arguments of the decoders."""
    options: dict[str, Any] = {
        "device": "cpu",
        "output_type": require("nvidia.dali.types", extra="cpu").RGB,
        "adjust_orientation": settings.orientation == "upright",
    }
    if settings.device_id is not None:
        # Fancy upsampling as libjpeg-turbo on the CPU, for the same pixels on both devices.
        options |= {"device": "mixed", "hw_decoder_load": settings.hw_decoder_load, "jpeg_fancy_upsampling": True}
    return options


def _slice(images: Node, corner: Node, extent: Node) -> Node:
    return _fn().slice(images, corner, extent, **_IN_PIXELS)


def _copy(images: Node, corner: Node, extent: Node, size: Node) -> Node:
    """The same as `_slice` on a CPU, four times as fast: row by row, where a slice copies byte by byte (DALI 2.4)."""
    return _fn().multi_paste(images, in_anchors=corner, shapes=extent, output_size=size)


def _fn() -> Any:
    return require("nvidia.dali.fn", extra="cpu")
