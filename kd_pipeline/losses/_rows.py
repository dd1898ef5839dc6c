"""What every loss does around its formula: check, upcast, blank the rows that do not count, take the batch mean."""

import math

import torch
from torch import Tensor

from kd_pipeline.errors import ConfigError

__all__ = [
    "batch_mean",
    "blank",
    "check_label_smoothing",
    "check_temperature",
    "full_precision",
    "label_rows",
    "student_rows",
    "teacher_rows",
]


def full_precision(student: Tensor) -> torch.autocast:
    """A context in which autocast leaves the student's device alone."""
    return torch.autocast(student.device.type, enabled=False)


def student_rows(student: Tensor, valid: Tensor | None, *, min_columns: int) -> tuple[Tensor, Tensor]:
    """The student's rows, upcast and blanked, and `valid` `[N]` bool, all True where it was None.

    Raises:
        ConfigError: the student is not a `[N, min_columns or more]` floating tensor, or `valid` is not `[N]` bool.
    """
    if student.ndim != 2 or student.shape[1] < min_columns or not student.is_floating_point():
        raise ConfigError(
            f"the student must be a floating [N, {min_columns} or more] tensor, got {_describe(student)}; "
            "bring it to one row per sample, one column per class or feature"
        )
    if valid is None:
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    elif valid.shape != student.shape[:1] or valid.dtype != torch.bool:
        raise ConfigError(
            f"valid must be [{len(student)}] bool, one entry for each row of the student, got {_describe(valid)}"
        )
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return blank(student.to(dtype), valid), valid


def teacher_rows(teacher: Tensor, student: Tensor, valid: Tensor) -> Tensor:
    """The teacher's rows: detached, in the dtype of `student`, blanked.

    Raises:
        ConfigError: the teacher's shape is not the student's, or it is not floating.
    """
    if teacher.shape != student.shape or not teacher.is_floating_point():
        raise ConfigError(
            f"teacher and student must be floating tensors of one shape: the teacher is {_describe(teacher)}, "
            f"the student {_describe(student)}; give both models the same samples and the same classes"
        )
    return blank(teacher.detach().to(student.dtype), valid)


def label_rows(labels: Tensor | None, student: Tensor, valid: Tensor) -> Tensor:
    """The labels, blanked: `[N]` int64 as they are, `[N, K]` floating in the dtype of `student`.

    Raises:
        ConfigError: they are neither, or there are none.
    """
    if labels is None:
        raise ConfigError("this loss needs labels and the batch has none; use labeled data or a loss without them")
    if labels.shape == student.shape[:1] and labels.dtype == torch.int64:
        return blank(labels, valid)
    if labels.shape == student.shape and labels.is_floating_point():
        return blank(labels.detach().to(student.dtype), valid)
    num_rows, num_classes = student.shape
    raise ConfigError(
        f"labels must be [{num_rows}] int64 class indices or [{num_rows}, {num_classes}] floating weights "
        f"to fit the student's {_describe(student)}, got {_describe(labels)}"
    )


def check_temperature(temperature: float) -> None:
    """Raise `ConfigError` unless `temperature` is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be a finite number above 0, got {temperature}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise `ConfigError` unless `label_smoothing` is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")


def blank(rows: Tensor, valid: Tensor) -> Tensor:
    """`rows` with zeros where `valid` is False.

    A fill, not a product: 0 times NaN is NaN, in the value and again in the gradient.
    """
    return rows.masked_fill(~valid.view(-1, *[1] * (rows.ndim - 1)), 0)


def batch_mean(loss_N: Tensor, valid_N: Tensor) -> Tensor:
    """Sum of the rows that count over their number; 0 where there are none."""
    return blank(loss_N, valid_N).sum() / valid_N.sum().clamp(min=1)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
