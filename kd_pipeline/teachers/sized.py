"""One teacher for images of several sizes, of which it was opened for each."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.combined import close_all

__all__ = ["SizedTeacher"]


class SizedTeacher(Teacher):
    """Runs each batch on the teacher that was opened for its height and width.

    All are the same model, so what does not depend on the size is that of the first. `close()` closes all of them.
    """

    def __init__(self, by_size: Mapping[tuple[int, int], Teacher]) -> None:
        """Combine open teachers by height and width, of which there is at least one."""
        self._by_size = dict(by_size)
        first, *others = self._by_size.values()
        outputs = {
            name: TensorSpec(
                tuple(
                    size if all(other.outputs[name].shape[axis] == size for other in others) else None
                    for axis, size in enumerate(spec.shape)
                ),
                spec.dtype,
                spec.num_prefix_tokens,
            )
            for name, spec in first.outputs.items()
        }
        super().__init__(
            backend=first.backend,
            precision=first.precision,
            device=first.device,
            images=TensorSpec((None, 3, None, None), first.images.dtype),
            outputs=outputs,
            max_batch=min(teacher.max_batch for teacher in self._by_size.values()),
            classes=first.classes,
            fingerprint=hashlib.sha256(
                "".join(f"{size} {teacher.fingerprint}\n" for size, teacher in self._by_size.items()).encode()
            ).hexdigest(),
        )
        self.runtimes = tuple(dict.fromkeys(name for each in self._by_size.values() for name in each.runtimes))
        self.num_parameters = first.num_parameters
        self.problems = tuple(dict.fromkeys(text for each in self._by_size.values() for text in each.problems))

    def _infer(self, images: Any) -> dict[str, Tensor]:
        height, width = images.shape[2:]
        if (height, width) not in self._by_size:
            opened = ", ".join(f"{height} x {width}" for height, width in self._by_size)
            raise TeacherError(f"it is open for images of {opened}")
        return self._by_size[height, width](images)

    def _release(self) -> None:
        close_all(self._by_size.values())
