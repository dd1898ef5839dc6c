"""Images that a teacher is calibrated and compared on: the first ones of a loader."""

import hashlib

import torch
from torch import Tensor

from kd_pipeline.data.order import Shuffle, read_shuffle, shuffle_fields
from kd_pipeline.data.sources import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.loader.batch_stream import BatchStream, transform_fields

__all__ = ["first_images", "images_key"]


def first_images(stream: BatchStream, num_images: int) -> Tensor:
    """The first images of an epoch, without those that cannot be read: `[num_images, 3, H, W]` float32 on the CPU."""
    images: list[Tensor] = []
    for batch in stream:
        images.append(batch.images[batch.valid].float().cpu())
        if sum(map(len, images)) >= num_images:
            break
    return torch.cat(images)[:num_images]


def images_key(source: Source, transform: TrainTransform | EvalTransform, *, seed: int, shuffle: Shuffle) -> str:
    """Digest of what the first images depend on.

    Raises:
        ConfigError: the shuffle does not fit the source.
    """
    order = shuffle_fields(read_shuffle(shuffle), getattr(source, "shard_ends", None), len(source))
    facts = (
        source.fingerprint,
        transform_fields(transform),
        seed,
        *(each for each in order.values() if each is not None),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()
