"""What an evaluation adds up on a GPU: it reads and copies nothing until the end of the split."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.evaluation._pixels import PixelTally
from kd_pipeline.evaluation._tally import ImageTally
from tests.on_gpu import DEVICE, OnGpu

ROWS, CLASSES, SIZE = 4, 5, 16


def batch_on(gpu: OnGpu, labels: str) -> KDBatch:
    def on_gpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return gpu.tensor(torch.zeros(size, dtype=dtype))

    of_images = {"hard": on_gpu(ROWS, dtype=torch.int64), "soft": on_gpu(ROWS, CLASSES)}
    return KDBatch(
        images=on_gpu(ROWS, 3, SIZE, SIZE),
        labels=of_images.get(labels),
        masks=on_gpu(ROWS, SIZE, SIZE, dtype=torch.int64) if labels == "masks" else None,
        index=on_gpu(ROWS, dtype=torch.int64),
        valid=on_gpu(ROWS, dtype=torch.bool),
    )


@pytest.mark.parametrize("labels", ["hard", "soft", "none"])
def test_images_are_counted_without_waiting(labels: str) -> None:
    with OnGpu() as gpu:
        logits, teacher = (gpu.tensor(torch.zeros(ROWS, CLASSES)) for _ in range(2))
        has_labels = labels != "none"
        metrics = [lambda logits, labels: {}] if has_labels else []  # for which the rows are kept
        tally = ImageTally.empty(logits, has_labels=has_labels, has_teacher=True, metrics=metrics)
        tally.add(batch_on(gpu, labels), logits, teacher)
        assert {tensor.device for tensor in (tally.confusion, *tally.counts.values(), *tally.sums.values())} == {DEVICE}
        assert not gpu.copies


@pytest.mark.parametrize("labels", ["masks", "none"])
def test_pixels_are_counted_without_waiting(labels: str) -> None:
    """But for the matrices that enlarge the logits, once for all images."""
    options: dict[str, Any] = {"ignore_index": 255, "metrics": (), "sums_over_ranks": False}
    with OnGpu() as gpu:
        logits = gpu.tensor(torch.zeros(ROWS, CLASSES, SIZE // 4, SIZE // 4))
        teacher = gpu.tensor(torch.zeros(ROWS, CLASSES, SIZE, SIZE))
        tally = PixelTally.empty(logits, has_masks=labels == "masks", has_teacher=True, **options)
        for _ in range(2):
            tally.add(batch_on(gpu, labels), logits, teacher)
        assert {tensor.device for tensor in (tally.confusion, *tally.counts.values(), *tally.sums.values())} == {DEVICE}
        assert [copy.shape for copy in gpu.copies] == [(SIZE, SIZE // 4)]
