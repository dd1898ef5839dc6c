"""Losses that ask for the teacher's vector: the same values, the same direction, or the same correlations."""

from torch import Tensor
from torch.linalg import vector_norm

from kd_pipeline.losses._rows import batch_mean, blank, check_temperature, full_precision, student_rows, teacher_rows

__all__ = ["cosine", "dist", "logit_mse"]


def logit_mse(student_logits_NK: Tensor, teacher_logits_NK: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Squared distance of the logits themselves: mean over the K classes, then batch mean.

    Args:
        student_logits_NK: `[N, K]` floating.
        teacher_logits_NK: `[N, K]` floating.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape or a dtype does not fit.
    """
    with full_precision(student_logits_NK):
        student_NK, valid_N = student_rows(student_logits_NK, valid, min_columns=1)
        teacher_NK = teacher_rows(teacher_logits_NK, student_NK, valid_N)
        return batch_mean((student_NK - teacher_NK).square().mean(dim=1), valid_N)


def cosine(student_ND: Tensor, teacher_ND: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """One minus the cosine of the angle between the two rows, batch mean: from 0 (same direction) to 2 (opposite).

    A row of zeros has no direction: its cosine is 0, and its gradient has at most the length 1 / N.

    Args:
        student_ND: `[N, D]` floating: embeddings, or logits.
        teacher_ND: `[N, D]` floating.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape or a dtype does not fit.
    """
    with full_precision(student_ND):
        student_ND, valid_N = student_rows(student_ND, valid, min_columns=1)
        teacher_ND = teacher_rows(teacher_ND, student_ND, valid_N)
        return batch_mean(1 - (_unit(student_ND) * _unit(teacher_ND)).sum(dim=1), valid_N)


def dist(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """DIST (Huang et al., arXiv 2205.10536): T² · (inter_weight · inter + intra_weight · intra).

    With the softmax of the logits over T as class probabilities, inter is one minus Pearson's correlation between the
    two models' rows (the classes of one sample), batch mean; intra is one minus the correlation between their columns
    (one class over the samples of the batch), mean over the K classes.

    Intra looks at the samples of this process only, and is 0 when fewer than two rows count. As in the authors' code a
    row or column that is constant in either model correlates with nothing, so one that both models keep constant costs
    1 although they agree; the gradient is finite there, but steep for a student that gives all classes the same
    probability, such as one with a zero-initialized head.

    Args:
        student_logits_NK: `[N, K]` floating, K at least 2.
        teacher_logits_NK: `[N, K]` floating.
        temperature: T, above 0. The default is the authors'.
        inter_weight: the paper's beta.
        intra_weight: the paper's gamma.
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
        student_NK = (student_NK / temperature).softmax(dim=1)
        teacher_NK = (teacher_NK / temperature).softmax(dim=1)
        inter_N = 1 - _correlation(_center_rows(student_NK), _center_rows(teacher_NK), dim=1)
        intra_K = 1 - _correlation(_center_columns(student_NK, valid_N), _center_columns(teacher_NK, valid_N), dim=0)
        intra = intra_K.mean().where(valid_N.sum() >= 2, 0.0)
        return temperature**2 * (inter_weight * batch_mean(inter_N, valid_N) + intra_weight * intra)


def _unit(rows_ND: Tensor) -> Tensor:
    norm_N1: Tensor = vector_norm(rows_ND, dim=1, keepdim=True)
    return rows_ND / norm_N1.where(norm_N1 > 0, 1.0)


def _center_rows(probability_NK: Tensor) -> Tensor:
    return probability_NK - probability_NK.mean(dim=1, keepdim=True)


def _center_columns(probability_NK: Tensor, valid_N: Tensor) -> Tensor:
    mean_K = blank(probability_NK, valid_N).sum(dim=0) / valid_N.sum().clamp(min=1)
    return blank(probability_NK - mean_K, valid_N)


def _correlation(student: Tensor, teacher: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation along `dim` of tensors that are centered along it, with the authors' 1e-8."""
    norms: Tensor = vector_norm(student, dim=dim) * vector_norm(teacher, dim=dim)
    return (student * teacher).sum(dim=dim) / (norms + 1e-8)
