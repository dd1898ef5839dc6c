"""Networks without a head: what they return by name, whichever library they are from."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.input_adapter import unadapted
from kd_pipeline.models.modules import named_outputs

__all__ = [
    "POOLED",
    "SPATIAL",
    "Backbone",
    "classifier_layers",
    "num_prefix_tokens",
    "prefix_tokens_of",
    "trunk_of",
    "without_head",
]

POOLED, SPATIAL = "pooled", "spatial"
"""Names of a backbone's outputs: a vector for the whole image, and a map or tokens."""

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_token4")
"""Parameters for a class token: of most, of torchvision, of CLIP, and of the last stage of CoaT."""
_DISTILLATION_TOKENS = ("dist_token", "distillation_token")
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
"""Parameters for register tokens: of timm, of DINOv2 and Hugging Face, and of DINOv3."""
_CLASS_ATTENTION = ("blocks_token_only", "cls_attn_blocks", "post_network")
"""Layers of CaiT, XCiT and VOLO that put the class token before the patches, after all others."""
_AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""Further heads of torchvision's GoogLeNet and Inception, for training from scratch."""


class Backbone(nn.Module):
    """A network without its head, which maps images `[N, 3, H, W]` to outputs by name.

    - `"pooled"` `[N, D]`: what the head would get.
    - `"spatial"`: the last map `[N, C, h, w]` or tokens `[N, L, D]` before the pooling, if the network has one. C may
      differ from D, as in MobileNetV3, which has a layer between pooling and head.

    A network of your own that returns a mapping keeps its names. The network itself is `trunk`, whose weights have the
    names that its library gives them.
    """

    def __init__(self, trunk: nn.Module) -> None:
        """Wrap `trunk`: of timm with `num_classes=0`, one that `without_head` made, or of your own."""
        super().__init__()
        self.trunk = trunk
        self._is_timm = _is_timm(trunk)
        self._num_prefix_tokens = num_prefix_tokens(trunk) or 0
        self._caught: dict[str, _Caught] = {}
        """What hooks catch in a classifier whose head has no outputs, by the name of the output."""
        if not self._is_timm and (head := _last_linear(trunk)) is not None and head[1].out_features == 0:
            self._caught = {POOLED: _Caught(), SPATIAL: _Caught()}
            head[1].register_forward_pre_hook(self._caught[POOLED].keep_input)
            _catch_spatial(trunk, head[0], self._caught[SPATIAL])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        if self._is_timm:
            return self._run_timm(images)
        output = self.trunk(images)
        if self._caught:
            return {name: caught.pop() for name, caught in self._caught.items()}
        return dict(named_outputs(output, vector=POOLED))

    def _run_timm(self, images: Tensor) -> dict[str, Tensor]:
        trunk: Any = self.trunk
        features = trunk.forward_features(images)
        pooled = trunk.forward_head(features, pre_logits=True)
        outputs = {POOLED: pooled} if pooled.ndim == 2 else {}  # no pooling if kwargs say so
        if not isinstance(features, Tensor):  # several, as of CrossViT
            return outputs
        if features.ndim == 4 and getattr(trunk, "output_fmt", None) == "NHWC":
            features = features.permute(0, 3, 1, 2)
        if features.ndim == 4 or features.shape[1] > self._num_prefix_tokens:  # PiT keeps only the class token
            outputs[SPATIAL] = features
        return outputs


