"""What a step of a loader queues on a GPU: no copy waits, no value is read, and nothing is left on the host."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.mixing import MixSettings, plan_mixing
from kd_pipeline.data.reader import ReadBatch, ReadGroup
from kd_pipeline.loader.batch_fields import FieldNames
from kd_pipeline.loader.batch_preparation import BatchPreparation
from kd_pipeline.loader.prepare import Preparation
from kd_pipeline.loader.streams import StreamSync
from kd_pipeline.teachers.class_order import PermutedTeacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from tests.on_gpu import DEVICE, OnGpu
from tests.teachers.test_several_on_gpu import SIZE, OfMeans

ROWS, CLASSES = 4, 3


class Sync(StreamSync):
    """Copies as on a GPU, where there are no streams."""

    def __init__(self, gpu: OnGpu) -> None:
        self._gpu = gpu
        self.num_copied = 0

    def as_tensor(self, images: Tensor) -> Tensor:
        return self._gpu.tensor(images)

    def to_device(self, tensor: Tensor) -> Tensor:
        if tensor.device == DEVICE:
            return tensor
        self.num_copied += 1
        return (tensor if isinstance(tensor, FakeTensor) else self._gpu.fake(tensor)).to(DEVICE, non_blocking=True)


def check(batch: KDBatch, gpu: OnGpu, sync: Sync) -> None:
    assert all(each.device == DEVICE for each in batch.tensors())
    assert len(gpu.copies) == sync.num_copied and not any(copy.waits for copy in gpu.copies)


@pytest.mark.parametrize("place", ["host", "GPU"])
def test_batch_of_a_users_own_loader(place: str) -> None:
    with OnGpu() as gpu:

        def raw() -> dict[str, Any]:
            made = {
                "images": torch.rand(ROWS, 3, SIZE, SIZE),
                "labels": torch.zeros(ROWS, dtype=torch.int32),
                "masks": torch.zeros(ROWS, SIZE, SIZE, dtype=torch.uint8),
                "weights": torch.rand(ROWS),
            }
            made = {name: gpu.tensor(each) for name, each in made.items()} if place == "GPU" else made
            return {**made, "names": ["a"] * ROWS, "boxes": [torch.rand(2, 4)] * ROWS}

        sync = Sync(gpu)
        preparation = BatchPreparation(
            FieldNames(inputs="images"),
            PermutedTeacher(EnsembleTeacher([OfMeans("one"), OfMeans("two")]), ("b", "a", "c")),
            lambda batch: batch.replace(images=batch.images.flip(3)),
            classes=None,
            num_own_rows=6,
            device=DEVICE,
            sync=sync,
            reads_ahead=True,
        )
        preparation.first = KDBatch(raw(), index=torch.arange(ROWS), valid=torch.ones(ROWS))  # two rows are kept once
        gpu.copies.clear()
        batch, _ = preparation.prepare(raw(), ROWS)
        check(batch, gpu, sync)
        assert sync.num_copied == (4 if place == "host" else 0)
        assert batch.labels is not None and batch.labels.dtype == torch.int64
        assert batch.masks is not None and batch.masks.dtype == torch.int64
        # Small dtypes are what is copied.
        copied = {copy.dtype for copy in gpu.copies}
        assert copied == ({torch.float32, torch.int32, torch.uint8} if place == "host" else set())


@pytest.mark.parametrize("mix", [None, MixSettings(mixup=0.8, cutmix=1.0, label_smoothing=0.1)], ids=["plain", "mixed"])
def test_batch_of_dali(mix: MixSettings | None) -> None:
    """Of a group of two batches, with a view of another size, and with masks if they are not mixed."""
    draws = np.random.default_rng(0).random((2 * ROWS, 40))
    rows = np.arange(2 * ROWS)
    metadata = [rows, rows % CLASSES, np.ones_like(rows)]
    if mix is not None:
        metadata += [*plan_mixing(mix, draws, np.ones(2 * ROWS, bool), size=(SIZE, SIZE)).T]
    planned = SimpleNamespace(metadata=np.stack(metadata).astype(np.int64), ends=[0, ROWS, 2 * ROWS])
    with OnGpu() as gpu:
        views = {
            "images": torch.rand(2 * ROWS, 3, SIZE, SIZE),
            "small": torch.rand(2 * ROWS, 3, 6, 4),
            "local": torch.rand(2 * ROWS, 2, 3, 4, 4),
        }
        masks = None if mix is not None else np.zeros((2 * ROWS, SIZE, SIZE), np.uint8)
        group, sync = ReadGroup(views, planned, masks), Sync(gpu)  # type: ignore[arg-type]
        reader = SimpleNamespace(read=lambda epoch, number, stream: ReadBatch(group, number))
        source: Any = SimpleNamespace(labels=rows % CLASSES, num_classes=CLASSES)
        preparation = Preparation(source, mix, OfMeans("one"), "images", DEVICE, sync)
        for number in range(2):
            pending = preparation.prepare(reader, 0, number)  # type: ignore[arg-type]
            check(pending.batch, gpu, sync)
            assert pending.batch.labels is not None
            assert pending.batch.labels.shape == ((ROWS,) if mix is None else (ROWS, CLASSES))
            assert pending.counted.device == DEVICE
        assert sync.num_copied == (2 if mix is None else 1)  # of the whole group


def test_batches_prepared_in_inference_mode_can_be_trained_on() -> None:
    """With batches ahead, the next one may be asked for after an evaluation."""
    metadata = np.stack([np.arange(ROWS), np.zeros(ROWS), np.ones(ROWS)]).astype(np.int64)
    planned: Any = SimpleNamespace(metadata=metadata, ends=[0, ROWS])
    group = ReadGroup({"images": torch.rand(ROWS, 3, SIZE, SIZE)}, planned)
    reader: Any = SimpleNamespace(read=lambda epoch, number, stream: ReadBatch(group, number))

    class OnCpu(StreamSync):
        def as_tensor(self, images: Tensor) -> Tensor:
            return images

    source: Any = SimpleNamespace(labels=np.zeros(ROWS), num_classes=CLASSES)
    change = lambda batch: batch.replace(images=batch.images * 2)  # noqa: E731
    preparation = Preparation(source, None, None, "images", torch.device("cpu"), OnCpu(), change)
    with torch.inference_mode():
        batch = preparation.prepare(reader, 0, 0).batch
    assert not any(each.is_inference() for each in batch.tensors())
