"""Losses that compare softened class distributions: Hinton's soft targets and decoupled KD."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._rows import (
    batch_mean,
    check_temperature,
    full_precision,
    label_rows,
    student_rows,
    teacher_rows,
)

__all__ = ["dkd", "soft_target"]


def soft_target(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    *,
    temperature: float = 4.0,
    form: Literal["kl", "cross_entropy"] = "kl",
    standardize: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Soft targets (Hinton et al., arXiv 1503.02531): T² · Σ_k p_k · (log p_k - log q_k), batch mean.

    p and q are the softmax of the teacher's and the student's logits over T.

    Args:
        student_logits_NK: `[N, K]` floating, K at least 2.
        teacher_logits_NK: `[N, K]` floating.
        temperature: T, above 0. The default is timm's.
        form: `"kl"` is 0 when the two agree; `"cross_entropy"` is T² · -Σ_k p_k · log q_k, which is larger by T² times
            the teacher's entropy and has the same gradient.
        standardize: subtract each row's mean from the logits and divide by their standard deviation first, on both
            sides (LSKD, Sun et al., arXiv 2403.01427; there with T = 2), so that only the shape of the row counts.
            The gradient is finite but steep for a student that gives all classes the same logit, such as one with a
            zero-initialized head.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape, a dtype, the temperature or the form does not fit.
    """
    check_temperature(temperature)
    with full_precision(student_logits_NK):
        student_NK, valid_N = student_rows(student_logits_NK, valid, min_columns=2)
        teacher_NK = teacher_rows(teacher_logits_NK, student_NK, valid_N)
        student_NK = _soften(student_NK, temperature, standardize)
        teacher_NK = _soften(teacher_NK, temperature, standardize)
        match form:
            case "kl":
                loss_N = _kl_divergence(student_NK, teacher_NK)
            case "cross_entropy":
                loss_N = -(teacher_NK.softmax(dim=1) * student_NK.log_softmax(dim=1)).sum(dim=1)
            case _:
                raise ConfigError(f"form must be 'kl' or 'cross_entropy', got {form!r}")
        return temperature**2 * batch_mean(loss_N, valid_N)


def dkd(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Decoupled KD (Zhao et al., arXiv 2203.08679): T² · (alpha · TCKD + beta · NCKD), batch mean.

    TCKD is the divergence between the two-way distributions (labeled class, all others together); NCKD the divergence
    between the distributions over the other classes alone. Soft targets weigh NCKD by the teacher's doubt in the
    labeled class; here beta does. With two classes only one other class is left, and NCKD is 0.

    Args:
        student_logits_NK: `[N, K]` floating, K at least 2.
        teacher_logits_NK: `[N, K]` floating.
        labels: `[N]` int64 class indices, or `[N, K]` floating weights, where the largest picks the class.
        alpha: weight of TCKD.
        beta: weight of NCKD; the authors' code has 8 with T = 4 for CIFAR-100 and 0.5 with T = 1 for ImageNet.
        temperature: T, above 0.
        standardize: as in `soft_target`.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape, a dtype or the temperature does not fit.
    """
    check_temperature(temperature)
    with full_precision(student_logits_NK):
        student_NK, valid_N = student_rows(student_logits_NK, valid, min_columns=2)
        teacher_NK = teacher_rows(teacher_logits_NK, student_NK, valid_N)
        labels = label_rows(labels, student_NK, valid_N)
        label_N = labels if labels.ndim == 1 else labels.argmax(dim=1)
        student_two_way, student_others = _decouple(_soften(student_NK, temperature, standardize), label_N)
        teacher_two_way, teacher_others = _decouple(_soften(teacher_NK, temperature, standardize), label_N)
        target_N = _kl_divergence(student_two_way, teacher_two_way)
        others_N = _kl_divergence(student_others, teacher_others)
        return temperature**2 * batch_mean(alpha * target_N + beta * others_N, valid_N)


def _soften(logits_NK: Tensor, temperature: float, standardize: bool) -> Tensor:
    if standardize:
        # The authors' code: unbiased deviation, and 1e-7 for rows in which all logits are equal.
        centered_NK = logits_NK - logits_NK.mean(dim=1, keepdim=True)
        deviation_N1 = vector_norm(centered_NK, dim=1, keepdim=True) / math.sqrt(logits_NK.shape[1] - 1)
        logits_NK = centered_NK / (deviation_N1 + 1e-7)
    return logits_NK / temperature


def _kl_divergence(student_logits_NK: Tensor, teacher_logits_NK: Tensor) -> Tensor:
    """KL(teacher || student) of each row, `[N]`."""
    log_student_NK = student_logits_NK.log_softmax(dim=1)
    log_teacher_NK = teacher_logits_NK.log_softmax(dim=1)
    return (log_teacher_NK.exp() * (log_teacher_NK - log_student_NK)).sum(dim=1)


def _decouple(logits_NK: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of (the labeled class, all others together), `[N, 2]`, and of the others alone, `[N, K - 1]`.

    The labeled class is left out by index: pushing its logit down by a constant, as public code does, overflows
    in half precision and fails for logits larger than the constant.
    """
    other_K = torch.arange(logits_NK.shape[1] - 1, device=logits_NK.device)
    label_N1 = label_N[:, None]
    others = logits_NK.gather(1, other_K + (other_K >= label_N1))
    return torch.cat([logits_NK.gather(1, label_N1), others.logsumexp(dim=1, keepdim=True)], dim=1), others
