"""Losses that compare two models' vectors: by value, by direction or by correlation."""

from torch import Tensor
from torch.linalg import vector_norm

from kd_pipeline.losses._inputs import (
    check_temperature,
    mask_rows,
    masked_mean,
    no_autocast,
    prepare_logits,
)

__all__ = ["cosine", "dist", "logit_mse", "normalize"]


def logit_mse(
    student_logits_NK: Tensor, teacher_logits_NK: Tensor, *, mask: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Mean squared error of the logits (Ba & Caruana, arXiv 1312.6184): 1/K · Σ_k (z_k - t_k)², batch mean.

    It has no temperature. There is no finite distance to a logit of -inf: with a teacher that excludes classes in this
    way the loss is infinite, or NaN where both models do so; compare the probabilities with `soft_target` instead.

    Args:
        student_logits_NK: `[N, K]` or maps `[N, K, h, w]` floating, the z of the formula.
        teacher_logits_NK: the same, the t of the formula.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    with no_autocast(student_logits_NK):
        student_NK, teacher_NK, valid_N = prepare_logits(
            student_logits_NK, teacher_logits_NK, valid, min_columns=1, mask=mask
        )
        return masked_mean((student_NK - teacher_NK).square().mean(dim=1), valid_N)


def cosine(
    student_ND: Tensor, teacher_ND: Tensor, *, mask: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Cosine distance: 1 - s · t / (‖s‖ ‖t‖), batch mean; from 0 (same direction) to 2 (opposite).

    No paper and no temperature. A row of zeros has no direction: its cosine is 0, and the norm of its gradient is at
    most 1 / N. A row with a logit of -inf has none either, and makes the loss NaN.

    Args:
        student_ND: `[N, D]` floating, embeddings or logits, or maps `[N, D, h, w]`.
        teacher_ND: the same.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    with no_autocast(student_ND):
        student_ND, teacher_ND, valid_N = prepare_logits(student_ND, teacher_ND, valid, min_columns=1, mask=mask)
        return masked_mean(1 - (normalize(student_ND) * normalize(teacher_ND)).sum(dim=1), valid_N)


def dist(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """DIST (Huang et al., arXiv 2205.10536): T² · (inter_weight · inter + intra_weight · intra).

    Both terms are one minus Pearson's correlation of the two models' softmax(logits / T). Inter compares rows (the
    classes of one sample), batch mean; intra compares columns (one class over the batch), mean over the K classes. A
    class that a model excludes with a logit of -inf has the probability 0.

    The defaults are those of the authors' code. Their recipes weigh the sum by 2 beside a cross-entropy of weight 1
    (`distill_weight: 2.0`), on ImageNet with T = 1 and on CIFAR-100 with T = 4.

    Of maps, each position is a row, as in the authors' code for segmentation.

    Intra sees the samples of this process only, and is 0 with fewer than two valid rows. As in the authors' code, the
    correlation with a constant row or column is 0, so it costs 1 even if both models keep it constant. The gradient is
    finite there, but steep: a student with a zero-initialized head gives all classes the same probability.

    Args:
        student_logits_NK: `[N, K]` or maps `[N, K, h, w]` floating, K at least 2.
        teacher_logits_NK: the same.
        temperature: T, above 0.
        inter_weight: beta of the paper.
        intra_weight: gamma of the paper.
        mask: `[N, h, w]` bool, the positions of maps that count; defaults to all.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    check_temperature(temperature)
    with no_autocast(student_logits_NK):
        student_NK, teacher_NK, valid_N = prepare_logits(student_logits_NK, teacher_logits_NK, valid, mask=mask)
        student_NK, teacher_NK = _as_rows(student_NK), _as_rows(teacher_NK)
        valid_N = valid_N.flatten()
        student_NK = (student_NK / temperature).softmax(dim=1)
        teacher_NK = (teacher_NK / temperature).softmax(dim=1)
        inter_N = 1 - _correlation(_center_rows(student_NK), _center_rows(teacher_NK), dim=1)
        intra_K = 1 - _correlation(_center_columns(student_NK, valid_N), _center_columns(teacher_NK, valid_N), dim=0)
        intra = intra_K.mean().where(valid_N.sum() >= 2, 0.0)
        return temperature**2 * (inter_weight * masked_mean(inter_N, valid_N) + intra_weight * intra)


def normalize(rows_ND: Tensor) -> Tensor:
    """Each vector along the second dimension with an L2 norm of 1; zeros stay zeros."""
    norm_N1: Tensor = vector_norm(rows_ND, dim=1, keepdim=True)
    return rows_ND / norm_N1.where(norm_N1 > 0, 1.0)


def _as_rows(logits: Tensor) -> Tensor:
    """`[N, K]` as it is, and the positions of `[N, K, P]` as rows `[N · P, K]`."""
    return logits if logits.ndim == 2 else logits.transpose(1, 2).flatten(0, 1)


def _center_rows(probability_NK: Tensor) -> Tensor:
    return probability_NK - probability_NK.mean(dim=1, keepdim=True)


def _center_columns(probability_NK: Tensor, valid_N: Tensor) -> Tensor:
    mean_K = mask_rows(probability_NK, valid_N).sum(dim=0) / valid_N.sum().clamp(min=1)
    return mask_rows(probability_NK - mean_K, valid_N)


def _correlation(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation along `dim` of tensors that are centered along it, with the authors' epsilon of 1e-8."""
    norms: Tensor = vector_norm(student, dim=dim) * vector_norm(teacher, dim=dim)
    return (student * teacher).sum(dim=dim) / (norms + 1e-8)
