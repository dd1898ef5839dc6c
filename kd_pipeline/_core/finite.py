"""Whether the weights of a network, or its logits, are numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["first_nonfinite", "has_softmax"]

_STATISTICS = ("running_mean", "running_var")
"""Buffers of normalization layers."""


@torch.no_grad()
def first_nonfinite(network: nn.Module, *, parameters_only: bool = False) -> str | None:
    """The name of the first weight or saved buffer of `network` that holds NaN or inf; None if there is none.

    A buffer may hold inf, as the masks of some transformers do, unless it is a statistic of a normalization layer. Of a
    sharded network, only this rank's part is read.
    """
    checked = list(_checked(network, parameters_only))
    if not checked:
        return None
    # All at once: on a GPU the host waits a single time.
    is_bad = torch.stack([bad.to(checked[0][1].device) for _, bad in checked]).tolist()
    return next((name for (name, _), bad in zip(checked, is_bad, strict=True) if bad), None)


def has_softmax(logits_NK: Tensor) -> Tensor:
    """`[N]`, False for rows with NaN, inf, or nothing but -inf. A class of -inf among others has the probability 0."""
    return logits_NK.logsumexp(dim=1).isfinite()  # the logarithm of the softmax's divisor


def _checked(network: nn.Module, parameters_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Names, and whether the tensor is bad as a bool scalar on its device."""
    parameters = {name for name, _ in network.named_parameters()}
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if parameters_only and name not in parameters:
            continue
        tensor: Tensor = value.to_local() if hasattr(value, "to_local") else value
        is_mask = name not in parameters and not name.endswith(_STATISTICS)
        yield name, tensor.isnan().any() if is_mask else ~tensor.isfinite().all()
