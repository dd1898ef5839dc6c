"""Every call that orders work between DALI, the teacher and the consumer; nothing else waits while batches flow.

On the CPU there is no order to keep. On a GPU DALI's output is bound to the teacher's stream, the teacher is queued
there, and the consumer's stream, not the host, waits for it. DALI's buffer is kept until the consumer's stream has
passed the point where it came back for the next batch: `Tensor.record_stream` would do nothing for memory that torch
did not allocate. A host that runs far ahead of its GPU would keep ever more buffers, so there is a bound, at which it
waits for the oldest one.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["CpuLane", "CudaLane", "Lane", "open_lane"]


class Lane(Protocol):
    """The road of a batch from DALI through the teacher to the consumer."""

    stream: Any
    """What DALI's output is ordered on; None on the CPU."""

    def teaching(self) -> AbstractContextManager[Any]:
        """Work that is queued inside goes behind DALI's output, on the teacher's stream."""

    def view(self, images: Any) -> Tensor:
        """DALI's tensor as torch's, of the same memory, ordered on the current stream."""

    def upload(self, numbers: NDArray[Any]) -> Tensor:
        """An array as a tensor on the device, copied there on the current stream."""

    def taught(self) -> Any:
        """A mark behind everything queued so far on the teacher's stream."""

    def hand_over(self, mark: Any, tensors: Iterable[Tensor]) -> None:
        """Let the consumer's current stream wait for `mark`; `tensors` are those that torch allocated."""

    def take_back(self, buffer: object) -> None:
        """The consumer has queued its work on a batch: keep `buffer` until that work is done."""

    def close(self) -> None:
        """Forget all buffers, once the work on them is done."""


class CpuLane:
    """Everything is done when its call returns."""

    stream = None

    def teaching(self) -> AbstractContextManager[Any]:
        """Nothing to order."""
        return nullcontext()

    def view(self, images: Any) -> Tensor:
        """By its capsule: torch would first ask for what DALI does not know, which takes ten times as long."""
        return from_dlpack(images.__dlpack__())

    def upload(self, numbers: NDArray[Any]) -> Tensor:
        """The same memory."""
        return torch.from_numpy(numbers)

    def taught(self) -> Any:
        """No mark is needed."""
        return None

    def hand_over(self, mark: Any, tensors: Iterable[Tensor]) -> None:
        """Nothing to wait for."""

    def take_back(self, buffer: object) -> None:
        """Whoever still reads the buffer holds it by its tensor."""

    def close(self) -> None:
        """Nothing is kept."""


class CudaLane:
    """One stream for the teacher, and events between it and whatever stream the consumer works on."""

    def __init__(self, device: torch.device, *, most_kept: int) -> None:
        self._device, self._most_kept = device, most_kept
        # Not the default stream: there TensorRT synchronizes the device at every call.
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The teacher's weights came to the device on the stream that is current now.
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self._kept: deque[tuple[torch.cuda.Event, object]] = deque()

    def teaching(self) -> AbstractContextManager[Any]:
        """Makes the teacher's stream the current one."""
        return torch.cuda.stream(self.stream)

    def view(self, images: Any) -> Tensor:
        """Torch tells DALI its current stream."""
        return from_dlpack(images)

    def upload(self, numbers: NDArray[Any]) -> Tensor:
        """From pinned memory the copy is only queued, and torch keeps the memory until it is done."""
        return torch.from_numpy(numbers).pin_memory().to(self._device, non_blocking=True)

    def taught(self) -> torch.cuda.Event:
        """An event on the teacher's stream."""
        event: torch.cuda.Event = self.stream.record_event()
        return event

    def hand_over(self, mark: torch.cuda.Event, tensors: Iterable[Tensor]) -> None:
        """The consumer's stream waits; torch is told that it uses what was allocated on the teacher's stream."""
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(consumer)

    def take_back(self, buffer: object) -> None:
        """Keeps the buffer until an event on the consumer's stream has passed, and drops those that have.

        Where more than `most_kept` are kept, the host waits for the oldest.
        """
        self._kept.append((torch.cuda.current_stream(self._device).record_event(), buffer))
        while self._kept and self._kept[0][0].query():  # type: ignore[no-untyped-call]
            self._kept.popleft()
        while len(self._kept) > self._most_kept:
            done, _ = self._kept.popleft()
            done.synchronize()

    def close(self) -> None:
        """Waits for the work on the kept buffers."""
        while self._kept:
            done, _ = self._kept.popleft()
            done.synchronize()
        self.stream.synchronize()


def open_lane(device: torch.device, *, ahead: int) -> Lane:
    """The lane for batches on `device`, with the teacher `ahead` batches in front of the consumer.

    On a GPU at most `2 * (ahead + 2)` batches are kept for a consumer whose work on them is still queued.
    """
    return CudaLane(device, most_kept=2 * (ahead + 2)) if device.type == "cuda" else CpuLane()
