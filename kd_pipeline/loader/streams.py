"""All synchronization between DALI, the teacher and the consumer of batches.

On a GPU, DALI's output is ordered on the teacher's stream, the teacher is queued there, and the consumer's stream waits
for it; the host does not. DALI's buffer is kept until the consumer's stream has passed the point where it requested the
next batch, as `Tensor.record_stream` has no effect on memory that torch did not allocate. If the host runs far ahead of
its GPU, the number of kept buffers is bounded: it then waits for the oldest one.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["StreamSync", "open_stream_sync"]


class StreamSync:
    """The steps of a batch from DALI through the teacher to the consumer; on a CPU, each is done when it returns."""

    stream: Any = None
    """The stream of DALI's output and of the teacher; None on a CPU."""

    def on_teacher_stream(self) -> AbstractContextManager[Any]:
        """Queue the work inside on the teacher's stream, after DALI's output."""
        return nullcontext()

    def as_tensor(self, images: Any) -> Tensor:
        """DALI's tensor as a torch tensor of the same memory, ordered on the current stream."""
        # From its capsule: torch would first ask for attributes that DALI lacks, which takes ten times as long.
        return from_dlpack(images.__dlpack__())

    def to_device(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, copied on the current stream; itself if it is there already."""
        return tensor.cpu()  # of a GPU's tensor, a copy that does not wait might be read before it is there

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Let the teacher's stream wait for the current one, on which those of `tensors` that are on a GPU were made.

        There are such tensors if a loader of the user's own puts them there.
        """

    def record_event(self) -> Any:
        """An event after all work queued so far on the teacher's stream."""
        return None

    def hand_over(self, event: Any, tensors: Iterable[Tensor]) -> None:
        """Let the consumer's current stream wait for `event`; `tensors` are those that torch allocated."""

    def keep_until_used(self, buffer: object) -> None:
        """Keep `buffer` until the work that the consumer has queued so far is done."""

    def keep_until(self, event: Any, buffer: object) -> None:
        """Keep `buffer`, which no consumer gets, until the teacher's work before `event` is done."""

    def close(self) -> None:
        """Wait for the work on all kept buffers, and drop them."""


class _CudaSync(StreamSync):
    """One stream for the teacher, and events between it and the consumer's current stream."""

    def __init__(self, device: torch.device, max_kept: int) -> None:
        self._device, self._max_kept = device, max_kept
        # Not the default stream, on which TensorRT synchronizes the device at every call.
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The teacher's weights were copied to the device on the stream that is current now.
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self._kept: deque[tuple[torch.cuda.Event, object]] = deque()

    def on_teacher_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def as_tensor(self, images: Any) -> Tensor:
        return from_dlpack(images)  # torch passes its current stream to DALI

    def to_device(self, tensor: Tensor) -> Tensor:
        # From other memory the driver may wait for the stream, and so for the teacher. From pinned memory the copy is
        # only queued, and torch keeps the memory until it is done.
        pinned = tensor if tensor.is_cuda else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)

    def wait_for(self, tensors: Iterable[Tensor]) -> None:
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        for device in {tensor.device for tensor in on_gpu}:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in on_gpu:
            tensor.record_stream(self.stream)

    def record_event(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self.stream.record_event()
        return event

    def hand_over(self, event: torch.cuda.Event, tensors: Iterable[Tensor]) -> None:
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(event)
        for tensor in tensors:
            if tensor.is_cuda:  # what a user's function adds may be anywhere
                tensor.record_stream(consumer)

    def keep_until_used(self, buffer: object) -> None:
        self.keep_until(torch.cuda.current_stream(self._device).record_event(), buffer)

    def keep_until(self, event: torch.cuda.Event, buffer: object) -> None:
        self._kept.append((event, buffer))
        while self._kept and self._kept[0][0].query():  # type: ignore[no-untyped-call]
            self._kept.popleft()
        while len(self._kept) > self._max_kept:
            self._drop_oldest()

    def close(self) -> None:
        self._max_kept = 0  # what a loop that is still open keeps at its end is waited for
        while self._kept:
            self._drop_oldest()
        self.stream.synchronize()

    def _drop_oldest(self) -> None:
        done, _ = self._kept.popleft()
        done.synchronize()


def open_stream_sync(device: torch.device, *, ahead: int) -> StreamSync:
    """The synchronization of batches on `device`, with the teacher `ahead` batches ahead of the consumer.

    On a GPU at most `2 * (ahead + 2)` buffers are kept for work that the consumer has queued.
    """
    return _CudaSync(device, max_kept=2 * (ahead + 2)) if device.type == "cuda" else StreamSync()
