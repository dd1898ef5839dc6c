"""The loss that compares relations: how similar a sample is to other samples, for the student and for the teacher."""

from typing import Literal

import torch
from torch import Tensor

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._inputs import (
    check_temperature,
    describe,
    expected,
    mask_rows,
    masked_mean,
    no_autocast,
    prepare_logits,
)
from kd_pipeline.losses.similarity import normalize

__all__ = ["relational"]


def relational(
    student_ND: Tensor,
    teacher_ND: Tensor,
    *,
    references_MD: Tensor | None = None,
    references_valid: Tensor | None = None,
    student_temperature: float = 0.2,
    teacher_temperature: float = 1e-4,
    form: Literal["cross_entropy", "kl"] = "cross_entropy",
    valid: Tensor | None = None,
) -> Tensor:
    """Relations to reference vectors (SEED, Fang et al., arXiv 2101.04731): -Σ_m p_m · log q_m, batch mean.

    p is the softmax over the references r_m of cos(t, r_m) / teacher_temperature, and q that of cos(s, r_m) /
    student_temperature, for the teacher's vector t and the student's vector s of a sample. The references are vectors
    of the teacher. Vectors of zeros are treated as in `cosine`. There are two temperatures, so no factor T².

    The authors' references are the sample's own teacher vector and a queue of 65,536 earlier ones, and their defaults
    are those of their code, `--temp 0.2` and `--distill-t 1e-4`: p is then almost 1 for the sample itself, which makes
    the loss InfoNCE with the teacher's vectors. From about 0.01 p has a share for similar samples too. The weight is 1.

    Args:
        student_ND: `[N, D]` floating.
        teacher_ND: `[N, D]` floating.
        references_MD: `[M, D]` floating, constants; defaults to the valid rows of `teacher_ND`.
        references_valid: `[M]` bool, the references that count; defaults to all. Without any, the loss is log M.
        student_temperature: above 0.
        teacher_temperature: above 0.
        form: `"kl"` subtracts the entropy of p, to be 0 if the two agree, and has the same gradient.
        valid: `[N]` bool, the rows that count; defaults to all.
    """
    check_temperature(student_temperature)
    check_temperature(teacher_temperature)
    with no_autocast(student_ND):
        student_ND, teacher_ND, valid_N = prepare_logits(student_ND, teacher_ND, valid, min_columns=1, maps=False)
        if references_MD is None:
            references_MD, references_valid = teacher_ND, valid_N
        references_MD, is_excluded_M = _prepare_references(references_MD, references_valid, student_ND)
        references_DM = normalize(references_MD).T
        student_NM = (normalize(student_ND) @ references_DM / student_temperature).masked_fill(
            is_excluded_M, -torch.inf
        )
        teacher_NM = (normalize(teacher_ND) @ references_DM / teacher_temperature).masked_fill(
            is_excluded_M, -torch.inf
        )
        log_student_NM, log_teacher_NM = student_NM.log_softmax(dim=1), teacher_NM.log_softmax(dim=1)
        match form:
            case "cross_entropy":
                loss_N = expected(log_teacher_NM.exp(), -log_student_NM)
            case "kl":
                loss_N = expected(log_teacher_NM.exp(), log_teacher_NM - log_student_NM)
            case _:
                raise ConfigError(f"form must be 'cross_entropy' or 'kl', got {form!r}")
        return masked_mean(loss_N, valid_N)


def _prepare_references(
    references_MD: Tensor, references_valid: Tensor | None, student_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """The references, detached, in the student's dtype and masked; and which of them to leave out."""
    num_references = len(references_MD)
    if references_MD.shape != (num_references, student_ND.shape[1]) or not references_MD.is_floating_point():
        raise ConfigError(
            f"the references must be a floating [M, {student_ND.shape[1]}] tensor to match the student's "
            f"{describe(student_ND)}, got {describe(references_MD)}; give vectors of the same teacher"
        )
    if references_valid is None:
        references_valid = torch.ones(num_references, dtype=torch.bool, device=references_MD.device)
    elif references_valid.shape != (num_references,) or references_valid.dtype != torch.bool:
        raise ConfigError(
            f"references_valid must be [{num_references}] bool, one per reference, got {describe(references_valid)}"
        )
    references_MD = mask_rows(references_MD.detach().to(student_ND.dtype), references_valid)
    # A softmax over nothing would be NaN, and so would the gradient.
    return references_MD, ~references_valid & references_valid.any()
