"""Loading as people do it without DALI: torchvision's `ImageFolder` in torch's `DataLoader`."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from kd_pipeline._core.child_process import spawn_context
from kd_pipeline._core.optional import require
from kd_pipeline.data.transforms import TrainTransform

__all__ = ["PREFETCH", "LoadTask", "Stream", "torchvision_pil", "torchvision_tensor"]

PREFETCH = 2
"""Batches that each worker of torch's prefetches, the default of torch and of DALI."""

Stream = Generator[Tensor, None, None]
"""Endless batches `[N, 3, H, W]`, float32."""


@dataclass(frozen=True, slots=True)
class LoadTask:
    """What to load, and with what; the same for every loader that is compared."""

    root: Path
    """JPEG files in class folders."""
    transform: TrainTransform
    batch_size: int
    num_threads: int
    """Of DALI; also worker processes of torch's `DataLoader`."""
    device: torch.device
    """Where the batches go."""


def torchvision_pil(task: LoadTask) -> Stream:
    """Decode with PIL, as `ImageFolder` does by default."""
    datasets, v2 = require("torchvision.datasets", extra="bench"), require("torchvision.transforms.v2", extra="bench")
    steps = [*_crop(v2, task.transform), v2.ToImage(), *_normalize(v2, task.transform)]
    return _batches(datasets.ImageFolder(task.root, v2.Compose(steps)), task)


def torchvision_tensor(task: LoadTask) -> Stream:
    """Decode to tensors with `decode_jpeg`, without PIL."""
    datasets, v2 = require("torchvision.datasets", extra="bench"), require("torchvision.transforms.v2", extra="bench")
    steps = [*_crop(v2, task.transform), *_normalize(v2, task.transform)]
    return _batches(datasets.ImageFolder(task.root, v2.Compose(steps), loader=_read_jpeg), task)


def _batches(dataset: Any, task: LoadTask) -> Stream:
    loader = DataLoader(
        dataset,
        task.batch_size,
        # Practically endless, one permutation after the other, so workers do not restart at every epoch.
        sampler=RandomSampler(dataset, num_samples=2**62, generator=torch.Generator().manual_seed(0)),
        num_workers=task.num_threads,
        prefetch_factor=PREFETCH,
        drop_last=True,
        pin_memory=task.device.type == "cuda",
        # Forking a process in which DALI's threads run is not safe.
        multiprocessing_context=spawn_context(),
    )
    for images, _ in loader:
        yield images.to(task.device, non_blocking=True)


def _crop(v2: Any, transform: TrainTransform) -> list[Any]:
    crop = v2.RandomResizedCrop(transform.size, transform.area, transform.ratio, antialias=True)
    return [crop, v2.RandomHorizontalFlip(transform.flip)]


def _normalize(v2: Any, transform: TrainTransform) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(transform.mean, transform.std)]


def _read_jpeg(path: str) -> Tensor:
    io = require("torchvision.io", extra="bench")
    image: Tensor = io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image
