"""Run streams of batches, and compare them bit by bit."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.networks import IMAGE_SHAPE, ConvNet

Fields = dict[str, Tensor]
"""All tensors of a batch, or of one row, by name."""

SIZE = IMAGE_SHAPE[1]
TRAIN = TrainTransform(
    size=SIZE, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5, erase=0.5
)
"""All random ops."""
EVAL = EvalTransform(size=SIZE)


def conv_teacher(seed: int = 0) -> Teacher:
    """`ConvNet(seed)` with ten logits, in PyTorch."""
    return PyTorchTeacher(ConvNet(seed), image_shape=IMAGE_SHAPE)


def fields(batch: KDBatch) -> Fields:
    labels = {} if batch.labels is None else {"labels": batch.labels}
    views = {f"view {name}": view for name, view in batch.views.items()}
    views |= {} if batch.masks is None else {"masks": batch.masks}
    return {"index": batch.index, "images": batch.images, "valid": batch.valid, **labels, **views, **batch.teacher}


def run(loader: KDDataLoader, num_epochs: int = 3) -> list[Fields]:
    """The remaining batches of the first `num_epochs` epochs."""
    return [fields(batch) for _ in range(loader.epoch, num_epochs) for batch in loader]


def state_after(loader: KDDataLoader, num_batches: int) -> dict[str, Any]:
    """The state within a loop, after so many of its batches."""
    batches = iter(loader)
    for _ in range(num_batches):
        next(batches)
    return loader.state_dict()


def rows(batches: Iterable[Fields]) -> list[Fields]:
    """The same stream, sample by sample."""
    return [
        {name: tensor[row] for name, tensor in batch.items()} for batch in batches for row in range(len(batch["index"]))
    ]


def global_rows(ranks: Sequence[Sequence[Fields]]) -> list[Fields]:
    """The streams of all ranks merged, sample by sample in the order of the epochs."""
    return rows(batch for batches in zip(*ranks, strict=True) for batch in batches)


def assert_same(found: Sequence[Fields], wanted: Sequence[Fields]) -> None:
    """Equal length, and all tensors equal to the last bit."""
    assert len(found) == len(wanted)
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{name} of number {number}"
