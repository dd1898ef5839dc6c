"""Intermediate features of a model, by layer name, through forward hooks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.modules import frozen_copy, named_outputs

__all__ = ["capture_features", "with_features"]


@contextmanager
def capture_features(module: nn.Module, layers: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """Capture the outputs of `layers` in the forward pass inside the `with`, with their graph.

        with capture_features(student, ["layer3"]) as features:
            logits = student(images)
        features["layer3"]

    The mapping is filled, and the hooks are removed, when the `with` ends. It takes one forward pass, in which each
    layer runs once. The module may be compiled, by `torch.compile(module)` or in place, provided that its graph for
    the current mode (train or eval) was not traced without the hooks.

    Raises:
        ConfigError: there is no such layer, it does not run exactly once, it does not return a tensor, or a later
            layer modifies its output in place.
    """
    outputs: dict[str, Tensor] = {}
    hooks = [_FeatureHook(layer) for layer in layers]
    modules = [_find_layer(module, layer) for layer in layers]
    handles = [layer.register_forward_hook(hook) for layer, hook in zip(modules, hooks, strict=True)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    outputs.update((hook.layer, hook.pop()) for hook in hooks)


def with_features(module: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A frozen copy of `module` that returns a mapping: `"logits"`, and the output of each layer by its name.

    Use it as a teacher, or export it to ONNX, to distill features. Later changes to `module` do not affect it.

    Raises:
        ConfigError: there is no such layer, or its name is that of another output.
        TeacherError: the module cannot be copied.
    """
    return _WithFeatures(module, layers)


class _WithFeatures(nn.Module):
    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.module = frozen_copy(module)
        self._hooks = [_FeatureHook(layer) for layer in layers]
        for hook in self._hooks:
            _find_layer(self.module, hook.layer).register_forward_hook(hook)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.output = None  # left over if the last pass failed
        outputs = dict(named_outputs(self.module(images)))
        for hook in self._hooks:
            if hook.layer in outputs:
                raise ConfigError(f"the layer {hook.layer!r} has the name of an output of the model; rename the output")
            outputs[hook.layer] = hook.pop()
        return outputs

    def extra_repr(self) -> str:
        return f"features={[hook.layer for hook in self._hooks]}"


class _FeatureHook:
    """A forward hook. An object rather than a closure, so `deepcopy` of a module copies its hooks too."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.output: Tensor | None = None
        self._version = 0

    def __call__(self, module: nn.Module, arguments: object, output: object) -> None:
        if self.output is not None:
            raise ConfigError(
                f"the layer {self.layer!r} runs more than once in a forward pass, so its output is ambiguous; name the "
                "layer that contains it"
            )
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"the layer {self.layer!r} returns {type(output).__qualname__} and not a tensor; name a layer inside "
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
                f"the layer {self.layer!r} gave no output: the forward pass skips it, or was compiled without the "
                "hook; name a layer that runs, and compile the model after its first pass with hooks"
            )
        if _has_version(output) and output._version != self._version:
            raise ConfigError(
                f"the output of the layer {self.layer!r} is modified in place by a later layer, such as an activation "
                "with inplace=True; name that layer instead"
            )
        return output


def _has_version(output: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not output.is_inference()


def _find_layer(module: nn.Module, name: str) -> nn.Module:
    module = trunk_of(getattr(module, "_orig_mod", module))  # torch.compile(module) wraps the original
    layers: dict[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
    if not name or name not in layers:
        raise ConfigError(
            f"{type(module).__qualname__} has no layer called {name!r}{suggest(name, filter(None, layers))}"
        )
    return layers[name]
