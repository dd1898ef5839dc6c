"""Losses that compare intermediate features of two models: feature maps, tokens or embeddings."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d, smooth_l1_loss

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._inputs import describe, mask_rows, masked_mean, no_autocast, prepare_student
from kd_pipeline.losses.similarity import normalize
from kd_pipeline.losses.soft import soft_target

__all__ = [
    "am_radio",
    "attention_transfer",
    "channel_wise",
    "feature_cosine",
    "feature_mse",
    "feature_smooth_l1",
    "sample_cosine",
]

_LAYOUTS = {2: "[N, D] embeddings", 3: "[N, L, D] tokens", 4: "[N, C, H, W] maps"}


def feature_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of features (FitNets, Romero et al., arXiv 1412.6550): mean over a sample, then batch mean.

    1/D · Σ_d (s_d - t_d)² over the D numbers of a sample. If the sizes of feature maps differ by a whole factor, the
    larger map is average-pooled to the smaller size. No temperature; the weight in mdistiller and RepDistiller is 100.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        mask: `[N, L]` or `[N, H, W]` bool, the positions that count, after pooling; defaults to all. A sample without
            any counts as invalid.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        _check_layouts(student, teacher)
        student, teacher, mask_NP, valid_N = _prepare(student, teacher, mask, valid)
        return _mean((student - teacher).square().mean(dim=1), mask_NP, valid_N)


def feature_smooth_l1(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Smooth L1 distance of features (Girshick, arXiv 1504.08083): mean over a sample, then batch mean.

    With d = s - t, a number adds d² / (2 · beta) if |d| < beta, else |d| - beta / 2, as in torch, whose default is 1.
    No temperature. Maps of different sizes are pooled as in `feature_mse`.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        beta: where the square becomes a line, above 0.
        mask: as in `feature_mse`.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    _check_beta(beta)
    with no_autocast(student):
        _check_layouts(student, teacher)
        student, teacher, mask_NP, valid_N = _prepare(student, teacher, mask, valid)
        return _mean(_smooth_l1(student, teacher, beta), mask_NP, valid_N)


def feature_cosine(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Cosine distance of feature vectors: mean over the positions i of 1 - s_i · t_i / (‖s_i‖ ‖t_i‖), then batch mean.

    No paper and no temperature. An embedding has one position, tokens have L and a map has H · W. Maps of different
    sizes are pooled as in `feature_mse`, and vectors of zeros are treated as in `cosine`.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        mask: as in `feature_mse`.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        _check_layouts(student, teacher)
        student, teacher, mask_NP, valid_N = _prepare(student, teacher, mask, valid)
        return _mean(1 - _cosine(student, teacher), mask_NP, valid_N)


def am_radio(
    student: Tensor,
    teacher: Tensor,
    *,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
    beta: float = 1.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """AM-RADIO (Ranzinger et al., arXiv 2312.06709): cosine_weight · cosine distance + smooth_l1_weight · smooth L1.

    Both are means over a sample's positions, as in `feature_cosine` and `feature_smooth_l1`, then the batch mean. The
    defaults are the authors', who have this loss on maps and tokens, with a weight of 1, and the cosine distance alone
    on the vector of the image; Theia (Shang et al., arXiv 2407.20179) has the same weights. No temperature.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        cosine_weight: alpha of the paper.
        smooth_l1_weight: beta of the paper.
        beta: of the smooth L1 distance, above 0; the paper does not name it, and torch's default is 1.
        mask: as in `feature_mse`.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    _check_beta(beta)
    with no_autocast(student):
        _check_layouts(student, teacher)
        student, teacher, mask_NP, valid_N = _prepare(student, teacher, mask, valid)
        loss_NP = cosine_weight * (1 - _cosine(student, teacher))
        return _mean(loss_NP + smooth_l1_weight * _smooth_l1(student, teacher, beta), mask_NP, valid_N)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928): mean over H · W of (q_s - q_t)², batch mean.

    q is a sample's attention map: the mean over channels of the squared features, divided by its L2 norm over H · W.
    The number of channels may differ, so no projector is needed. This is the authors' code, without a temperature and
    with a weight of 1000 (`--beta 1e+3`); the paper's formula has the norm of the difference. The attention of a map of
    zeros is zero. Maps of different sizes are pooled as in `feature_mse`, before squaring.

    Args:
        student: `[N, C, H, W]` floating, H · W at least 2 after pooling.
        teacher: `[N, C', H', W']` floating.
        mask: as in `feature_mse`; the others have no part in the norm either.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        _check_layouts(student, teacher, ndims=(4,), same_channels=False)
        student, teacher, mask_NP, valid_N = _prepare(student, teacher, mask, valid, min_positions=2)
        return _mean((_attention(student) - _attention(teacher)).square(), mask_NP, valid_N)


