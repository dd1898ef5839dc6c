"""Networks without a head: what they return by name, whichever library they are from."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import named_outputs

__all__ = ["POOLED", "SPATIAL", "Backbone", "num_prefix_tokens", "prefix_tokens_of", "trunk_of", "without_head"]

POOLED, SPATIAL = "pooled", "spatial"
"""Names of a backbone's outputs: a vector for the whole image, and a map or tokens."""


class Backbone(nn.Module):
    """A network without its head, which maps images `[N, 3, H, W]` to outputs by name.

    - `"pooled"` `[N, D]`: what the head would get.
    - `"spatial"`: the last map `[N, C, h, w]` or tokens `[N, L, D]` before the pooling, if the network has one.

    A network of your own that returns a mapping keeps its names. The network itself is `trunk`, whose weights have the
    names that its library gives them.
    """

    def __init__(self, trunk: nn.Module) -> None:
        """Wrap `trunk`: of timm with `num_classes=0`, one that `without_head` made, or of your own."""
        super().__init__()
        self.trunk = trunk
        self._is_timm = hasattr(trunk, "forward_features") and hasattr(trunk, "forward_head")
        self._caught: dict[str, _Caught] = {}
        """What hooks catch in a classifier whose head has no outputs, by the name of the output."""
        if not self._is_timm and (head := _last_linear(trunk)) is not None and head[1].out_features == 0:
            self._caught = {POOLED: _Caught(), SPATIAL: _Caught()}
            head[1].register_forward_pre_hook(self._caught[POOLED].keep_input)
            _catch_spatial(trunk, head[0], self._caught[SPATIAL])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        if self._is_timm:
            return _run_timm(self.trunk, images)
        output = self.trunk(images)
        if self._caught:
            return {name: caught.pop() for name, caught in self._caught.items()}
        return dict(named_outputs(output, vector=POOLED))


def without_head(model: nn.Module) -> nn.Module:
    """Replace the last linear layer of a classifier by one with no outputs, as `num_classes=0` does in torchvision.

    `torchvision.models.resnet18(num_classes=0)` loads the weights strictly.

    Raises:
        ConfigError: it has no linear layer.
    """
    head = _last_linear(model)
    if head is None:
        raise ConfigError(
            f"{type(model).__qualname__} has no linear layer at its end to leave out; use another network, or a "
            "factory that returns the network without its head"
        )
    name, linear = head
    parent, _, attribute = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        empty = nn.Linear(linear.in_features, 0, bias=linear.bias is not None)
    # Nothing depends on these weights, and DDP waits for a gradient of each that is trained.
    setattr(model.get_submodule(parent), attribute, empty.requires_grad_(False))
    return model


def trunk_of(model: nn.Module) -> nn.Module:
    """The network whose weights have the names of its library: that of a `Backbone`, else `model`."""
    return model.trunk if isinstance(model, Backbone) else model


def num_prefix_tokens(model: nn.Module) -> int | None:
    """Class and register tokens at the start of the tokens that `model` or its layers return; None if it is unknown.

    Known are the vision transformers of timm, torchvision and Hugging Face.
    """
    for module in model.modules():
        number = getattr(module, "num_prefix_tokens", None)
        if isinstance(number, int):
            return number
        if isinstance(getattr(module, "class_token", None), nn.Parameter):  # torchvision
            return 1
        if isinstance(getattr(module, "cls_token", None), nn.Parameter):
            registers = getattr(module, "register_tokens", None)
            return 1 + (registers.shape[1] if isinstance(registers, Tensor) else 0)
    return None


def prefix_tokens_of(model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The `num_prefix_tokens` of each of the outputs of `model`; None for what is no tokens `[N, L, D]`."""
    number = num_prefix_tokens(model)
    return {
        name: None if number is None or output.ndim != 3 or output.shape[1] <= number else number
        for name, output in outputs.items()
    }


class _Caught:
    """A tensor of the current forward pass. An object, so `deepcopy` of a network copies its hooks too."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def keep_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """A pre-hook."""
        self._value = arguments[0]

    def keep_output(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """A hook."""
        self._value = output

    def pop(self) -> Tensor:
        value, self._value = self._value, None
        assert value is not None  # a classifier runs through its pooling to its head
        return value


def _run_timm(trunk: Any, images: Tensor) -> dict[str, Tensor]:
    features = trunk.forward_features(images)
    outputs = {POOLED: trunk.forward_head(features, pre_logits=True)}
    if isinstance(features, Tensor):  # CrossViT has several
        is_nhwc = features.ndim == 4 and getattr(trunk, "output_fmt", None) == "NHWC"
        outputs[SPATIAL] = features.permute(0, 3, 1, 2) if is_nhwc else features
    return outputs


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear] | None:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None


def _catch_spatial(trunk: nn.Module, head: str, caught: _Caught) -> None:
    """Catch the last map or tokens of a classifier.

    A map is the input of the last pooling layer; those before it are within the blocks. A transformer, or a network
    that pools with a function, returns it from the part before the one with the head.
    """
    pools = [module for module in trunk.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    if pools:
        pools[-1].register_forward_pre_hook(caught.keep_input)
        return
    names = [name for name, _ in trunk.named_children()]
    before = names[names.index(head.partition(".")[0]) - 1]
    trunk.get_submodule(before).register_forward_hook(caught.keep_output)
