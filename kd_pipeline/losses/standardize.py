"""Standardize a teacher's features by statistics of the first batches of a run, to let teachers weigh the same."""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses._inputs import no_autocast
from kd_pipeline.losses.all_ranks import from_rank_zero, sum_over_ranks
from kd_pipeline.losses.hadamard import hadamard

__all__ = ["NUM_BATCHES", "Standardizer"]

NUM_BATCHES = 128
"""Batches whose statistics count."""


class Standardizer(nn.Module):
    """Subtracts the mean of each of D channels and scales the rest by their variances v: y = A (x - mean).

    - `global`: A = I / sqrt(mean of v), one scale for all.
    - `channels`: A = diag(1 / sqrt(v)), as in Theia (Shang et al., arXiv 2407.20179). A channel that never varies keeps
      its scale.
    - `phi_s`: A = H Uᵀ / sqrt(mean of λ) with the eigenvectors U and eigenvalues λ of the covariance and a normalized
      Hadamard matrix H: a rotation to channels of equal variance, and one scale (PHI-S, Ranzinger et al.,
      arXiv 2410.01680). Like `global`, it keeps angles and relative distances.

    In training mode the first 128 batches update count, mean and covariance, exactly and over all ranks and valid rows
    (Chan et al., "Updating formulae and a pairwise algorithm", 1979). What is applied is computed from them after 1, 2,
    4, ... 128 batches, so targets rest in between, and stay afterward. All of it is in buffers, for checkpoints.
    """

    mean: Tensor
    transform: Tensor
    num_batches: Tensor
    count: Tensor
    running_mean: Tensor
    running_scatter: Tensor

    def __init__(
        self, kind: Literal["global", "channels", "phi_s"], num_channels: int, *, device: torch.device | None = None
    ) -> None:
        """Start with mean 0 and scale 1.

        Raises:
            ConfigError: no Hadamard matrix of this size is known.
        """
        super().__init__()
        self.kind = kind
        if kind == "phi_s" and hadamard(num_channels) is None:
            raise ConfigError(
                f"standardize: phi_s needs a Hadamard matrix as wide as the teacher's {num_channels} features, and "
                "none is known here; choose standardize: global, which scales the same, or channels"
            )
        has_matrix = kind == "phi_s"
        transform = torch.eye(num_channels) if has_matrix else torch.ones(1 if kind == "global" else num_channels)
        scatter = torch.zeros(num_channels, *[num_channels] * has_matrix, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(num_channels).to(device))
        self.register_buffer("transform", transform.to(device))
        """A: its diagonal, the scale, or the matrix `[D, D]`."""
        # On the CPU even if the rest is not: reading it there does not wait for a GPU.
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("running_mean", torch.zeros(num_channels, dtype=torch.float64, device=device))
        self.register_buffer("running_scatter", scatter.to(device))
        """Sum of (x - mean)², or of (x - mean)(x - mean)ᵀ for `phi_s`."""

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers without changing their precision, and leave the counter where it is."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        device = self.mean.device
        for name, buffer in before.items():
            setattr(self, name, buffer if name == "num_batches" else buffer.to(device))
        return self

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """The features of a batch, standardized; in training mode its valid rows count first.

        Args:
            features: `[N, D]`, `[N, L, D]` or `[N, D, H, W]`, floating.
            valid: `[N]` bool; rows that are not valid may hold anything.
        """
        if self.training and int(self.num_batches) < NUM_BATCHES:
            self._update(features, valid)
        return self.standardize(features)

    def standardize(self, features: Tensor) -> Tensor:
        """The features, standardized by what is known, float32 or float64."""
        with no_autocast(features):
            dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
            channels_last = _channels_last(features).to(dtype) - self.mean.to(dtype)
            transform = self.transform.to(dtype)
            channels_last = channels_last @ transform.T if transform.ndim == 2 else channels_last * transform
            return channels_last.movedim(-1, 1) if features.ndim == 4 else channels_last

    def extra_repr(self) -> str:
        """For `repr`."""
        return f"{self.kind}, {len(self.mean)}"

    @torch.no_grad()
    def _update(self, features: Tensor, valid: Tensor) -> None:
        with no_autocast(features):
            is_left_out = ~valid.view(-1, 1, 1)
            rows = _channels_last(features).double()
            num_positions = rows.shape[1:-1].numel()
            rows = rows.reshape(len(rows), num_positions, rows.shape[-1]).masked_fill(is_left_out, 0)
            count, total = sum_over_ranks(valid.sum(dtype=torch.float64) * num_positions, rows.sum(dim=(0, 1)))
            mean = total / count.clamp(min=1)
            centered = (rows - mean).masked_fill(is_left_out, 0).flatten(0, 1)
            (scatter,) = sum_over_ranks(centered.T @ centered if self.kind == "phi_s" else centered.square().sum(dim=0))
            self._merge(count, mean, scatter)
        self.num_batches += 1
        number = int(self.num_batches)
        if number & (number - 1) == 0:
            self._refresh()

    def _merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Chan's formula for the mean and the scatter of two sets together."""
        total = (self.count + count).clamp(min=1)
        delta = mean - self.running_mean
        outer = torch.outer(delta, delta) if self.kind == "phi_s" else delta.square()
        self.running_scatter += scatter + outer * (self.count * count / total)
        self.running_mean += delta * (count / total)
        self.count += count

    def _refresh(self) -> None:
        """Compute what is applied."""
        covariance = self.running_scatter / (self.count - 1).clamp(min=1)
        match self.kind:
            case "global":
                transform = _inverse_root(covariance.mean().view(1))
            case "channels":
                transform = _inverse_root(covariance)
            case _:
                transform = _phi_s(covariance)
        # An eigenvector is as good as its opposite, and ranks might disagree.
        self.transform.copy_(from_rank_zero(transform.to(self.transform)))
        self.mean.copy_(self.running_mean)


def _phi_s(covariance: Tensor) -> Tensor:
    """H Uᵀ / sqrt(mean of λ)."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    size = len(covariance)
    matrix = hadamard(size)
    assert matrix is not None  # checked at construction
    rotation = torch.from_numpy(matrix.copy()).to(vectors) / size**0.5 @ vectors.T
    scaled: Tensor = rotation * _inverse_root(eigenvalues.clamp(min=0).mean())
    return scaled


def _inverse_root(variance: Tensor) -> Tensor:
    """1 / sqrt, and 1 for a variance of 0."""
    root: Tensor = variance.where(variance > 0, 1.0).rsqrt()
    return root


def _channels_last(features: Tensor) -> Tensor:
    return features.movedim(1, -1) if features.ndim == 4 else features
