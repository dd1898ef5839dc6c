"""Losses that compare softened class distributions: Hinton's soft targets and decoupled knowledge distillation."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._inputs import (
    check_temperature,
    expected,
    mask_rows,
    masked_mean,
    no_autocast,
    prepare_labels,
    prepare_logits,
)

__all__ = ["dkd", "soft_target"]


def soft_target(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    *,
    temperature: float = 4.0,
    form: Literal["kl", "cross_entropy"] = "kl",
    standardize: bool = False,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Soft targets (Hinton et al., arXiv 1503.02531): T² · Σ_k p_k · (log p_k - log q_k), batch mean.

    p is softmax(teacher logits / T) and q is softmax(student logits / T). A class that the teacher excludes with a
    logit of -inf has p_k = 0 and adds 0. Of maps it is pixel-wise distillation, the mean over the pixels (Liu et al.,
    arXiv 1903.04197), which the authors, with a weight of 10, and CIRKD (arXiv 2204.06986), with 1, use with T = 1.

    Args:
        student_logits_NK: `[N, K]` or maps `[N, K, h, w]` floating, K at least 2.
        teacher_logits_NK: the same.
        temperature: T, above 0. The paper has no single value; 4 is that of mdistiller and RepDistiller on CIFAR-100
            and of timm's `train.py` (`--kd-temperature`). On ImageNet, mdistiller, torchdistill and FunMatch have 1,
            which is also the default of timm's class `LogitDistillationTask`.
        form: `"kl"` is 0 if the two agree. `"cross_entropy"` is T² · -Σ_k p_k · log q_k, which adds T² times the
            teacher's entropy and has the same gradient.
        standardize: first standardize each row of logits, of both models, to mean 0 and standard deviation 1 over the
            classes that are not excluded (LSKD, Sun et al., arXiv 2403.01427; the authors have T = 2 and a weight of 9
            beside 0.1 on CIFAR-100), to compare only the shape of a row. The gradient is finite but steep for a
            student with equal logits for all classes, such as one with a zero-initialized head.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    check_temperature(temperature)
    with no_autocast(student_logits_NK):
        student_NK, teacher_NK, valid_N = prepare_logits(student_logits_NK, teacher_logits_NK, valid, mask=mask)
        student_NK = _soften(student_NK, temperature, standardize)
        teacher_NK = _soften(teacher_NK, temperature, standardize)
        match form:
            case "kl":
                loss_N = _kl_divergence(student_NK, teacher_NK)
            case "cross_entropy":
                loss_N = -expected(teacher_NK.softmax(dim=1), student_NK.log_softmax(dim=1))
            case _:
                raise ConfigError(f"form must be 'kl' or 'cross_entropy', got {form!r}")
        return temperature**2 * masked_mean(loss_N, valid_N)


def dkd(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679): T² · (alpha · TCKD + beta · NCKD), batch mean.

    TCKD is the KL divergence of the binary distributions (target class, all others together); NCKD is the KL divergence
    of the distributions over the non-target classes. In soft targets the weight of NCKD is one minus the teacher's
    probability of the target class; here it is beta. With two classes NCKD is 0. A class that the teacher excludes
    with a logit of -inf adds 0; where it excludes all but the target class, NCKD is 0.

    The defaults are those of the authors' code for CIFAR-100, where the weight of the loss also rises from 0 to 1 in
    the first 20 epochs (`distill_weight: {start: 0, end: 1, epochs: 20}`). For ImageNet they have T = 1, beta = 0.5
    and no such warm-up.

    Args:
        student_logits_NK: `[N, K]` or maps `[N, K, h, w]` floating, K at least 2.
        teacher_logits_NK: the same.
        labels: `[N]` int64 class indices, or `[N, K]` floating weights, of which the largest is the target class;
            `[N, h, w]` int64 for maps.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, above 0.
        standardize: as in `soft_target`.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    check_temperature(temperature)
    with no_autocast(student_logits_NK):
        student_NK, teacher_NK, valid_N = prepare_logits(student_logits_NK, teacher_logits_NK, valid, mask=mask)
        labels = prepare_labels(labels, student_NK, valid_N)
        target_N = labels.argmax(dim=1) if labels.is_floating_point() else labels
        student_binary, student_others = _decouple(_soften(student_NK, temperature, standardize), target_N)
        teacher_binary, teacher_others = _decouple(_soften(teacher_NK, temperature, standardize), target_N)
        tckd_N = _kl_divergence(student_binary, teacher_binary)
        nckd_N = _non_target_divergence(student_others, teacher_others)
        return temperature**2 * masked_mean(alpha * tckd_N + beta * nckd_N, valid_N)


def _soften(logits_NK: Tensor, temperature: float, standardize: bool) -> Tensor:
    return (_standardize(logits_NK) if standardize else logits_NK) / temperature


def _standardize(logits_NK: Tensor) -> Tensor:
    """As in the authors' code: unbiased deviation, and an epsilon of 1e-7 for rows of equal logits.

    Logits of -inf, which have no mean, are left out and stay; NaN and inf make their row NaN.
    """
    is_possible_NK = logits_NK != -math.inf
    num_possible_N1 = is_possible_NK.sum(dim=1, keepdim=True, dtype=logits_NK.dtype)
    mean_N1 = logits_NK.where(is_possible_NK, 0.0).sum(dim=1, keepdim=True) / num_possible_N1
    centered_NK = (logits_NK - mean_N1).where(is_possible_NK, 0.0)
    deviation_N1: Tensor = vector_norm(centered_NK, dim=1, keepdim=True) / (num_possible_N1 - 1).clamp(min=1).sqrt()
    return (centered_NK / (deviation_N1 + 1e-7)).where(is_possible_NK, -math.inf)


def _kl_divergence(student_logits_NK: Tensor, teacher_logits_NK: Tensor) -> Tensor:
    """KL(teacher || student) per row, `[N]`."""
    log_student_NK = student_logits_NK.log_softmax(dim=1)
    log_teacher_NK = teacher_logits_NK.log_softmax(dim=1)
    return expected(log_teacher_NK.exp(), log_teacher_NK - log_student_NK)


def _non_target_divergence(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """`_kl_divergence`; 0 where the teacher excludes all classes, for it has no distribution over them."""
    is_possible_N = (teacher_NK != -math.inf).any(dim=1)
    # Zeros in place of such rows: a NaN that is masked afterward would come back in the gradient.
    student_NK, teacher_NK = mask_rows(student_NK, is_possible_N), mask_rows(teacher_NK, is_possible_N)
    return mask_rows(_kl_divergence(student_NK, teacher_NK), is_possible_N)


def _decouple(logits_NK: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of (the target class, all others together), `[N, 2]`, and of the other classes, `[N, K - 1]`.

    The target class is removed by its index. Subtracting a constant from its logit, as public code does, overflows in
    half precision and fails for logits that are larger than the constant.
    """
    other_K = torch.arange(logits_NK.shape[1] - 1, device=logits_NK.device).view(-1, *[1] * (logits_NK.ndim - 2))
    target_N1 = target_N[:, None]
    others = logits_NK.gather(1, other_K + (other_K >= target_N1))
    # Zeros in place of rows of only -inf, for which the gradient of logsumexp is NaN.
    is_possible_N1 = (others != -math.inf).any(dim=1, keepdim=True)
    rest_N1 = others.where(is_possible_N1, 0.0).logsumexp(dim=1, keepdim=True).where(is_possible_N1, -math.inf)
    return torch.cat([logits_NK.gather(1, target_N1), rest_N1], dim=1), others
