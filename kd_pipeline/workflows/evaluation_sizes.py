"""The sizes and crops that models are compared at: views of a split beside that of its transform."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

from pydantic import ValidationError

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.image_size import as_size, height_width, size_text
from kd_pipeline.config.config import Config
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView, View
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings, TeacherSettings

__all__ = ["EvaluationSizes"]


@dataclass(frozen=True, slots=True)
class EvaluationSizes:
    """Evaluation transforms of one split."""

    own: TrainTransform | EvalTransform
    """That of the split."""
    transforms: Mapping[str, EvalTransform]
    """Those to evaluate with, by what the rows say: `at 224`, or `at 224, crop 1`."""

    @classmethod
    def of(
        cls,
        own: TrainTransform | EvalTransform,
        sizes: Sequence[int | tuple[int, int]] = (),
        crops: Sequence[float] = (),
    ) -> Self:
        """Each of `sizes` with each of `crops`, in the format of `own`.

        Args:
            own: the transform of the split.
            sizes: height and width in pixels; defaults to those of `own`.
            crops: fraction of the resized image's shorter side that is left by the crop; defaults to that of `own`.

        Raises:
            ConfigError: a size or crop is out of range, or there twice.
        """
        transforms: dict[str, EvalTransform] = {}
        for size, crop in product(map(as_size, sizes or (own.height_width,)), crops or (None,)):
            label = f"at {size_text(size)}" + ("" if crop is None else f", crop {crop:g}")
            if label in transforms:
                raise ConfigError(f"sizes and crops have {label!r} twice; leave one out")
            transforms[label] = _at(own, size, crop)
        return cls(own, transforms)

    @property
    def views(self) -> dict[str, EvalView]:
        """Views of the loader, whose transform is `own`, by name."""
        fields = EvalView.model_fields
        return {
            label: EvalView(**{name: getattr(transform, name) for name in fields})
            for label, transform in self.transforms.items()
            if transform.crop != self.own.crop
        }

    @property
    def view_names(self) -> dict[str, str]:
        """The name of the view of each of `transforms`."""
        views = self.views
        return {label: label if label in views else IMAGES for label in self.transforms}

    def configs(self, config: Config, split: str) -> dict[tuple[int, int], Config]:
        """`config` for each height and width, in which `split` has this size, and all models see its images.

        Raises:
            ConfigError: a model sees a view that is normalized differently.
        """
        for name in config.seen_views:
            view = config.data.view(split, name)
            if _format(view) != _format(config.data.view(split, IMAGES)):
                raise ConfigError(
                    f"sizes and crops are those of the split's transform, and a model of the config sees the view "
                    f"{name}, which has another mean, std or dtype; give the transform these, or leave sizes out"
                )
        config = _seeing_images(config)
        return {
            transform.height_width: _with_transform(config, split, transform) for transform in self.transforms.values()
        }


def _at(own: TrainTransform | EvalTransform, size: int | tuple[int, int], crop: float | None) -> EvalTransform:
    """The evaluation transform of `size` that crops `crop`, or as much as `own`."""
    if crop is not None and not 0 < crop <= 1:
        raise ConfigError(f"crops: {crop:g} is no fraction of the image; give one above 0, up to 1 for no crop")
    shorter, resize = min(height_width(size)), None
    if crop is not None:
        resize = max(shorter, round(shorter / crop))
    elif isinstance(own, EvalTransform) and own.resize is not None:
        resize = round(own.resize * shorter / min(own.height_width))
    kept = [name for name in EvalTransform.model_fields if name not in ("preset", "size", "resize")]
    try:
        return EvalTransform(**{name: getattr(own, name) for name in kept}, size=size, resize=resize)
    except ValidationError as exc:
        raise ConfigError(f"sizes: {size_text(size)}: {exc.errors()[0]['msg']}") from None


def _with_transform(config: Config, split: str, transform: EvalTransform) -> Config:
    """`config` with another transform of a split."""
    changed = config.data.split(split).model_copy(update={"transform": transform, "views": {}})
    return config.model_copy(update={"data": config.data.with_split(split, changed)})


def _format(view: View) -> tuple[Any, ...]:
    return view.normalize.mean, view.normalize.std, view.normalize.dtype


def _seeing_images(config: Config) -> Config:
    """`config` whose students and teachers see `images`."""
    images = {"view": IMAGES}
    teacher = config.teacher
    match teacher:
        case TeacherSettings():
            teacher = teacher.model_copy(update=images)
        case EnsembleSettings():
            members = tuple(member.model_copy(update=images) for member in teacher.members)
            teacher = teacher.model_copy(update={"members": members})
        case TeacherGroupSettings():
            named = {name: member.model_copy(update=images) for name, member in teacher.members.items()}
            teacher = teacher.model_copy(update={"members": named})
    students = {name: student.model_copy(update=images) for name, student in config.students.items()}
    student = None if config.student is None else config.student.model_copy(update=images)
    return config.model_copy(update={"teacher": teacher, "student": student, "students": students})
