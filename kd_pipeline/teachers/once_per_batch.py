"""A teacher that several students compare with: it runs once for a batch that they evaluate one after the other."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.batch import KDBatch
from kd_pipeline.teachers.base import Teacher

__all__ = ["OncePerBatch"]


class OncePerBatch(Teacher):
    """Returns the same outputs for the tensor of the last call, which must not be changed in between."""

    def __init__(self, teacher: Teacher) -> None:
        """Run `teacher`, which stays open."""
        super().__init__(
            backend=teacher.backend,
            precision=teacher.precision,
            device=teacher.device,
            inputs=teacher.inputs,
            outputs=teacher.outputs,
            max_batch=teacher.max_batch,
            classes=teacher.classes,
            fingerprint=teacher.fingerprint,
        )
        self.runtimes, self.num_parameters = teacher.runtimes, teacher.num_parameters
        self._teacher, self.view = teacher, teacher.view
        self._images: weakref.ref[Tensor] | None = None
        self._found: dict[str, Tensor] = {}

    @property
    def logits(self) -> dict[str, tuple[str, ...] | None]:
        """Those of the teacher."""
        return self._teacher.logits

    @property
    def views(self) -> tuple[str, ...]:
        """Those of the teacher."""
        return self._teacher.views

    def view_of(self, output: str) -> str:
        """As the teacher says."""
        return self._teacher.view_of(output)

    def on_batch(self, batch: KDBatch) -> dict[str, Tensor]:
        """The outputs for the views that the teacher sees, of which it runs on the first time."""
        if self.views == (IMAGES,):
            return super().on_batch(batch)
        return self._once(batch.view(self.views[0]), lambda: self._teacher.on_batch(batch))

    def _infer(self, images: Any) -> dict[str, Tensor]:
        if not isinstance(images, Tensor):
            return self._teacher(images)
        return self._once(images, lambda: self._teacher(images))

    def _once(self, images: Tensor, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `run` returned for `images`, which is called unless they are those of the last call."""
        if self._images is None or self._images() is not images:
            self._found = run()
            self._images = weakref.ref(images, lambda _: self._found.clear())
        return dict(self._found)

    def _release(self) -> None:
        self._found.clear()
