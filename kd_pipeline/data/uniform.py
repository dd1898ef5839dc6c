"""Which finished images are a single color: a decoder that fails silently often returns black or gray."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["UniformCounter", "counted", "is_uniform"]

_logger = logging.getLogger("kd_pipeline")

_MANY = 0.01
"""Share of an epoch's images above which those of a single color are reported."""
_STRIDE, _CLOSER = 64, (8, 1)
"""On a CPU, every 64th pixel in both directions is looked at where the middle is as red as the first pixel, and more of
the images where these are equal."""
_MAX_KEPT = 64
"""Batches that are counted at once."""


def is_uniform(images: Tensor) -> Tensor:
    """`[N]` bool, whether all pixels of an image `[N, C, H, W]` have the same color, without waiting for the device.

    NaN pixels never count as equal.
    """
    first = images[:, :, :1, :1]
    if images.device.type != "cpu":
        return (images == first).flatten(1).all(1)
    height, width = images.shape[2:]
    uniform = images[:, 0, height // 2, width // 2] == images[:, 0, 0, 0]
    rows = uniform.nonzero().flatten()
    uniform[rows] = (images[:, :, ::_STRIDE, ::_STRIDE][rows] == first[rows]).flatten(1).all(1)
    for row in uniform.nonzero().flatten().tolist():
        image, color = images[row], first[row]
        uniform[row] = all(bool((image[:, ::step, ::step] == color).all()) for step in _CLOSER)
    return uniform


def counted(uniform: Tensor, valid: Tensor) -> Tensor:
    """`[2, N]` bool, which images a `UniformCounter` counts as `uniform` `[N]`, and which it counts: the valid ones."""
    return torch.stack([uniform & valid, valid])


@dataclass(frozen=True, slots=True)
class _Ended:
    """The counts of an epoch that has ended, on their way to the host."""

    epoch: int
    counts: Tensor
    copied: Any
    """A CUDA event; None on a CPU."""


class UniformCounter:
    """Counts images of a single color, batch by batch, without waiting for the device until it is asked."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._to_count: list[Tensor] = []
        self._ended: deque[_Ended] = deque()
        self._has_reported = False

    def restart(self) -> None:
        """Count from zero."""
        self._counts = None
        self._to_count.clear()

    def add(self, counted: Tensor) -> None:
        """Count the images of a batch; `counted` `[2, N]` bool is what `counted` returned for them."""
        self._to_count.append(counted)
        if len(self._to_count) == _MAX_KEPT:
            self._count()
        if self._ended:
            self.report()

    def read(self) -> tuple[int, int]:
        """How many images were of a single color, and how many were counted; waits for the device."""
        self.report(wait=True)
        self._count()
        if self._counts is None:
            return 0, 0
        num_uniform, num_images = self._counts.tolist()
        return num_uniform, num_images

    def end(self, epoch: int) -> None:
        """Report on `epoch`, now on a CPU, and otherwise once the device has counted its images."""
        if not self._has_reported:
            self._count()
            if self._counts is not None:
                self._ended.append(_Ended(epoch, *_copy_to_host(self._counts)))
        self.report()

    def report(self, *, wait: bool = False) -> None:
        """Warn, the first time, about many images of a single color in an epoch that has ended.

        Args:
            wait: for a device that is still counting; otherwise a later call reports on what it counts.
        """
        while self._ended:
            ended = self._ended[0]
            if ended.copied is not None:
                if wait:
                    ended.copied.synchronize()
                elif not ended.copied.query():
                    return
            self._ended.popleft()
            num_uniform, num_images = ended.counts.tolist()
            if num_uniform > _MANY * num_images and not self._has_reported:
                self._has_reported = True
                _logger.warning(
                    "%d of %d images of epoch %d had a single color after the transform: crops of a plain background, "
                    "or files that are decoded wrongly; kd-pipeline check names the files that have a single color as "
                    "a whole",
                    *(num_uniform, num_images, ended.epoch + 1),
                )

    def _count(self) -> None:
        if self._to_count:
            counts = torch.cat(self._to_count, 1).sum(1)
            self._counts = counts if self._counts is None else self._counts + counts
            self._to_count.clear()


def _copy_to_host(counts: Tensor) -> tuple[Tensor, Any]:
    """A copy in host memory, and the CUDA event after which it is there; the host does not wait for it."""
    if counts.device.type == "cpu":
        return counts, None
    copy = counts.to("cpu", non_blocking=True)  # which is pinned, or the copy would wait
    copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(counts.device))
    return copy, copied
