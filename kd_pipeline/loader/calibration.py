"""The images of each view that a teacher may see, and the first of them, on which it is calibrated and compared."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.batch import copies_as_rows
from kd_pipeline.data.order import Shuffle, read_shuffle, shuffle_fields
from kd_pipeline.data.sources import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import FollowingView, Views, ViewSettings, fields_of_view
from kd_pipeline.loader.batch_stream import BatchStream
from kd_pipeline.loader.stream_facts import transform_fields
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.runner import ViewImages

__all__ = ["at_largest", "first_images", "images_key", "images_of_views"]


def images_of_views(
    transform: TrainTransform | EvalTransform,
    views: Mapping[str, ViewSettings],
    *,
    first: Callable[[str], Tensor] | None = None,
    key: Callable[[str], str | None] = lambda view: None,
) -> dict[str, ViewImages]:
    """The images of `images` and all other views, as `open_teacher` takes them.

    Args:
        transform: of the split.
        views: of the split.
        first: returns the first images of a view; without it images for calibration are generated.
        key: returns the digest of what they depend on; see `images_key`.
    """
    return {
        view.name: ViewImages(
            image_shape=view.input_shape,
            dtype=getattr(torch, view.normalize.dtype),
            normalization=Normalization(view.normalize.mean, view.normalize.std),
            copies=view.copies,
            calibration_images=None if first is None else partial(first, view.name),
            calibration_key=key(view.name),
        )
        for view in Views.of(transform, views)
    }


def at_largest(views: Mapping[str, ViewSettings]) -> dict[str, ViewSettings]:
    """`views` with sizes that do not change, each the largest."""
    return {name: view if isinstance(view, FollowingView) else view.at_size() for name, view in views.items()}


def first_images(stream: BatchStream, num_images: int, view: str = IMAGES) -> Tensor:
    """The first images of a view in an epoch, but for unreadable ones: `[num_images, 3, H, W]` float32 on the CPU."""
    images: list[Tensor] = []
    for batch in stream:
        images.append(copies_as_rows(batch.view(view)[batch.valid]).float().cpu())
        if sum(map(len, images)) >= num_images:
            break
    return torch.cat(images)[:num_images]


def images_key(
    source: Source,
    transform: TrainTransform | EvalTransform,
    *,
    seed: int,
    shuffle: Shuffle,
    views: Mapping[str, ViewSettings] | None = None,
    view: str = IMAGES,
) -> str:
    """Digest of what the first images of a view depend on.

    Raises:
        ConfigError: the shuffle does not fit the source.
    """
    order = shuffle_fields(read_shuffle(shuffle), getattr(source, "shard_ends", None), len(source))
    facts = (
        source.fingerprint,
        transform_fields(transform),
        seed,
        *(each for each in order.values() if each is not None),
        *([] if view == IMAGES else [fields_of_view(transform, views or {}, view)]),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()
