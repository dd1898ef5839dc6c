"""What the layers of a network return on the way, by layer name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import frozen_copy, named_outputs

__all__ = ["tapped", "with_features"]


@contextmanager
def tapped(module: nn.Module, layers: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """Collect what `layers` of `module` return in the forward pass inside the `with`.

    At the end of the `with` the mapping is filled, and nothing is left on the module.

        with tapped(student, ["layer3"]) as features:
            logits = student(images)
        features["layer3"]

    One forward pass, in which each layer runs once. It may be that of `torch.compile(module)`, or of a `module` that
    was compiled in place, as long as the graph for this mode, training or evaluation, was not traced without the taps.

    Raises:
        ConfigError: there is no such layer, it does not run exactly once, it returns no tensor, or a later layer
            overwrites what it returned.
    """
    outputs: dict[str, Tensor] = {}
    taps = [_Tap(layer) for layer in layers]
    found = [_layer(module, layer) for layer in layers]
    handles = [layer.register_forward_hook(tap) for layer, tap in zip(found, taps, strict=True)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    outputs.update((tap.layer, tap.take()) for tap in taps)


def with_features(module: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A frozen copy of `module` that returns a mapping: its `"logits"`, and the output of each layer under its name.

    This is the module to open a teacher with, or to export to ONNX, whose features a student should learn. Later
    changes of `module` do not reach it.

    Raises:
        ConfigError: there is no such layer, or its name is that of another output.
        TeacherError: the module cannot be copied.
    """
    return _WithFeatures(module, layers)


class _WithFeatures(nn.Module):
    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.module = frozen_copy(module)
        self._taps = [_Tap(layer) for layer in layers]
        for tap in self._taps:
            _layer(self.module, tap.layer).register_forward_hook(tap)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        for tap in self._taps:
            tap.output = None  # left by a pass that failed
        outputs = dict(named_outputs(self.module(images)))
        for tap in self._taps:
            if tap.layer in outputs:
                raise ConfigError(
                    f"the layer {tap.layer!r} has the name of an output of the network; rename the output"
                )
            outputs[tap.layer] = tap.take()
        return outputs

    def extra_repr(self) -> str:
        return f"features={[tap.layer for tap in self._taps]}"


class _Tap:
    """A forward hook; an object and no closure, so that a copy of a network gets taps of its own."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.output: Tensor | None = None
        self._version = 0

    def __call__(self, module: nn.Module, arguments: object, output: object) -> None:
        if self.output is not None:
            raise ConfigError(
                f"the layer {self.layer!r} runs more than once in a forward pass, so that its output is no single "
                "tensor; name the layer that it is part of"
            )
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"the layer {self.layer!r} returns {type(output).__qualname__} and no tensor; name a layer inside it, "
                "or the one after it"
            )
        self.output = output
        if _has_version(output):
            self._version = output._version

    def take(self) -> Tensor:
        """Hand over what the layer returned, once it is known to have run and to be what it was."""
        output, self.output = self.output, None
        if output is None:
            raise ConfigError(
                f"the layer {self.layer!r} gave no output: the forward pass leaves it out, or was compiled without "
                "the tap; name a layer that runs, and compile the network after its first tapped pass"
            )
        if _has_version(output) and output._version != self._version:
            raise ConfigError(
                f"what the layer {self.layer!r} returns is overwritten in place by a later one, such as an activation "
                "with inplace=True; name that one instead"
            )
        return output


def _has_version(output: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not output.is_inference()


def _layer(module: nn.Module, name: str) -> nn.Module:
    module = getattr(module, "_orig_mod", module)  # torch.compile(module) wraps the module that it came from
    layers: dict[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
    if not name or name not in layers:
        raise ConfigError(
            f"{type(module).__qualname__} has no layer called {name!r}{suggest(name, filter(None, layers))}"
        )
    return layers[name]
