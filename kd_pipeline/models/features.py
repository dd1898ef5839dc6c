"""Intermediate features of a model, by layer name, through forward hooks.

A layer has the name that `named_modules` gives it, or a number, counted from 0, or from the end if it is negative:
`layer:N` is the N-th direct child of the network, and `stage:N`, of a timm model, the layer that entry N of its
`feature_info` names. Maps are `[N, C, H, W]` also where the network computes in NHWC, as timm's Swin does.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.modules import frozen_copy, named_outputs

__all__ = ["capture_features", "with_features"]

_STAGE = re.compile(r"stage:(-?\d+)")
_CHILD = re.compile(r"layer:(-?\d+)")


@contextmanager
def capture_features(module: nn.Module, layers: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """Capture the outputs of `layers` in the forward pass inside the `with`, with their graph.

        with capture_features(student, ["layer3", "layer:-2"]) as features:
            outputs = student(images)
        features["layer3"]

    The mapping is filled, and the hooks are removed, when the `with` ends. It takes one forward pass, in which each
    layer runs once. The module may be compiled, by `torch.compile(module)` or in place, provided that its graph for
    the current mode (train or eval) was not traced without the hooks.

    Raises:
        ConfigError: there is no such layer, child or stage, it does not run exactly once, it does not return a tensor,
            or a later layer modifies its output in place.
    """
    outputs: dict[str, Tensor] = {}
    network = _network_of(module)
    hooks = [_FeatureHook(name, network) for name in layers]
    handles = [hook.register(network) for hook in hooks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    outputs.update((hook.name, hook.pop()) for hook in hooks)


def with_features(module: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A frozen copy of `module` that returns a mapping: the outputs of `module`, and that of each layer by its name.

    The outputs are `"logits"` of a classifier, and `"pooled"` and `"spatial"` of a `Backbone`. Use it as a teacher, or
    export it to ONNX, to distill features. Later changes to `module` do not affect it.

    Raises:
        ConfigError: there is no such layer, child or stage, or its name is that of another output.
        TeacherError: the module cannot be copied.
    """
    return _WithFeatures(module, layers)


class _WithFeatures(nn.Module):
    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.module = frozen_copy(module)
        network = _network_of(self.module)
        self._hooks = [_FeatureHook(name, network) for name in layers]
        for hook in self._hooks:
            hook.register(network)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.output = None  # left over if the last pass failed
        outputs = dict(named_outputs(self.module(images)))
        for hook in self._hooks:
            if hook.name in outputs:
                raise ConfigError(f"the layer {hook.name!r} has the name of an output of the model; rename the output")
            outputs[hook.name] = hook.pop()
        return outputs

    def extra_repr(self) -> str:
        return f"features={[hook.name for hook in self._hooks]}"


class _FeatureHook:
    """A forward hook. An object rather than a closure, so `deepcopy` of a module copies its hooks too."""

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name = name
        self.output: Tensor | None = None
        self._layer = _layer_of(network, name)
        self._widths = _nhwc_widths(network, self._layer)
        self._version = 0

    def register(self, network: nn.Module) -> RemovableHandle:
        """Capture the layer of `network`, which may be a copy of the one it was found in."""
        layers: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
        return layers[self._layer].register_forward_hook(self)

    def __call__(self, module: nn.Module, arguments: object, output: object) -> None:
        if self.output is not None:
            raise ConfigError(
                f"the layer {self.name!r} runs more than once in a forward pass, so its output is ambiguous; name the "
                "layer that contains it"
            )
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"the layer {self.name!r} returns {type(output).__qualname__} and not a tensor; name a layer inside "
                "it, or the one after it"
            )
        self.output = output
        if _has_version(output):
            self._version = output._version

    def pop(self) -> Tensor:
        """Return the captured output and forget it, after checking that the layer ran and nothing changed it."""
        output, self.output = self.output, None
        if output is None:
            raise ConfigError(
                f"the layer {self.name!r} gave no output: the forward pass skips it, or was compiled without the "
                "hook; name a layer that runs, and compile the model after its first pass with hooks"
            )
        if _has_version(output) and output._version != self._version:
            raise ConfigError(
                f"the output of the layer {self.name!r} is modified in place by a later layer, such as an activation "
                "with inplace=True; name that layer instead"
            )
        is_nhwc = output.ndim == 4 and output.shape[3] in self._widths and output.shape[1] not in self._widths
        return output.permute(0, 3, 1, 2) if is_nhwc else output


def _has_version(output: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not output.is_inference()


def _network_of(module: nn.Module) -> nn.Module:
    """The network whose layers have the names that users know."""
    return trunk_of(getattr(module, "_orig_mod", module))  # torch.compile(module) wraps the original


def _layer_of(network: nn.Module, name: str) -> str:
    """The name of the layer that `name` stands for, which is a child, a stage or the layer itself.

    Raises:
        ConfigError: there is none.
    """
    if (child := _CHILD.fullmatch(name)) is not None:
        return _child_of(network, int(child[1]))
    stage = _STAGE.fullmatch(name)
    layer = name if stage is None else _layer_of_stage(network, int(stage[1]))
    layers = [each for each, _ in network.named_modules(remove_duplicate=False) if each]
    if layer not in layers:
        which = f"{layer!r}" if stage is None else f"{layer!r}, which its feature_info gives for {name}"
        raise ConfigError(f"{type(network).__qualname__} has no layer called {which}{suggest(layer, layers)}")
    return layer


def _child_of(network: nn.Module, number: int) -> str:
    children = [name for name, _ in network.named_children()]
    if not -len(children) <= number < len(children):
        known = ", ".join(f"layer:{index} is {name}" for index, name in enumerate(children)) or "it has none"
        raise ConfigError(
            f"{type(network).__qualname__} has {len(children)} children and no layer:{number}; {known}, and negative "
            "numbers count from the end"
        )
    return children[number]


def _layer_of_stage(network: nn.Module, number: int) -> str:
    stages = _stages(network)
    if not stages:
        raise ConfigError(
            f"{type(network).__qualname__} has no stages for stage:{number}, which are those in the feature_info of "
            "timm's models; name a layer instead"
        )
    if not -len(stages) <= number < len(stages):
        known = ", ".join(f"stage:{index} is {each['module']}" for index, each in enumerate(stages))
        raise ConfigError(
            f"{type(network).__qualname__} has {len(stages)} stages and no stage:{number}; {known}, and negative "
            "numbers count from the end"
        )
    return str(stages[number]["module"])


def _stages(network: nn.Module) -> Sequence[Mapping[str, Any]]:
    """timm's description of the layers between which the size or the width changes; empty for other networks."""
    found = getattr(network, "feature_info", ())
    return tuple(getattr(found, "info", found) or ())


def _nhwc_widths(network: nn.Module, layer: str) -> Collection[int]:
    """The numbers of channels by which a map of `layer` in NHWC is told; empty if there is none."""
    stages = _stages(network)
    if (known := next((each["num_chs"] for each in stages if each["module"] == layer), None)) is not None:
        return (known,)
    if getattr(network, "output_fmt", None) == "NHWC":
        return {each["num_chs"] for each in stages}
    return ()