def without_head(model: nn.Module) -> nn.Module:
    """Replace the last linear layer of a classifier by one with no outputs, as `num_classes=0` does in torchvision.

    `torchvision.models.resnet18(num_classes=0)` loads the weights strictly; so do `googlenet` and `inception_v3` with
    `aux_logits=False`, as their auxiliary heads are left out, which torchvision does with its pretrained weights too.

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
        empty = nn.Linear(linear.in_features, 0, bias=linear.bias is not None, device=linear.weight.device)
    # Nothing depends on these weights, and DDP waits for a gradient of each that is trained.
    setattr(model.get_submodule(parent), attribute, empty.requires_grad_(False))
    if hasattr(model, "aux_logits"):
        setattr(model, "aux_logits", False)  # noqa: B010  # mypy takes it for a module
        for auxiliary in _AUXILIARY:
            if hasattr(model, auxiliary):
                setattr(model, auxiliary, None)
    return model


def trunk_of(model: nn.Module) -> nn.Module:
    """The network whose weights have the names of its library: that of a `Backbone` or input adapter, else `model`."""
    model = unadapted(model)
    return model.trunk if isinstance(model, Backbone) else model


def classifier_layers(model: nn.Module, weights: Collection[str]) -> tuple[str, ...]:
    """The layers that are the head of `model`, a classifier of timm or torchvision or one of ours, with or without it.

    Args:
        model: the network.
        weights: names of the tensors of the network without a head. timm names the linear layer of a head, and a whole
            head, such as LeViT's with its BatchNorm, is left out by `num_classes=0`.

    Returns:
        Their names; empty for a network of another kind, whose head is unknown.
    """
    known = getattr(model, "default_cfg", None)
    if isinstance(known, Mapping) and known.get("classifier"):
        names = known["classifier"]
        return tuple(_outermost(name, weights) for name in ((names,) if isinstance(names, str) else names))
    head = _last_linear(model)
    return () if head is None else (head[0], *(_AUXILIARY if hasattr(model, "aux_logits") else ()))


def num_prefix_tokens(model: nn.Module, name: str = SPATIAL) -> int | None:
    """Class, distillation and register tokens at the start of tokens `[N, L, D]`; None if the number is unknown.

    Known are the networks of timm and torchvision, and those of Hugging Face and others with the usual names for the
    parameters of such tokens.

    Args:
        model: the network, or one that contains it.
        name: the output or layer that the tokens are of. CaiT, for example, has a class token in its last layers only.
    """
    for module in model.modules():
        number = _own_prefix_tokens(module, model)
        if number is not None:
            return number if _has_prefix_tokens(module, name) else 0
    return 0 if any(map(_is_timm, model.modules())) else None


def prefix_tokens_of(model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The `num_prefix_tokens` of each of the outputs or layers of `model`; None for what is no tokens `[N, L, D]`."""
    found = {name: num_prefix_tokens(model, name) if output.ndim == 3 else None for name, output in outputs.items()}
    return {
        name: None if number is None or outputs[name].shape[1] <= number else number for name, number in found.items()
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


def _is_timm(model: nn.Module) -> bool:
    """Whether it is a classifier of timm. An encoder of timm has no pooling, and returns its map or tokens."""
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "get_classifier"))


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


def _outermost(layer: str, weights: Collection[str]) -> str:
    """The outermost layer around `layer`, or `layer` itself, that has none of `weights`."""
    parts = layer.split(".")
    for number in range(1, len(parts)):
        outer = ".".join(parts[:number])
        if not any(name.startswith(f"{outer}.") for name in weights):
            return outer
    return layer


def _own_prefix_tokens(module: nn.Module, network: nn.Module) -> int | None:
    """The number that `module`, a part of `network`, says or has parameters for; None if it has none."""
    number = getattr(module, "num_prefix_tokens", None)
    if isinstance(number, int):
        return number
    count = _count_tokens(module, _CLASS_TOKENS)
    if count == 0:
        return None
    registers = _count_tokens(module, _REGISTERS)
    if registers == 0:  # Hugging Face's networks say it in their config
        configs = (getattr(each, "config", None) for each in network.modules())
        said = (getattr(config, "num_register_tokens", None) for config in configs)
        registers = next((number for number in said if isinstance(number, int)), 0)
    return count + _count_tokens(module, _DISTILLATION_TOKENS) + registers


def _count_tokens(module: nn.Module, names: Collection[str]) -> int:
    """Tokens in the first of the parameters `names`, each `[D]` or `[..., number, D]`, that `module` has."""
    tokens = (getattr(module, name, None) for name in names)
    token = next((token for token in tokens if isinstance(token, nn.Parameter)), None)
    return 0 if token is None else token.shape[-2] if token.ndim > 1 else 1


def _has_prefix_tokens(network: nn.Module, name: str) -> bool:
    """Whether the tokens called `name`, an output or layer of `network`, have the class token already."""
    part = name.partition(".")[0]
    is_layer = part in dict(network.named_children())
    if is_layer and part == "patch_embed":
        return False
    if not any(hasattr(network, late) for late in _CLASS_ATTENTION):
        return True
    return not name.startswith("stage:") and (not is_layer or part in (*_CLASS_ATTENTION, "norm"))
