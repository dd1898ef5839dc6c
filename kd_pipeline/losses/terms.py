"""The terms that compare features: which outputs each one means, how they meet, and its value."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.compiled import LossFunctions, loss_by_name
from kd_pipeline.losses.features import sample_cosine
from kd_pipeline.losses.meeting import Meeting
from kd_pipeline.losses.outputs import find_output
from kd_pipeline.losses.pixels import PixelLabels
from kd_pipeline.losses.settings import TermSettings
from kd_pipeline.losses.standardize import Standardizer
from kd_pipeline.losses.teacher_queue import TeacherQueue

__all__ = ["NEED_LABELS", "Term", "TermModules", "check_on_zeros", "compute_loss", "settle_term"]

NEED_LABELS = {"dkd"}
"""Losses that need the class of each image besides the teacher's logits."""


class Term(NamedTuple):
    """A term of the loss, settled."""

    name: str
    settings: TermSettings
    student: str
    """Key among the student's outputs and layers."""
    teacher: str
    """Key among the teacher's outputs."""
    meeting: Meeting


class TermModules(NamedTuple):
    """What a term learns, or knows of earlier batches."""

    projector: nn.Module
    standardizer: Standardizer | None
    queue: TeacherQueue | None

    def compute(
        self,
        term: Term,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        *,
        valid: Tensor,
        temperature: float | None,
        pixels: PixelLabels | None = None,
        functions: LossFunctions = loss_by_name,
    ) -> Tensor:
        """The value of the term for the features of a batch, a scalar; at the default of its loss without temperature.

        In training mode the teacher's valid rows go into its statistics first, and into the queue last.
        """
        student, teacher = term.meeting(student, teacher, self.projector)
        if self.standardizer is not None:
            teacher = self.standardizer(teacher, valid)
        references = None if self.queue is None else self.queue(teacher, valid)
        return compute_loss(
            term.settings,
            student,
            teacher,
            labels,
            valid=valid,
            temperature=temperature,
            references=references,
            pixels=pixels,
            functions=functions,
        )

    @torch.no_grad()
    def cosine(self, term: Term, student: Tensor, teacher: Tensor) -> Tensor | None:
        """Cosine of what the term compares, per sample `[N]` float32; None if the widths differ.

        It changes no statistics.
        """
        student, teacher = term.meeting(student, teacher, self.projector)
        if student.shape != teacher.shape:
            return None
        if self.standardizer is not None:
            teacher = self.standardizer.standardize(teacher)
        return sample_cosine(student, teacher).float()


def settle_term(
    name: str,
    settings: TermSettings,
    student_name: str,
    student: Tensor,
    num_prefix_tokens: int | None,
    teacher_outputs: Mapping[str, TensorSpec],
    *,
    place: str | None = None,
) -> tuple[Term, TermModules]:
    """A term and its modules, computed once on zeros in place of the teacher's output, if its shape is known.

    Args:
        name: of the term.
        settings: of the term.
        student_name: the key of the student's features.
        student: the student's features for two images.
        num_prefix_tokens: of the student's tokens; None if it is unknown.
        teacher_outputs: `Teacher.outputs`.
        place: the term's key, for messages; defaults to that of an extra term.

    Raises:
        ConfigError: the teacher lacks the output, or the two cannot be compared by this loss.
    """
    place = place or f"distill.features: {name}"
    teacher_name = find_output(settings.teacher, teacher_outputs, place=place, owner="teacher")
    spec = teacher_outputs[teacher_name]
    own_spec = TensorSpec(tuple(student.shape), student.dtype, num_prefix_tokens if student.ndim == 3 else None)
    meeting = Meeting(settings, place, own_spec, spec)
    term = Term(name, settings, student_name, teacher_name, meeting)
    try:
        modules = TermModules(
            meeting.build_projector(student),
            _standardizer(settings, meeting.teacher_width, student.device),
            _queue(settings, meeting.teacher_width, student.device),
        )
        check_on_zeros(term.settings, student, spec, meet=lambda own, zeros: meeting(own, zeros, modules.projector))
    except ConfigError as exc:
        message = str(exc) if str(exc).startswith(place) else f"{place}: {exc}; {meeting.shapes}"
        raise ConfigError(message) from exc
    return term, modules


def compute_loss(
    settings: TermSettings,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    valid: Tensor | None = None,
    temperature: float | None = None,
    references: tuple[Tensor, Tensor] | None = None,
    pixels: PixelLabels | None = None,
    functions: LossFunctions = loss_by_name,
) -> Tensor:
    """The value of a loss for tensors that fit; without a `temperature`, at the default of the loss.

    Raises:
        ConfigError: they do not fit, or the loss needs labels or masks that are None.
    """
    arguments: dict[str, Any] = {**settings.options, "valid": valid}
    if temperature is not None:
        arguments["temperature"] = temperature
    if settings.loss in NEED_LABELS and student.ndim == 4:
        arguments["labels"], arguments["mask"] = _needed(pixels, settings.loss).at((student.shape[2], student.shape[3]))
    elif settings.loss in NEED_LABELS:
        arguments["labels"] = labels
    if settings.skip_ignored:
        arguments["mask"] = _needed(pixels, "skip_ignored").mask_of(student)
    if references is not None:
        arguments["references_MD"], arguments["references_valid"] = references
    return functions(settings.loss)(student, teacher, **arguments)


def check_on_zeros(
    settings: TermSettings,
    student: Tensor,
    teacher: TensorSpec,
    *,
    meet: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Compute a loss on zeros, to report what does not fit before training; not if the teacher's shape is open.

    Args:
        settings: of the term.
        student: the student's features for two images.
        teacher: what the zeros stand for.
        meet: makes the two comparable, if they need it.

    Raises:
        ConfigError: they do not fit, or an option is invalid.
    """
    sizes = [size for size in teacher.shape[1:] if size is not None]
    if len(sizes) < len(teacher.shape) - 1:
        return
    zeros = student.new_zeros(len(student), *sizes)
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    with torch.no_grad():
        if meet is not None:
            student, zeros = meet(student, zeros)
        pixels = PixelLabels(labels[:, None, None], ignore_index=-1)
        compute_loss(settings, student, zeros, labels, pixels=pixels)


def _needed(pixels: PixelLabels | None, what: str) -> PixelLabels:
    if pixels is None:
        raise ConfigError(
            f"{what} needs the class of each pixel, and the batch has no masks; use data with masks, or "
            + ("set skip_ignored to false" if what == "skip_ignored" else "choose a loss without labels")
        )
    return pixels


def _standardizer(settings: TermSettings, width: int | None, device: torch.device) -> Standardizer | None:
    if settings.standardize == "none":
        return None
    return Standardizer(settings.standardize, _known(width, "standardize"), device=device)


def _queue(settings: TermSettings, width: int | None, device: torch.device) -> TeacherQueue | None:
    if settings.queue_size is None:
        return None
    return TeacherQueue(settings.queue_size, _known(width, "queue_size"), device=device)


def _known(width: int | None, key: str) -> int:
    if width is None:
        raise ConfigError(f"{key} needs a teacher whose number of features is known; export it with a fixed width")
    return width
