"""Losses that ask for what the teacher sees on the way: feature maps, tokens and embeddings of two networks."""

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._rows import full_precision, student_rows
from kd_pipeline.losses.similarity import cosine, logit_mse
from kd_pipeline.losses.soft import soft_target

__all__ = ["attention_transfer", "channel_wise", "feature_cosine", "feature_mse"]

_KINDS = {2: "[N, D] embeddings", 3: "[N, L, D] tokens", 4: "[N, C, H, W] maps"}


def feature_mse(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Squared distance (FitNets, Romero et al., arXiv 1412.6550): mean over a sample's numbers, then batch mean.

    Feature maps whose sizes differ by a whole factor meet at the smaller size: the larger one is average-pooled.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape or a dtype does not fit.
    """
    with full_precision(student):
        student, teacher, valid_N = _aligned(student, teacher, valid, ndims=(2, 3, 4))
        return logit_mse(student.flatten(1), teacher.flatten(1), valid=valid_N)


def feature_cosine(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """One minus the cosine of the angle between the feature vectors: mean over a sample's places, then batch mean.

    An embedding has one place, tokens have L and a map has H · W. Maps of different sizes are treated as in
    `feature_mse`, and vectors of zeros as in `cosine`.

    Args:
        student: `[N, D]` embeddings, `[N, L, D]` tokens or `[N, C, H, W]` maps, floating.
        teacher: the same, with as many features or channels; only H and W may differ.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape or a dtype does not fit.
    """
    with full_precision(student):
        student, teacher, valid_N = _aligned(student, teacher, valid, ndims=(2, 3, 4))
        student, teacher = _places_last(student), _places_last(teacher)
        places = student.shape[1:-1].numel()
        # A row of `cosine` for each place; all samples have equally many, so the mean of means is the mean.
        return cosine(
            student.flatten(0, -2), teacher.flatten(0, -2), valid=valid_N[:, None].expand(-1, places).flatten()
        )


def attention_transfer(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928): mean over H · W of (q_s - q_t)², batch mean.

    q is a sample's attention map, the mean over the channels of the squared features, divided by its L2 norm over
    H · W; so the number of channels may differ, and no projector is needed. This is the authors' code, in which the
    weight is about 500 to 1000; the paper's formula has the norm of the difference instead. A map of zeros has an
    attention of zeros. Sizes that differ are treated as in `feature_mse`, before the squares are taken.

    Args:
        student: `[N, C, H, W]` floating, H · W at least 2 where they meet.
        teacher: `[N, C', H', W']` floating.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape or a dtype does not fit.
    """
    with full_precision(student):
        student, teacher, valid_N = _aligned(student, teacher, valid, ndims=(4,), same_channels=False)
        _check_places(student)
        return logit_mse(_attention(student), _attention(teacher), valid=valid_N)


def channel_wise(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    """Channel-wise distillation (Shu et al., arXiv 2011.13256): T² / C · Σ_c Σ_i p_ci · (log p_ci - log q_ci).

    p_c and q_c are the softmax over the H · W positions of the teacher's and the student's channel c over T: where in
    the image this channel looks. Batch mean. For the maps of dense outputs, where a channel is a class, or of features.
    Both sides need the same size, since pooling would flatten the very distribution that is compared.

    Args:
        student: `[N, C, H, W]` floating, H · W at least 2.
        teacher: `[N, C, H, W]` floating.
        temperature: T, above 0.
        valid: `[N]` bool, the rows that count; None means all.

    Returns:
        A scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: a shape, a dtype or the temperature does not fit.
    """
    with full_precision(student):
        _check(student, teacher, ndims=(4,))
        if student.shape != teacher.shape:
            raise ConfigError(f"both maps need the same size here, {_both(student, teacher)}; resize one of them first")
        _check_places(student)
        student, teacher, valid_N = _in_full(student, teacher, valid)
        channels = student.shape[1]
        return soft_target(
            student.flatten(2).flatten(0, 1),
            teacher.flatten(2).flatten(0, 1),
            temperature=temperature,
            valid=valid_N[:, None].expand(-1, channels).flatten(),
        )


def _aligned(
    student: Tensor, teacher: Tensor, valid: Tensor | None, *, ndims: tuple[int, ...], same_channels: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Both checked, in full precision and at one size, and which rows count."""
    _check(student, teacher, ndims=ndims, same_channels=same_channels)
    student, teacher, valid_N = _in_full(student, teacher, valid)
    return *_at_one_size(student, teacher), valid_N


def _in_full(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both in the student's full precision, the student without what stands in rows that do not count.

    The losses that end the computation here see to the rest: the teacher's rows, and that it is a constant.
    """
    rows, valid_N = student_rows(student.flatten(1), valid, min_columns=1)
    return rows.view(student.shape), teacher.to(rows.dtype), valid_N


def _at_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps pooled to the smaller height and width of the two; anything else as it is."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pooled = []
    for features in (student, teacher):
        # Whole factors only: adaptive pooling has no deterministic gradient on a GPU.
        if features.shape[2] % height or features.shape[3] % width:
            raise ConfigError(
                f"the sizes of the maps must differ by a whole factor, {_both(student, teacher)}; take other layers, "
                "or resize one of them first"
            )
        pooled.append(avg_pool2d(features, (features.shape[2] // height, features.shape[3] // width)))
    return pooled[0], pooled[1]


def _attention(features: Tensor) -> Tensor:
    """`[N, H · W]`, each row of length 1, or 0 where there is nothing to see."""
    energy = features.square().mean(dim=1).flatten(1)
    norm: Tensor = vector_norm(energy, dim=1, keepdim=True)
    return energy / norm.where(norm > 0, 1.0)


def _places_last(features: Tensor) -> Tensor:
    """The features of a place as the last dimension."""
    return features.movedim(1, -1) if features.ndim == 4 else features


def _check(student: Tensor, teacher: Tensor, *, ndims: tuple[int, ...], same_channels: bool = True) -> None:
    if student.ndim not in ndims or teacher.ndim != student.ndim or len(teacher) != len(student):
        kinds = " or ".join(_KINDS[ndim] for ndim in ndims)
        raise ConfigError(f"both models' features must be {kinds} of the same samples, {_both(student, teacher)}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ConfigError(f"both models' features must be floating, {_both(student, teacher)}")
    # Height and width, which come last in a map, may be brought together; nothing else can.
    last = 2 if student.ndim == 4 else student.ndim
    if same_channels and student.shape[1:last] != teacher.shape[1:last]:
        raise ConfigError(
            f"both models' features must have the same channels, {_both(student, teacher)}; put a projector on the "
            "student, or take other layers"
        )


def _check_places(features: Tensor) -> None:
    if features.shape[2:].numel() < 2:
        raise ConfigError(
            f"this loss compares places of a map and needs H * W of at least 2, got {list(features.shape)}; take an "
            "earlier layer"
        )


def _both(student: Tensor, teacher: Tensor) -> str:
    found = (f"{list(side.shape)} {str(side.dtype).removeprefix('torch.')}" for side in (student, teacher))
    return "the student's are {}, the teacher's {}".format(*found)
