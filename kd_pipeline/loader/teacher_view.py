"""Which views of the images a teacher sees, whether it takes them, and whether its classes are those of the data."""

from itertools import zip_longest

import torch

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.data.views import View, Views
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["check_classes", "check_takes", "seen_views"]


def seen_views(
    teacher: Teacher | Recording | None, given: str | None, *, rendered: Views, known: Views
) -> tuple[str, ...]:
    """The views that the teacher of a loader sees.

    Args:
        teacher: it, which says its views; an open one that says none keeps `given` as its view.
        given: the argument `teacher_view` of the loader.
        rendered: the views of its batches, which an open teacher can see.
        known: all views, of which a recording may be.

    Raises:
        ConfigError: the teacher says another view than `given`, or there is no such view.
    """
    says: tuple[str, ...] = (IMAGES,)
    if isinstance(teacher, Teacher):
        says, known = teacher.views, rendered
        if given is not None and says not in ((IMAGES,), (given,)):
            raise ConfigError(
                f"teacher_view is {given!r}, and the teacher sees {' and '.join(says)} already, as its settings say; "
                "leave teacher_view out"
            )
    elif teacher is not None:
        says = (teacher.view,)
    names = says if given is None else (given,)
    for name in names:
        if name not in known:
            what = "the teacher's view is" if given is None else "teacher_view is"
            raise ConfigError(f"{what} {name!r}, and there is no such view{suggest(name, known.names)}")
    if isinstance(teacher, Teacher) and given is not None:
        teacher.view = given
    return names


def check_takes(teacher: Teacher, views: list[View], *, batch_size: int, device: torch.device) -> None:
    """Raise now what would be raised at the first batch of images of `views`, which `teacher` sees, at all their sizes.

    Raises:
        TeacherError: it takes other images, or fewer at a time.
    """
    names = [view.name for view in views] if len(views) > 1 else [*teacher.inputs][:1]
    for number in range(max(len(view.sizes) for view in views)):
        sizes = (view.sizes[min(number, len(view.sizes) - 1)] for view in views)
        specs = [
            TensorSpec((batch_size * view.copies, 3, *size), getattr(torch, view.normalize.dtype))
            for view, size in zip(views, sizes, strict=True)
        ]
        teacher.check_inputs(dict(zip(names, specs, strict=True)), device)


def check_classes(teacher: Teacher, classes: tuple[str, ...] | None) -> None:
    """Refuse logits of other classes than `classes`, those of the data, or in another order; None is any.

    Raises:
        TeacherError: names the first difference.
    """
    for name, theirs in teacher.logits.items():
        if classes is not None and theirs is not None and classes != theirs:
            here, there = next(pair for pair in zip_longest(classes, theirs) if pair[0] != pair[1])
            raise TeacherError(
                f"the teacher's {len(theirs)} classes are not the data's {len(classes)} in the same order: where the "
                f"data has {here!r} the teacher has {there!r} ({name}); give the source the teacher's order as "
                "`classes`"
            )
