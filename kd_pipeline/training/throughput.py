"""Training speed, and the shares of it that go to the loader and to the teacher."""

import time
from collections import deque
from dataclasses import dataclass

from kd_pipeline._core.current_student import waited_s
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["Throughput"]


@dataclass(slots=True)
class _Spent:
    """Seconds spent on images, and their number."""

    num_images: int = 0
    loader_s: float = 0.0
    """Waiting for the loader, without the teacher."""
    teacher_s: float = 0.0
    student_s: float = 0.0

    def add(self, other: "_Spent") -> None:
        self.num_images += other.num_images
        self.loader_s += other.loader_s
        self.teacher_s += other.teacher_s
        self.student_s += other.student_s

    def metrics(self) -> dict[str, float]:
        total_s = max(self.loader_s + self.teacher_s + self.student_s, 1e-9)
        return {
            "images_per_s": self.num_images / total_s,
            "loader_share": (self.loader_s + self.teacher_s) / total_s,
            "teacher_share": self.teacher_s / total_s,
        }


class Throughput:
    """Wall-clock time on the host between two log lines, without that of validation and checkpoints.

    The loader runs the teacher on batches ahead of the student. Each call is counted with the batch that it was made
    for, not where it happened: the first batch of an epoch would else have several calls, and the last ones none.
    Of several students, each counts loader, teacher and its own steps, as in a run of its own.
    """

    def __init__(self, teacher: Teacher | Recording | None) -> None:
        self._teacher = teacher
        self._calls_ahead_s: deque[float] = deque()
        """Of the teacher, for batches that the loader has not returned."""
        self._last_call_s = 0.0
        self._batch, self._window, self._last_window, self._run = _Spent(), _Spent(), _Spent(), _Spent()
        self.restart()

    def start_epoch(self) -> None:
        """Start with the first batch; batches of the epoch before that the loader had ready are gone."""
        self._calls_ahead_s.clear()
        self.restart()

    def restart(self) -> None:
        """Do not count the time since the last batch."""
        self._last_s = time.perf_counter() - waited_s()
        self._last_busy = self._teacher_busy()

    def batch_loaded(self) -> None:
        """Count the time since the last call as the loader's."""
        loader_s = self._lap()
        # There is none for the last batch of an epoch whose first one was ready before it began.
        if self._calls_ahead_s:
            self._last_call_s = self._calls_ahead_s.popleft()
        self._batch = _Spent(loader_s=loader_s, teacher_s=self._last_call_s)

    def batch_trained(self, num_images: int) -> None:
        """Count the time since the last call as the student's; on a GPU that is the time to queue its work."""
        self._batch.student_s, self._batch.num_images = self._lap(), num_images
        self._window.add(self._batch)
        self._run.add(self._batch)

    def batch_dropped(self) -> None:
        """Count neither the batch nor its time, which says nothing about others."""
        self._lap()

    def compute(self) -> dict[str, float]:
        """Images per second, the share of the loader (teacher included) and of the teacher, since the last call.

        Empty if nothing was trained since.
        """
        self._last_window, self._window = self._window, _Spent()
        return self._named(self._last_window)

    def of_run(self) -> dict[str, float]:
        """The same since the start; empty if nothing was trained."""
        return self._named(self._run)

    def now(self) -> dict[str, float]:
        """The same since the last `compute`, or right after it what that returned."""
        return self._named(self._window if self._window.num_images else self._last_window)

    def _named(self, spent: _Spent) -> dict[str, float]:
        if not spent.num_images:
            return {}
        metrics = spent.metrics()
        if self._teacher is None:
            del metrics["teacher_share"]
        return metrics

    def _lap(self) -> float:
        """Seconds since the last call, without those of the teacher, whose calls are noted."""
        last_s, (last_calls, last_busy_s) = self._last_s, self._last_busy
        self.restart()
        calls, busy_s = self._last_busy
        if num_calls := calls - last_calls:
            self._calls_ahead_s.extend([(busy_s - last_busy_s) / num_calls] * num_calls)
        return max(self._last_s - last_s - (busy_s - last_busy_s), 0.0)

    def _teacher_busy(self) -> tuple[int, float]:
        return (0, 0.0) if self._teacher is None else (self._teacher.num_calls, self._teacher.busy_s)
