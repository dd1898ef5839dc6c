"""Layers that map a student's features to the width of its teacher's; they are trained with the student."""

from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["Mlp", "build_projector"]


class Mlp(nn.Sequential):
    """Linear, LayerNorm, GELU, linear, for each vector of `[N, D]`, `[N, L, D]` or `[N, D, H, W]`.

    These are the adaptor heads that C-RADIO's teachers have (NVlabs/RADIO, `MLP2` without inner blocks). It is as wide
    inside as the wider of its two ends.
    """

    def __init__(self, num_inputs: int, num_outputs: int, **like: Any) -> None:
        """Map vectors of `num_inputs` numbers to `num_outputs`; `like` is device and dtype."""
        width = max(num_inputs, num_outputs)
        super().__init__(
            nn.Linear(num_inputs, width, **like),
            nn.LayerNorm(width, **like),
            nn.GELU(),
            nn.Linear(width, num_outputs, **like),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The features, mapped, in the same layout."""
        is_map = features.ndim == 4
        features = features.movedim(1, -1) if is_map else features
        for layer in self:
            features = layer(features)
        return features.movedim(-1, 1) if is_map else features


def build_projector(
    kind: Literal["none", "linear", "mlp", "conv"], num_inputs: int, num_outputs: int, like: Tensor
) -> nn.Module:
    """A projector on the device of `like` and in its dtype; it draws from the default generator of the CPU."""
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    match kind:
        case "none":
            return nn.Identity()
        case "linear":
            return nn.Linear(num_inputs, num_outputs, **options)
        case "mlp":
            return Mlp(num_inputs, num_outputs, **options)
        case "conv":
            return nn.Conv2d(num_inputs, num_outputs, 1, **options)
