"""Loading as people do it without DALI: torchvision's `ImageFolder` in torch's `DataLoader`."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from kd_pipeline._core.child_process import spawn_context
from kd_pipeline._core.optional import require
from kd_pipeline.data.transforms import TrainTransform

__all__ = [
    "PREFETCH",
    "LoadTask",
    "Stream",
    "tensor_steps",
    "torchvision_cuda",
    "torchvision_pil",
    "torchvision_tensor",
    "why_no_cuda_decoder",
]

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
    datasets = require("torchvision.datasets", extra="bench")
    return _batches(datasets.ImageFolder(task.root, tensor_steps(task.transform), loader=_read_jpeg), task)


def torchvision_cuda(task: LoadTask) -> Stream:
    """Read the files in worker processes, decode whole batches on the GPU, and crop and flip image by image there."""
    io, datasets = require("torchvision.io", extra="bench"), require("torchvision.datasets", extra="bench")
    v2 = require("torchvision.transforms.v2", extra="bench")
    crop, normalize = v2.Compose(_crop(v2, task.transform)), v2.Compose(_normalize(v2, task.transform))
    dataset = datasets.ImageFolder(task.root, loader=io.read_file)
    for content, sizes in _loader(dataset, task, collate_fn=_joined, pin_memory=False):
        files = list(content.split(sizes))
        images = io.decode_jpeg(files, mode=io.ImageReadMode.RGB, device=task.device)
        yield normalize(torch.stack([crop(image) for image in images]))


def why_no_cuda_decoder(device: torch.device) -> str | None:
    """Why torchvision cannot decode JPEG files on the GPU `device`; None if it can."""
    io = require("torchvision.io", extra="bench")
    file = io.encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
    try:
        io.decode_jpeg([file], mode=io.ImageReadMode.RGB, device=device)
    except (RuntimeError, NotImplementedError) as exc:  # such as torchvision built without nvJPEG
        return (str(exc).splitlines() or [type(exc).__name__])[0]
    return None


def tensor_steps(transform: TrainTransform) -> Callable[[Tensor], Tensor]:
    """What torchvision does after it has decoded an image to a tensor."""
    v2 = require("torchvision.transforms.v2", extra="bench")
    steps: Callable[[Tensor], Tensor] = v2.Compose([*_crop(v2, transform), *_normalize(v2, transform)])
    return steps


def _joined(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, list[int]]:
    """The files of a batch in one tensor, and their sizes: each tensor from a worker costs an open file."""
    files = [file for file, _ in samples]
    return torch.cat(files), [len(file) for file in files]


def _batches(dataset: Any, task: LoadTask) -> Stream:
    for images, _ in _loader(dataset, task, pin_memory=task.device.type == "cuda"):
        yield images.to(task.device, non_blocking=True)


def _loader(dataset: Any, task: LoadTask, **options: Any) -> "DataLoader[Any]":
    return DataLoader(
        dataset,
        task.batch_size,
        # Practically endless, one permutation after the other, so workers do not restart at every epoch.
        sampler=RandomSampler(dataset, num_samples=2**62, generator=torch.Generator().manual_seed(0)),
        num_workers=task.num_threads,
        prefetch_factor=PREFETCH,
        drop_last=True,
        # Forking a process in which DALI's threads run is not safe.
        multiprocessing_context=spawn_context(),
        **options,
    )


def _crop(v2: Any, transform: TrainTransform) -> list[Any]:
    crop = v2.RandomResizedCrop(transform.size, transform.area, transform.ratio, antialias=True)
    return [crop, v2.RandomHorizontalFlip(transform.flip)]


def _normalize(v2: Any, transform: TrainTransform) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(transform.mean, transform.std)]


def _read_jpeg(path: str) -> Tensor:
    io = require("torchvision.io", extra="bench")
    image: Tensor = io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image
