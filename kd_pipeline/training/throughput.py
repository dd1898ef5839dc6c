"""Training speed, and the shares of it that go to the loader and to the teacher."""

import time

from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["Throughput"]


class Throughput:
    """Wall-clock time on the host between two log lines, without that of validation and checkpoints."""

    def __init__(self, teacher: Teacher | Recording | None) -> None:
        self._teacher = teacher
        self._reset()
        self.restart()

    def restart(self) -> None:
        """Do not count the time since the last batch."""
        self._last = time.perf_counter()
        self._last_teacher_s = self._teacher_busy_s()

    def batch_loaded(self) -> None:
        """Count the time since the last call as the loader's."""
        self._loader_s += self._lap()

    def batch_trained(self, num_images: int) -> None:
        """Count the time since the last call as the student's; on a GPU that is the time to queue its work."""
        self._student_s += self._lap()
        self._num_images += num_images

    def compute(self) -> dict[str, float]:
        """Images per second, the share of the loader (teacher included) and of the teacher, since the last call."""
        total_s = max(self._loader_s + self._student_s, 1e-9)
        metrics = {"images_per_s": self._num_images / total_s, "loader_share": self._loader_s / total_s}
        if self._teacher is not None:
            metrics["teacher_share"] = self._teacher_s / total_s
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._loader_s = self._student_s = self._teacher_s = 0.0
        self._num_images = 0

    def _lap(self) -> float:
        """Seconds since the last call; the teacher's part of them is added up too."""
        last, last_teacher_s = self._last, self._last_teacher_s
        self.restart()
        self._teacher_s += self._last_teacher_s - last_teacher_s
        return self._last - last

    def _teacher_busy_s(self) -> float:
        return 0.0 if self._teacher is None else self._teacher.busy_s
