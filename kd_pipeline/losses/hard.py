"""Losses that ask for one class: the label of the data, or the teacher's first choice."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_pipeline.losses._rows import (
    batch_mean,
    check_label_smoothing,
    full_precision,
    label_rows,
    student_rows,
    teacher_rows,
)

__all__ = ["hard_label", "task"]

# cross_entropy always skips one class index, -100 by default; this one is no label that anybody writes by mistake.
_NO_LABEL = torch.iinfo(torch.int32).min


def task(
    student_logits_NK: Tensor, labels: Tensor | None, *, label_smoothing: float = 0.0, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the labels of the data, -Σ_k y_k · log q_k, batch mean.

    Args:
        student_logits_NK: `[N, K]` floating, K at least 2.
        labels: `[N]` int64 class indices, or `[N, K]` floating weights as mixing makes them.
        label_smoothing: share of each label, in [0, 1), that is spread evenly over the K classes.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape, a dtype or the label smoothing does not fit.
    """
    check_label_smoothing(label_smoothing)
    with full_precision(student_logits_NK):
        student_NK, valid_N = student_rows(student_logits_NK, valid, min_columns=2)
        labels = label_rows(labels, student_NK, valid_N)
        return batch_mean(_cross_entropy(student_NK, labels, label_smoothing), valid_N)


def hard_label(
    student_logits_NK: Tensor, teacher_logits_NK: Tensor, *, label_smoothing: float = 0.0, valid: Tensor | None = None
) -> Tensor:
    """Hard distillation (DeiT, Touvron et al., arXiv 2012.12877): cross-entropy with the teacher's first choice.

    Args:
        student_logits_NK: `[N, K]` floating, K at least 2.
        teacher_logits_NK: `[N, K]` floating.
        label_smoothing: share of each label, in [0, 1), that is spread evenly over the K classes.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students), batch mean; NaN where the teacher's logits are NaN.

    Raises:
        ConfigError: a shape, a dtype or the label smoothing does not fit.
    """
    check_label_smoothing(label_smoothing)
    with full_precision(student_logits_NK):
        student_NK, valid_N = student_rows(student_logits_NK, valid, min_columns=2)
        teacher_NK = teacher_rows(teacher_logits_NK, student_NK, valid_N)
        loss_N = _cross_entropy(student_NK, teacher_NK.argmax(dim=1), label_smoothing)
        # argmax takes NaN for the largest number, so a broken teacher would pass for a sure one.
        return batch_mean(loss_N.masked_fill(teacher_NK.isnan().any(dim=1), math.nan), valid_N)


def _cross_entropy(student_NK: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row, `[N]`."""
    return cross_entropy(student_NK, labels, ignore_index=_NO_LABEL, label_smoothing=label_smoothing, reduction="none")
