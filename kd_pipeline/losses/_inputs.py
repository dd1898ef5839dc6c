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


def prepare_student(
    student: Tensor, valid: Tensor | None, *, min_columns: int, mask: Tensor | None = None, maps: bool = False
) -> tuple[Tensor, Tensor]:
    """The student's rows, upcast and masked, and `valid` `[N]` bool, all True if it was None.

    Maps `[N, K, h, w]`, if there may be any, become `[N, K, P]` with P = h · w positions, and `valid` becomes `[N, P]`:
    each position counts as a row.

    Args:
        student: rows or maps.
        valid: `[N]` bool, the rows that count.
        min_columns: smallest K.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        maps: whether maps are allowed.

    Raises:
        ConfigError: the student is neither a floating `[N, min_columns or more]` tensor nor such a map, or `valid` or
            `mask` does not fit it.
    """
    is_map = maps and student.ndim == 4
    if (student.ndim != 2 and not is_map) or student.shape[1] < min_columns or not student.is_floating_point():
        advice = "reshape it to one row per sample, one column per class or feature"
        if maps:
            advice += f", or pass maps [N, {min_columns} or more, h, w] with a row for each position"
        if student.ndim == 2 and student.shape[1] == 1 and student.is_floating_point():  # a folder of one class
            advice = "a single class has no other to be told from, so give the data a second one"
        raise ConfigError(
            f"the student must be a floating [N, {min_columns} or more] tensor, got {describe(student)}; {advice}"
        )
    if valid is None:
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    elif valid.shape != student.shape[:1] or valid.dtype != torch.bool:
        raise ConfigError(f"valid must be [{len(student)}] bool, one per row of the student, got {describe(valid)}")
    if mask is not None and (not is_map or mask.shape != student[:, 0].shape or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask must be [N, h, w] bool for maps [N, K, h, w], got {describe(mask)} for {describe(student)}"
        )
    if is_map:
        student = student.flatten(2)
        valid = valid[:, None].expand(-1, student.shape[2])
        valid = valid if mask is None else valid & mask.flatten(1)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return mask_rows(student.to(dtype), valid), valid


def prepare_logits(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    *,
    min_columns: int = 2,
    mask: Tensor | None = None,
    maps: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prepare_student`, with the teacher's rows in between: detached, in the same dtype, masked.

    Raises:
        ConfigError: as `prepare_student`, or the teacher's shape is not the student's, or its dtype is not floating.
    """
    rows, valid = prepare_student(student, valid, min_columns=min_columns, mask=mask, maps=maps)
    if teacher.shape != student.shape or not teacher.is_floating_point():
        raise ConfigError(
            f"teacher and student must be floating tensors of the same shape: the teacher is {describe(teacher)}, "
            f"the student {describe(student)}; give both models the same samples and the same classes"
            + (", and resize the maps of one of them" if student.ndim == 4 else "")
        )
    return rows, mask_rows(teacher.detach().to(rows.dtype).reshape(rows.shape), valid), valid


def prepare_labels(labels: Tensor | None, student: Tensor, valid: Tensor) -> Tensor:
    """The labels, masked: `[N]` int64 unchanged, `[N, K]` floating in the dtype of `student`.

    Those of maps, `[N, h, w]` int64, become `[N, P]`, as the student `[N, K, P]` is.

    Raises:
        ConfigError: they are neither, or None.
        DataError: a class is none of the student's; on a GPU, which would have to be waited for, torch fails instead.
    """
    if labels is None:
        raise ConfigError("this loss needs labels and the batch has none; use labeled data or a loss without labels")
    if labels.dtype == torch.int64 and (labels.flatten(1) if labels.ndim == 3 else labels).shape == valid.shape:
        labels = mask_rows(labels.reshape(valid.shape), valid)
        # Tensors of other classes may have no values to look at.
        if labels.device.type == "cpu" and type(labels) is Tensor and not torch.compiler.is_compiling():
            _check_range(labels, student.shape[1])
        return labels
    if labels.shape == student.shape and labels.is_floating_point():
        return mask_rows(labels.detach().to(student.dtype), valid)
    num_rows, num_classes = student.shape[:2]
    if student.ndim == 3:
        raise ConfigError(
            f"labels of maps must be [{num_rows}, h, w] int64, the class of each of {student.shape[2]} positions, got "
            f"{describe(labels)}"
        )
    raise ConfigError(
        f"labels must be [{num_rows}] int64 class indices or [{num_rows}, {num_classes}] floating weights "
        f"to match the student's {describe(student)}, got {describe(labels)}"
    )


def _check_range(labels: Tensor, num_classes: int) -> None:
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        place = tuple(outside[0].tolist())
        what, mark = (
            ("label", "rows without one as not valid")
            if labels.ndim == 1
            else ("mask", "pixels without one with the ignore index, which is 255 by default")
        )
        raise DataError(
            f"the {what} of row {place[0]} {'is' if labels.ndim == 1 else 'has the class'} {int(labels[place])}, and "
            f"the student has {num_classes} logits, for labels from 0 to {num_classes - 1}; give it as many classes as "
            f"the data has, and mark {mark}"
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
    """`rows` `[N, ...]` with zeros where `valid` `[N]` is False; `[N, P]` or `[N, K, P]` where a `valid` `[N, P]` is.

    It fills instead of multiplying: 0 times NaN is NaN, in the value and again in the gradient.
    """
    if valid.ndim == 2:
        return rows.masked_fill(~(valid if rows.ndim == 2 else valid[:, None]), 0)
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
