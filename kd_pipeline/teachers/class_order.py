"""A teacher whose class names are the data's in another order, or hold them all: its logits in the data's order."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from kd_pipeline._core.suggestions import some
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher

__all__ = ["PermutedTeacher", "matched"]

_logger = logging.getLogger("kd_pipeline")


class PermutedTeacher(Teacher):
    """An open teacher that answers for `classes`, by name, in that order.

    Logit k `[N, K]` is the teacher's logit for `classes[k]`; its logits for other classes, such as a background class,
    are left out, so that a softmax shares their probability among the rest. Other outputs are the teacher's own.
    `close()` closes the teacher too.
    """

    def __init__(self, teacher: Teacher, classes: Sequence[str]) -> None:
        """Put the logits of `teacher` into the order of `classes`.

        Raises:
            TeacherError: the teacher does not know its classes, lacks one of `classes` or has it twice.
        """
        positions = _positions(teacher, classes)
        self._teacher = teacher
        self._positions_K = torch.tensor(positions, device=teacher.device)
        logits = TensorSpec((teacher.outputs["logits"].shape[0], len(positions)), torch.float32)
        super().__init__(
            backend=teacher.backend,
            precision=teacher.precision,
            device=teacher.device,
            images=teacher.images,
            outputs={**teacher.outputs, "logits": logits},
            max_batch=teacher.max_batch,
            classes=tuple(classes),
            fingerprint=hashlib.sha256(f"permuted {teacher.fingerprint} {positions}".encode()).hexdigest(),
        )

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self._teacher(images)
        return {**outputs, "logits": outputs["logits"].index_select(1, self._positions_K)}

    def _release(self) -> None:
        self._teacher.close()


def matched(teacher: Teacher, classes: Sequence[str] | None) -> Teacher:
    """`teacher` with its logits in the order of `classes`, the data's; itself where they are in that order already.

    Names decide where both sides have them, and a warning says what was reordered or left out. Where the teacher has
    no names only the number of logits can be compared, and where the data has none nothing can.

    Raises:
        TeacherError: the teacher lacks a class of the data, or has another number of logits; names the first
            differences and says what to do.
    """
    if classes is None or teacher.classes == tuple(classes):
        return teacher
    if teacher.classes is None:
        num_logits = teacher.outputs["logits"].shape[1]
        if num_logits not in (None, len(classes)):
            raise TeacherError(
                f"the {teacher.backend} teacher has {num_logits} logits and no class names, the data has "
                f"{len(classes)} classes; export the teacher with its class names, which finds the logits of the "
                "data's classes among them, or take a teacher of these classes"
            )
        return teacher
    if isinstance(teacher, RecordedTeacher):
        label, here, there = _first_difference(classes, teacher.classes)
        raise TeacherError(
            f"the recording in {teacher.path} was made for other classes ({len(teacher.classes)} there, {len(classes)} "
            f"in the data): class {label} is {here!r} in the data and {there!r} there; record the teacher again"
        )
    permuted = PermutedTeacher(teacher, classes)
    ours = set(classes)
    dropped = [repr(name) for name in teacher.classes if name not in ours]
    if dropped:
        _logger.warning(
            "the %s teacher knows %d classes, the data %d of them: its logits are brought to the data's order, and "
            "those of %s are left out",
            teacher.backend,
            len(teacher.classes),
            len(classes),
            some(dropped),
        )
    else:
        label, here, there = _first_difference(classes, teacher.classes)
        _logger.warning(
            "the %s teacher has the data's %d classes in another order (class %d is %r in the data and %r in the "
            "teacher): its logits are brought to the data's order",
            teacher.backend,
            len(classes),
            label,
            here,
            there,
        )
    return permuted


def _positions(teacher: Teacher, classes: Sequence[str]) -> list[int]:
    """Where among the teacher's logits each of `classes` is."""
    if teacher.classes is None:
        raise TeacherError(f"the {teacher.backend} teacher does not know its classes; export it with their names")
    counts = Counter(teacher.classes)
    missing = [repr(name) for name in classes if name not in counts]
    if missing:
        ours = set(classes)
        others = [repr(name) for name in teacher.classes if name not in ours]
        raise TeacherError(
            f"the teacher's {len(teacher.classes)} classes are not the data's {len(classes)}: it does not know "
            f"{some(missing)}" + (f", and the data has no {some(others)}" if others else "") + "; "
            "give the source `classes` with the teacher's names, or take a teacher of the data's classes"
        )
    twice = [repr(name) for name in classes if counts[name] > 1]
    if twice:
        raise TeacherError(
            f"the teacher has {some(twice)} more than once among its {len(teacher.classes)} classes, so its logits "
            "cannot be matched to the data by name; export it with names that differ"
        )
    position_of = {name: position for position, name in enumerate(teacher.classes)}
    return [position_of[name] for name in classes]


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> tuple[int, str | None, str | None]:
    """The first label whose class differs, and its names, None for one too many; there is one."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((label, here, there) for label, (here, there) in pairs if here != there)
