"""Teachers whose class order differs from the data's: their logits reordered by class name."""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.group import TeacherGroup

__all__ = ["PermutedTeacher", "match_classes"]

_logger = logging.getLogger("kd_pipeline")


class PermutedTeacher(Teacher):
    """An open teacher with its logits selected and reordered by class name.

    Column k of the logits `[N, K]` or `[N, K, h, w]` is the teacher's logit of `classes[k]`. Logits of other classes,
    such as a background class, are dropped, and a softmax distributes their probability over the rest. Other outputs
    pass through. `close()` also closes the wrapped teacher.
    """

    def __init__(self, teacher: Teacher, classes: Sequence[str]) -> None:
        """Wrap `teacher`, with logits in the order of `classes`.

        Raises:
            TeacherError: the teacher has no class names, or has one of `classes` not exactly once.
        """
        positions = _positions(teacher, classes)
        self._teacher = teacher
        self._positions_K = torch.tensor(positions, device=teacher.device)
        num_rows, _, *grid = teacher.outputs["logits"].shape
        logits = TensorSpec((num_rows, len(positions), *grid), torch.float32)
        super().__init__(
            backend=teacher.backend,
            precision=teacher.precision,
            device=teacher.device,
            inputs=teacher.inputs,
            outputs={**teacher.outputs, "logits": logits},
            max_batch=teacher.max_batch,
            classes=tuple(classes),
            fingerprint=hashlib.sha256(f"permuted {teacher.fingerprint} {positions}".encode()).hexdigest(),
        )
        self.view, self.runtimes = teacher.view, teacher.runtimes
        self.problems = teacher.problems

    def keep_outputs(self, names: Collection[str]) -> None:
        """Return only the outputs `names` from now on."""
        super().keep_outputs(names)
        self._teacher.keep_outputs(names)

    @property
    def views(self) -> tuple[str, ...]:
        """Those of the wrapped teacher."""
        return self._teacher.views if len(self._teacher.views) > 1 else (self.view,)

    def view_of(self, output: str) -> str:
        """As the wrapped teacher says."""
        return self._teacher.view_of(output) if len(self.views) > 1 else self.view

    def check_inputs(self, found: Mapping[str, TensorSpec], device: torch.device) -> None:
        """Check the inputs of the wrapped teacher."""
        self._teacher.check_inputs(found, device)

    def _infer(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._teacher(images)
        if "logits" in outputs:
            outputs["logits"] = outputs["logits"].index_select(1, self._positions_K)
        return outputs

    def _release(self) -> None:
        self._teacher.close()


def match_classes(teacher: Teacher, classes: Sequence[str] | None, *, used: Collection[str] | None = None) -> Teacher:
    """Return `teacher` with its logits in the order of `classes`, those of the data; as it is if they match already.

    Classes are matched by name, and a warning reports what was reordered or dropped. Without names on the teacher's
    side only the number of logits is checked, and without names on the data's side, or without logits, nothing. Of
    several teachers each that has logits is matched on its own. Logits that cannot be matched are an error if they are
    used, and else are left out, as those of a classifier that gives features only.

    Args:
        teacher: an open teacher; the one that is returned closes it.
        classes: of the data, in label order; None if it has none.
        used: names of the outputs that are used; None for all.

    Raises:
        TeacherError: the teacher lacks a class of the data, or its number of logits differs; names the first
            differences and what to do.
    """
    if classes is None:
        return teacher
    members: Mapping[str, Teacher] = teacher.members if isinstance(teacher, TeacherGroup) else {"": teacher}
    matched, foreign = dict(members), set()
    for name, member in members.items():
        output = f"{name}.logits" if name else "logits"
        try:
            if output in teacher.logits:
                matched[name] = _matched(member, classes)
        except TeacherError as exc:
            if used is None or output in used or len(teacher.outputs) == 1:
                raise TeacherError(f"member {name}: {exc}" if name else str(exc)) from exc
            foreign.add(output)
            _logger.info("the teacher's %s are left out, as the loss does not use them, and %s", output, exc)
    kept = [output for output in teacher.outputs if output not in foreign]
    if "" in matched:
        teacher = matched[""]
    elif matched != members:
        teacher = TeacherGroup(matched)
    teacher.keep_outputs(kept)
    return teacher


def _matched(teacher: Teacher, classes: Sequence[str]) -> Teacher:
    """A single teacher with logits in the order of `classes`.

    Raises:
        TeacherError: they do not match.
    """
    if teacher.classes == tuple(classes):
        return teacher
    if teacher.classes is None:
        num_logits = teacher.outputs["logits"].shape[1]
        if num_logits not in (None, len(classes)):
            raise TeacherError(
                f"the {teacher.backend} teacher has {num_logits} logits and no class names, the data has "
                f"{len(classes)} classes; export the teacher with its class names, by which its logits are matched to "
                "the data's classes, or use a teacher of these classes"
            )
        return teacher
    permuted = PermutedTeacher(teacher, classes)
    ours = set(classes)
    dropped = [repr(name) for name in teacher.classes if name not in ours]
    if dropped:
        _logger.warning(
            "the %s teacher has %d classes, of which the data has %d: its logits are reordered to match the data, and "
            "those of %s are dropped",
            teacher.backend,
            len(teacher.classes),
            len(classes),
            first_few(dropped),
        )
    else:
        pairs = enumerate(zip(classes, teacher.classes, strict=True))
        label, (here, there) = next((label, names) for label, names in pairs if names[0] != names[1])
        _logger.warning(
            "the %s teacher has the data's %d classes in a different order (class %d is %r in the data and %r in the "
            "teacher): its logits are reordered to match the data",
            teacher.backend,
            len(classes),
            label,
            here,
            there,
        )
    return permuted


def _positions(teacher: Teacher, classes: Sequence[str]) -> list[int]:
    """The column of each of `classes` in the teacher's logits."""
    if teacher.classes is None:
        raise TeacherError(f"the {teacher.backend} teacher has no class names; export it with them")
    counts = Counter(teacher.classes)
    missing = [repr(name) for name in classes if name not in counts]
    if missing:
        ours = set(classes)
        others = [repr(name) for name in teacher.classes if name not in ours]
        raise TeacherError(
            f"the teacher's {len(teacher.classes)} classes are not the data's {len(classes)}: it lacks "
            f"{first_few(missing)}" + (f", and the data has no {first_few(others)}" if others else "") + "; "
            "give the source `classes` with the teacher's names, or use a teacher of the data's classes"
        )
    twice = [repr(name) for name in classes if counts[name] > 1]
    if twice:
        raise TeacherError(
            f"the teacher has {first_few(twice)} more than once among its {len(teacher.classes)} classes, and its "
            "logits cannot be matched to the data by name; export it with unique names"
        )
    position_of = {name: position for position, name in enumerate(teacher.classes)}
    return [position_of[name] for name in classes]
