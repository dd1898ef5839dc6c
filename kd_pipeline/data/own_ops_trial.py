"""A trial of the ops of the user's own, whose mistakes DALI would only report from within the graph of all ops."""

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline.data.own_ops import FactoryOp
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError

__all__ = ["try_own_ops"]

_NUMBERS = np.array([0, 1 / 3, 2 / 3, 1 - 2**-24], dtype=np.float32)
"""What the random numbers of an image of the trial all are, the smallest and the largest ones included."""


def try_own_ops(views: Views, *, device_id: int | None, has_masks: bool = False) -> None:
    """Apply each op of the user's own to four images of each view that has it, twice.

    Args:
        views: with the functions of their ops.
        device_id: the GPU of the images, or None for the CPU.
        has_masks: whether there are masks of the view `images`, which an op of the user's own does not change.

    Raises:
        ConfigError: an op fails, changes the size or the type of images, or depends on something else than these and
            its numbers; or it moves pixels, and there are masks.
    """
    for op in views.images.own_ops:
        if has_masks and op.settings.changes == "positions":
            raise ConfigError(
                f"the op {op.settings.factory} changes positions, and masks would not follow; leave it out of "
                "transform.order, or leave out the masks of the source"
            )
    for view in views:
        for op, size in product(view.own_ops, view.sizes):
            _try(op, size, device_id)


def _try(op: FactoryOp, size: tuple[int, int], device_id: int | None) -> None:
    factory = op.settings.factory
    fn, types = require("nvidia.dali.fn", extra="cpu"), require("nvidia.dali.types", extra="cpu")
    pipeline = _open_pipeline(device_id)
    images = np.random.default_rng(0).integers(0, 256, (len(_NUMBERS), *size, 3), dtype=np.uint8)
    with pipeline:
        node = fn.external_source(lambda: images, ndim=3, layout="HWC")
        numbers = [fn.external_source(lambda: _NUMBERS, ndim=0) for _ in range(op.settings.num_draws)]
        changed = op.call(node if device_id is None else node.gpu(), *numbers)
        pipeline.set_outputs(changed)
    if changed.device != ("cpu" if device_id is None else "gpu"):
        raise ConfigError(f"the op {factory} returned images on the {changed.device}; leave them where they are")
    runs: list[list[NDArray[Any]]] = []
    for _ in range(2):
        try:
            (output,) = pipeline.run()
        except RuntimeError as exc:
            raise ConfigError(
                f"the op {factory} fails on images [{size[0]}, {size[1]}, 3] of uint8 with random numbers from 0 to 1: "
                f"{_reason(exc)}"
            ) from exc
        shapes = {tuple(shape) for shape in output.shape()}
        if shapes != {images.shape[1:]} or output.dtype != types.UINT8:
            found = ", ".join(str(list(shape)) for shape in sorted(shapes))
            raise ConfigError(
                f"the op {factory} returned images {found} of {output.dtype.name.lower()} for images "
                f"{list(images.shape[1:])} of uint8; keep size and type, such as by fn.cast(..., dtype=types.UINT8)"
            )
        runs.append([np.array(image) for image in (output if device_id is None else output.as_cpu())])
    if not all(map(np.array_equal, *runs)):
        raise ConfigError(
            f"the op {factory} returned other pixels when it was run again on the same images and numbers; let it draw "
            "no random numbers, but take those that it is given (num_draws), or a resumed run would see other images"
        )


def _open_pipeline(device_id: int | None) -> Any:
    dali = require("nvidia.dali", extra="cpu")
    return dali.Pipeline(batch_size=len(_NUMBERS), num_threads=1, device_id=device_id, prefetch_queue_depth=1)


def _reason(failure: RuntimeError) -> str:
    """What DALI's message says besides where it comes from."""
    _, _, found = str(failure).partition("encountered:")
    lines = [line.strip() for line in (found or str(failure)).splitlines()]
    return next((line for line in lines if line), "DALI gives no reason")