def channel_wise(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    over: Literal["positions", "channels"] = "positions",
    mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Channel-wise distillation (Shu et al., arXiv 2011.13256): T² / C · Σ_c Σ_i p_ci · (log p_ci - log q_ci).

    p_c and q_c are the softmax over the H · W positions of channel c / T of the teacher and the student: where in the
    image a channel is active. Batch mean. It suits dense outputs, where a channel is a class, and features. Both maps
    must have the same size: pooling would flatten the distributions that are compared.

    The spatial mode, `over="channels"`, compares what each position shows: the softmax is over the C channels of a
    position, and the loss is T² / (H · W) · Σ_i Σ_c p_ci · (log p_ci - log q_ci). The paper compares the two modes,
    and prefers the first; of logits the second is `soft_target`. Its batch mean is over all positions that count.

    Args:
        student: `[N, C, H, W]` floating; the softmax is over at least 2 positions or channels.
        teacher: `[N, C, H, W]` floating.
        temperature: T, above 0; defaults to that of the authors, who give the term a weight of 3.
        over: what the softmax is over: the positions of a channel, or the channels of a position.
        mask: as in `feature_mse`; the others have no part in a softmax over positions either.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    if over not in ("positions", "channels"):
        raise ConfigError(f"over must be 'positions' or 'channels', got {over!r}")
    with no_autocast(student):
        _check_layouts(student, teacher, ndims=(4,))
        if student.shape != teacher.shape:
            raise ConfigError(
                f"both maps must have the same size here, {_describe_both(student, teacher)}; resize one of them"
            )
        if over == "channels":
            if mask is not None:
                _check_mask(mask, student)
            return soft_target(student, teacher, temperature=temperature, mask=mask, valid=valid)
        student, teacher, mask_NP, valid_N = _prepare(student, teacher, mask, valid, min_positions=2)
        if mask_NP is not None:
            valid_N = valid_N & mask_NP.any(dim=1)
            student, teacher = (side.masked_fill(~mask_NP[:, None], -math.inf) for side in (student, teacher))
        valid_rows = valid_N[:, None].expand(-1, student.shape[1]).flatten()
        return soft_target(student.flatten(0, 1), teacher.flatten(0, 1), temperature=temperature, valid=valid_rows)


def sample_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of both models' vectors, mean over the positions of a sample, `[N]`; for inputs as in `feature_cosine`.

    It measures, and is no loss: rows that are not valid hold anything.
    """
    with no_autocast(student):
        _check_layouts(student, teacher)
        student, teacher, _, _ = _prepare(student, teacher, None, None)
        return _cosine(student, teacher).mean(dim=1)


def _prepare(
    student: Tensor, teacher: Tensor, mask: Tensor | None, valid: Tensor | None, *, min_positions: int = 1
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Student and teacher as `[N, D, P]` for P positions, upcast, pooled to the same size and masked.

    Returns:
        Both, `mask` as `[N, P]`, and which samples count.
    """
    rows, valid_N = prepare_student(student.flatten(1), valid, min_columns=1)
    student, teacher = rows.view(student.shape), mask_rows(teacher.detach().to(rows.dtype), valid_N)
    student, teacher = _pool_to_same_size(student, teacher)
    if student.ndim == 4:
        _check_num_positions(student, min_positions)
    mask_NP = None if mask is None else _check_mask(mask, student)
    student, teacher = _positions_last(student), _positions_last(teacher)
    if mask_NP is not None:
        student, teacher = (side.masked_fill(~mask_NP[:, None], 0) for side in (student, teacher))
    return student, teacher, mask_NP, valid_N


def _mean(loss_NP: Tensor, mask_NP: Tensor | None, valid_N: Tensor) -> Tensor:
    """Mean over the positions of each sample, then over the samples."""
    if mask_NP is None:
        return masked_mean(loss_NP.mean(dim=1), valid_N)
    loss_N = loss_NP.masked_fill(~mask_NP, 0).sum(dim=1) / mask_NP.sum(dim=1).clamp(min=1)
    return masked_mean(loss_N, valid_N & mask_NP.any(dim=1))


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Per position, `[N, P]`."""
    return (normalize(student) * normalize(teacher)).sum(dim=1)


def _smooth_l1(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Mean over the features of each position, `[N, P]`."""
    return smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(dim=1)


def _attention(features: Tensor) -> Tensor:
    """`[N, P]`, each row with an L2 norm of 1, or 0 for a map of zeros."""
    energy = features.square().mean(dim=1)
    norm: Tensor = vector_norm(energy, dim=1, keepdim=True)
    return energy / norm.where(norm > 0, 1.0)


def _pool_to_same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps pooled to the smaller height and width of the two; anything else unchanged."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pooled = []
    for features in (student, teacher):
        # Whole factors only: the gradient of adaptive pooling is not deterministic on a GPU.
        if features.shape[2] % height or features.shape[3] % width:
            raise ConfigError(
                f"the sizes of the maps must differ by a whole factor, {_describe_both(student, teacher)}; choose "
                "other layers, or resize one of them"
            )
        pooled.append(avg_pool2d(features, (features.shape[2] // height, features.shape[3] // width)))
    return pooled[0], pooled[1]


def _positions_last(features: Tensor) -> Tensor:
    """`[N, D, P]`; an embedding has one position."""
    match features.ndim:
        case 2:
            return features[..., None]
        case 3:
            return features.transpose(1, 2)
        case _:
            return features.flatten(2)


def _check_layouts(
    student: Tensor, teacher: Tensor, *, ndims: tuple[int, ...] = (2, 3, 4), same_channels: bool = True
) -> None:
    if student.ndim not in ndims or teacher.ndim != student.ndim or len(teacher) != len(student):
        layouts = " or ".join(_LAYOUTS[ndim] for ndim in ndims)
        raise ConfigError(
            f"both models' features must be {layouts} of the same samples, {_describe_both(student, teacher)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ConfigError(f"both models' features must be floating, {_describe_both(student, teacher)}")
    # Height and width, the last two dimensions of a map, can be pooled; nothing else may differ.
    last = 2 if student.ndim == 4 else student.ndim
    if same_channels and student.shape[1:last] != teacher.shape[1:last]:
        raise ConfigError(
            f"both models' features must have the same channels, {_describe_both(student, teacher)}; add a projector "
            "or choose other layers"
        )


def _check_mask(mask: Tensor, features: Tensor) -> Tensor:
    """`[N, P]`, the mask of the positions of `features`."""
    shape = features.shape[:-1] if features.ndim == 3 else features.shape[:1] + features.shape[2:]
    if features.ndim == 2 or mask.shape != shape or mask.dtype != torch.bool:
        raise ConfigError(
            f"mask must be [N, L] bool for tokens [N, L, D] or [N, H, W] bool for maps [N, C, H, W], got "
            f"{describe(mask)} for {describe(features)}"
        )
    return mask.flatten(1)


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta must be a finite number above 0, got {beta}; 1 is the usual one")


def _check_num_positions(features: Tensor, minimum: int) -> None:
    if features.shape[2:].numel() < minimum:
        raise ConfigError(
            f"this loss compares positions of a map and needs H * W of at least {minimum}, got "
            f"{list(features.shape)}; choose an earlier layer"
        )


def _describe_both(student: Tensor, teacher: Tensor) -> str:
    return f"the student's are {describe(student)}, the teacher's {describe(teacher)}"
