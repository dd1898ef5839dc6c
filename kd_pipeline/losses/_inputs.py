"""What every loss does around its formula: validate, upcast and mask its inputs, and average over valid rows."""

import math

import torch
from torch import Tensor

from kd_pipeline.errors import ConfigError, DataError

__all__ = [
    "check_label_smoothing",
    "check_temperature",
    "describe",
    "expected",
    "mask_rows",
    "masked_mean",
    "no_autocast",
    "prepare_labels",
    "prepare_logits",
    "prepare_student",
]


def no_autocast(student: Tensor) -> torch.autocast:
    """A context without autocast on the student's device."""
    return torch.autocast(student.device.type, enabled=False)


def prepare_student(student: Tensor, valid: Tensor | None, *, min_columns: int) -> tuple[Tensor, Tensor]:
    """The student's rows, upcast and masked, and `valid` `[N]` bool, all True if it was None.

    Raises:
        ConfigError: the student is not a floating `[N, min_columns or more]` tensor, or `valid` is not `[N]` bool.
    """
    if student.ndim != 2 or student.shape[1] < min_columns or not student.is_floating_point():
        raise ConfigError(
            f"the student must be a floating [N, {min_columns} or more] tensor, got {describe(student)}; reshape it to "
            "one row per sample, one column per class or feature"
        )
    if valid is None:
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    elif valid.shape != student.shape[:1] or valid.dtype != torch.bool:
        raise ConfigError(f"valid must be [{len(student)}] bool, one per row of the student, got {describe(valid)}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return mask_rows(student.to(dtype), valid), valid


def prepare_logits(
    student: Tensor, teacher: Tensor, valid: Tensor | None, *, min_columns: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """`prepare_student`, with the teacher's rows in between: detached, in the same dtype, masked.

    Raises:
        ConfigError: as `prepare_student`, or the teacher's shape is not the student's, or its dtype is not floating.
    """
    student, valid = prepare_student(student, valid, min_columns=min_columns)
    if teacher.shape != student.shape or not teacher.is_floating_point():
        raise ConfigError(
            f"teacher and student must be floating tensors of the same shape: the teacher is {describe(teacher)}, "
            f"the student {describe(student)}; give both models the same samples and the same classes"
        )
    return student, mask_rows(teacher.detach().to(student.dtype), valid), valid


def prepare_labels(labels: Tensor | None, student: Tensor, valid: Tensor) -> Tensor:
    """The labels, masked: `[N]` int64 unchanged, `[N, K]` floating in the dtype of `student`.

    Raises:
        ConfigError: they are neither, or None.
        DataError: a class is none of the student's; on a GPU, which would have to be waited for, torch fails instead.
    """
    if labels is None:
        raise ConfigError("this loss needs labels and the batch has none; use labeled data or a loss without labels")
    if labels.shape == student.shape[:1] and labels.dtype == torch.int64:
        labels = mask_rows(labels, valid)
        # Tensors of other classes may have no values to look at.
        if labels.device.type == "cpu" and type(labels) is Tensor and not torch.compiler.is_compiling():
            _check_range(labels, student.shape[1])
        return labels
    if labels.shape == student.shape and labels.is_floating_point():
        return mask_rows(labels.detach().to(student.dtype), valid)
    num_rows, num_classes = student.shape
    raise ConfigError(
        f"labels must be [{num_rows}] int64 class indices or [{num_rows}, {num_classes}] floating weights "
        f"to match the student's {describe(student)}, got {describe(labels)}"
    )


def _check_range(labels: Tensor, num_classes: int) -> None:
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"the label of row {row} is {int(labels[row])}, and the student has {num_classes} logits, for labels from "
            f"0 to {num_classes - 1}; give it as many classes as the data has, and mark rows without one as not valid"
        )


def check_temperature(temperature: float) -> None:
    """Raise `ConfigError` unless `temperature` is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be a finite number above 0, got {temperature}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise `ConfigError` unless `label_smoothing` is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")


def mask_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """`rows` with zeros where `valid` is False.

    It fills instead of multiplying: 0 times NaN is NaN, in the value and again in the gradient.
    """
    return rows.masked_fill(~valid.view(-1, *[1] * (rows.ndim - 1)), 0)


def masked_mean(loss_N: Tensor, valid_N: Tensor) -> Tensor:
    """Mean over the valid rows; 0 without any."""
    return mask_rows(loss_N, valid_N).sum() / valid_N.sum().clamp(min=1)


def expected(probability_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Σ_k p_k · v_k per row, `[N]`. A class of probability 0 adds 0, as 0 · log 0 does, even if v_k is infinite.

    The probabilities are constants: they have no gradient.
    """
    return (probability_NK * values_NK.masked_fill(probability_NK == 0, 0)).sum(dim=1)


def describe(tensor: Tensor) -> str:
    """Shape and dtype for messages, such as `[4, 10] float32`."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
