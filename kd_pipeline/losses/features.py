"""Losses that compare intermediate features of two models: feature maps, tokens or embeddings."""

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._inputs import describe, no_autocast, prepare_student
from kd_pipeline.losses.similarity import cosine, logit_mse
from kd_pipeline.losses.soft import soft_target

__all__ = ["attention_transfer", "channel_wise", "feature_cosine", "feature_mse"]

_LAYOUTS = {2: "[N, D] embeddings", 3: "[N, L, D] tokens", 4: "[N, C, H, W] maps"}


def feature_mse(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of features (FitNets, Romero et al., arXiv 1412.6550): mean over a sample, then batch mean.

    1/D · Σ_d (s_d - t_d)² over the D numbers of a sample. If the sizes of feature maps differ by a whole factor, the
    larger map is average-pooled to the smaller size. No temperature; the weight in mdistiller and RepDistiller is 100.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        student, teacher, valid_N = _prepare(student, teacher, valid, ndims=(2, 3, 4))
        return logit_mse(student.flatten(1), teacher.flatten(1), valid=valid_N)


def feature_cosine(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Cosine distance of feature vectors: mean over the positions i of 1 - s_i · t_i / (‖s_i‖ ‖t_i‖), then batch mean.

    No paper and no temperature. An embedding has one position, tokens have L and a map has H · W. Maps of different
    sizes are pooled as in `feature_mse`, and vectors of zeros are treated as in `cosine`.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        student, teacher, valid_N = _prepare(student, teacher, valid, ndims=(2, 3, 4))
        student, teacher = _channels_last(student), _channels_last(teacher)
        # One row of `cosine` per position. All samples have equally many, so the mean of means is the mean.
        valid_rows = _repeat(valid_N, student.shape[1:-1].numel())
        return cosine(student.flatten(0, -2), teacher.flatten(0, -2), valid=valid_rows)


def attention_transfer(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928): mean over H · W of (q_s - q_t)², batch mean.

    q is a sample's attention map: the mean over channels of the squared features, divided by its L2 norm over H · W.
    The number of channels may differ, so no projector is needed. This is the authors' code, without a temperature and
    with a weight of 1000 (`--beta 1e+3`); the paper's formula has the norm of the difference. The attention of a map of
    zeros is zero. Maps of different sizes are pooled as in `feature_mse`, before squaring.

    Args:
        student: `[N, C, H, W]` floating, H · W at least 2 after pooling.
        teacher: `[N, C', H', W']` floating.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        student, teacher, valid_N = _prepare(student, teacher, valid, ndims=(4,), same_channels=False)
        _check_num_positions(student)
        return logit_mse(_attention(student), _attention(teacher), valid=valid_N)


def channel_wise(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    """Channel-wise distillation (Shu et al., arXiv 2011.13256): T² / C · Σ_c Σ_i p_ci · (log p_ci - log q_ci).

    p_c and q_c are the softmax over the H · W positions of channel c / T of the teacher and the student: where in the
    image a channel is active. Batch mean. It suits dense outputs, where a channel is a class, and features. Both maps
    must have the same size: pooling would flatten the distributions that are compared.

    Args:
        student: `[N, C, H, W]` floating, H · W at least 2.
        teacher: `[N, C, H, W]` floating.
        temperature: T, above 0; defaults to that of the authors, who give the term a weight of 3.
        valid: `[N]` bool, the samples that count; defaults to all.
    """
    with no_autocast(student):
        _check_layouts(student, teacher, ndims=(4,))
        if student.shape != teacher.shape:
            raise ConfigError(
                f"both maps must have the same size here, {_describe_both(student, teacher)}; resize one of them"
            )
        _check_num_positions(student)
        student, teacher, valid_N = _upcast(student, teacher, valid)
        valid_rows = _repeat(valid_N, student.shape[1])
        student, teacher = student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1)
        return soft_target(student, teacher, temperature=temperature, valid=valid_rows)


def _prepare(
    student: Tensor, teacher: Tensor, valid: Tensor | None, *, ndims: tuple[int, ...], same_channels: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher, checked, upcast and pooled to the same size, and which samples count."""
    _check_layouts(student, teacher, ndims=ndims, same_channels=same_channels)
    student, teacher, valid_N = _upcast(student, teacher, valid)
    return *_pool_to_same_size(student, teacher), valid_N


def _upcast(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both in the dtype of the computation, the student masked.

    The losses that finish the computation mask the teacher and detach it.
    """
    rows, valid_N = prepare_student(student.flatten(1), valid, min_columns=1)
    return rows.view(student.shape), teacher.to(rows.dtype), valid_N


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


def _attention(features: Tensor) -> Tensor:
    """`[N, H · W]`, each row with an L2 norm of 1, or 0 for a map of zeros."""
    energy = features.square().mean(dim=1).flatten(1)
    norm: Tensor = vector_norm(energy, dim=1, keepdim=True)
    return energy / norm.where(norm > 0, 1.0)


def _channels_last(features: Tensor) -> Tensor:
    return features.movedim(1, -1) if features.ndim == 4 else features


def _repeat(valid_N: Tensor, num_repeats: int) -> Tensor:
    """Each entry `num_repeats` times in a row."""
    return valid_N[:, None].expand(-1, num_repeats).flatten()


def _check_layouts(student: Tensor, teacher: Tensor, *, ndims: tuple[int, ...], same_channels: bool = True) -> None:
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


def _check_num_positions(features: Tensor) -> None:
    if features.shape[2:].numel() < 2:
        raise ConfigError(
            f"this loss compares positions of a map and needs H * W of at least 2, got {list(features.shape)}; choose "
            "an earlier layer"
        )


def _describe_both(student: Tensor, teacher: Tensor) -> str:
    return f"the student's are {describe(student)}, the teacher's {describe(teacher)}"
