"""Losses with one class per sample as the target: the label, or the teacher's top prediction."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_pipeline._core.finite import has_softmax
from kd_pipeline.losses._inputs import (
    check_label_smoothing,
    expected,
    masked_mean,
    no_autocast,
    prepare_labels,
    prepare_logits,
    prepare_student,
)

__all__ = ["hard_label", "task"]

# cross_entropy always ignores one class index, -100 by default. Nobody writes this one by mistake.
_IGNORE_INDEX = torch.iinfo(torch.int32).min


def task(
    student_logits_NK: Tensor,
    labels: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with the labels of the data: -Σ_k y_k · log q_k, batch mean; q is softmax(student logits).

    Of maps it is the pixel-wise cross-entropy of torchvision's reference for segmentation, the mean over the pixels
    that count, where `mask` is `labels != 255`.

    A class that the student excludes with a logit of -inf adds 0 if its y_k is 0; otherwise the loss is infinite.

    Args:
        student_logits_NK: `[N, K]` or maps `[N, K, h, w]` floating, K at least 2.
        labels: `[N]` int64 class indices, or `[N, K]` floating weights such as mixup's; `[N, h, w]` int64 for maps.
        label_smoothing: fraction of each label, in [0, 1), that is spread evenly over the K classes.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    check_label_smoothing(label_smoothing)
    with no_autocast(student_logits_NK):
        student_NK, valid_N = prepare_student(student_logits_NK, valid, min_columns=2, mask=mask, maps=True)
        labels = prepare_labels(labels, student_NK, valid_N)
        return masked_mean(_cross_entropy(student_NK, labels, label_smoothing), valid_N)


def hard_label(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Hard distillation (DeiT, Touvron et al., arXiv 2012.12877): -log q_c, c = argmax_k of the teacher's logits.

    q is softmax(student logits); batch mean. It has no temperature. As in the other losses, a row in which the teacher
    has NaN, inf or no logit above -inf makes the loss NaN: argmax would find a class there too.

    Args:
        student_logits_NK: `[N, K]` or maps `[N, K, h, w]` floating, K at least 2.
        teacher_logits_NK: the same.
        label_smoothing: fraction of each label, in [0, 1), that is spread evenly over the K classes.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    check_label_smoothing(label_smoothing)
    with no_autocast(student_logits_NK):
        student_NK, teacher_NK, valid_N = prepare_logits(student_logits_NK, teacher_logits_NK, valid, mask=mask)
        loss_N = _cross_entropy(student_NK, teacher_NK.argmax(dim=1), label_smoothing)
        return masked_mean(loss_N.masked_fill(~has_softmax(teacher_NK), math.nan), valid_N)


def _cross_entropy(student_NK: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy per row, `[N]`, or per position, `[N, P]`."""
    if labels.is_floating_point():  # torch's would multiply a weight of 0 by a logarithm of -inf
        weights_NK = (1 - label_smoothing) * labels + label_smoothing / labels.shape[1]
        return -expected(weights_NK, student_NK.log_softmax(dim=1))
    return cross_entropy(
        student_NK, labels, ignore_index=_IGNORE_INDEX, label_smoothing=label_smoothing, reduction="none"
    )
