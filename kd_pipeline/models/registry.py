"""Networks by name: timm's, torchvision's, the user's own factory, and small ones of our own."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.resnet import builtin

__all__ = ["DefaultInput", "ModelSettings", "default_input", "open_model"]

_MAX_NAMED = 5
"""Most keys of one kind that a message about a checkpoint lists."""
_WRAPPERS = ("state_dict", "model", "student", "model_state_dict")
"""Where a checkpoint may keep the weights: Lightning and timm, torchvision's scripts, ours, many loops."""
_PREFIXES = ("module.", "model.", "student.", "_orig_mod.")
"""What DistributedDataParallel, Lightning modules and torch.compile put in front of every key."""


class ModelSettings(Settings):
    """Which network to build, and its weights. Exactly one of the first four says which."""

    timm: str | None = None
    """Name in timm, such as `resnet18` or, with the weights meant, `resnet18.a1_in1k`."""
    torchvision: str | None = None
    """Name of a classifier in torchvision."""
    builtin: Literal["small_resnet", "resnet8x4", "resnet32x4"] | None = None
    """One of our own for small images: `small_resnet`, or the two that papers on CIFAR-100 distil between."""
    factory: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")
    """A function of your own that returns an `nn.Module`, as `package.module:function`."""
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """More arguments for the function that builds the network."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of logits; the network's own unless given."""
    pretrained: bool = False
    """Take the weights that timm or torchvision downloads."""
    checkpoint: Path | None = None
    """Take the weights in this file: a state dict by `torch.save`, or a `.safetensors` file."""
    reset: tuple[str, ...] = ()
    """Layers, by name, that keep their own random weights, whatever the checkpoint has for them: `[fc]` for the head
    of a network that is to learn other classes."""

    @model_validator(mode="after")
    def _names_one_network(self) -> Self:
        names = ("timm", "torchvision", "builtin", "factory")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set one of {', '.join(names)}, got {' and '.join(given) or 'none of them'}")
        if self.pretrained and given[0] in ("builtin", "factory"):
            raise ValueError(f"pretrained means nothing to a {given[0]}; set checkpoint to a file with the weights")
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(f"two sets of weights: pretrained and checkpoint: {self.checkpoint}; give one of them")
        if self.reset and self.checkpoint is None:
            raise ValueError(
                f"reset: {', '.join(self.reset)} are layers that a checkpoint does not fill; set checkpoint"
            )
        return self


class DefaultInput(NamedTuple):
    """The images that a network was trained on."""

    mean: tuple[float, float, float]
    """Mean per channel, on the scale 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation per channel, likewise."""
    size: tuple[int, int]
    """Height and width."""
    is_only_size: bool
    """Whether the network takes no other."""


def open_model(settings: ModelSettings, *, plugins: Collection[str] = ()) -> nn.Module:
    """Build the network that `settings` describe, in float32 on the CPU, with its weights.

    A checkpoint may hold the state dict alone or under `state_dict`, `model`, `student` or `model_state_dict`; a prefix
    that wrappers put in front of every key is taken off. It must have every key of the network and no other, but for
    those in layers that are reset. Only
    tensors and plain values are read from it, so that no file runs code.

    Args:
        settings: what to build.
        plugins: modules that a `factory` may come from. A config file is data and cannot allow this by itself: take
            them from what the user typed.

    Raises:
        ConfigError: there is no such network, it cannot be built or downloaded, its factory is not allowed, or the
            checkpoint cannot be read or is that of another network.
        MissingPackageError: timm, torchvision or safetensors is needed and not installed.
    """
    build, name = _builder(settings, plugins)
    arguments: dict[str, Any] = {} if settings.num_classes is None else {"num_classes": settings.num_classes}
    if settings.pretrained:
        arguments |= {"pretrained": True} if settings.timm else {"weights": "DEFAULT"}
    try:
        module = build(**settings.kwargs, **arguments)
    except Exception as exc:
        if settings.pretrained and isinstance(exc, OSError):  # what both libraries' downloads end in
            raise ConfigError(
                f"the pretrained weights of {name} cannot be downloaded ({exc}); check the connection, or fetch them "
                "on another machine and set checkpoint to the file"
            ) from exc
        raise ConfigError(f"{name} cannot be built: {exc}; check kwargs, num_classes and pretrained") from exc
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name} should return an nn.Module, got {type(module).__qualname__}")
    if settings.checkpoint is not None:
        _load_weights(module, settings.checkpoint, settings.reset)
    return module


def default_input(module: nn.Module) -> DefaultInput | None:
    """The images that a timm network expects; None for a network that does not say."""
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= config.keys():
        return None
    _, height, width = config["input_size"]
    is_only_size = bool(config.get("fixed_input_size"))
    return DefaultInput(tuple(config["mean"]), tuple(config["std"]), (height, width), is_only_size)


def _builder(settings: ModelSettings, plugins: Collection[str]) -> tuple[Callable[..., Any], str]:
    """What builds the network, and what to call it in a message."""
    if settings.timm is not None:
        timm = require("timm", extra="timm")
        if not timm.is_model(settings.timm):
            raise _unknown("timm", settings.timm, timm.list_models())
        return lambda **arguments: timm.create_model(settings.timm, **arguments), f"timm's {settings.timm}"
    if settings.torchvision is not None:
        models = require("torchvision.models", extra="timm")
        names = models.list_models(module=models)  # the classifiers; detectors and the like are in modules below it
        if settings.torchvision not in names:
            raise _unknown("torchvision", settings.torchvision, names)
        return models.get_model_builder(settings.torchvision), f"torchvision's {settings.torchvision}"
    if settings.builtin is not None:
        return partial(builtin, settings.builtin), f"the builtin {settings.builtin}"
    assert settings.factory is not None
    return import_function("factory", settings.factory, plugins, caller="open_model"), f"the factory {settings.factory}"


def _unknown(library: str, name: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"{library} has no classifier called {name!r}{suggest(name.partition('.')[0], names)}")


def _load_weights(module: nn.Module, path: Path, reset: Sequence[str]) -> None:
    own = module.state_dict()
    for layer in reset:
        if not any(_lies_in(name, layer) for name in own):
            raise ConfigError(
                f"reset: {type(module).__qualname__} has no weights in a layer {layer!r}"
                f"{suggest(layer, (name for name, _ in module.named_modules() if name))}"
            )

    def is_wanted(name: str) -> bool:
        return not any(_lies_in(name, layer) for layer in reset)

    wanted = {name: tuple(tensor.shape) for name, tensor in own.items() if is_wanted(name)}
    state = {name: tensor for name, tensor in _without_prefixes(_state_dict(path), own).items() if is_wanted(name)}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [
        *_listed("missing", [name for name in wanted if name not in found]),
        *_listed("unexpected", [name for name in found if name not in wanted]),
        *_listed(
            "of another shape",
            [
                f"{name} {list(found[name])} in the file, {list(shape)} in the model"
                for name, shape in wanted.items()
                if found.get(name, shape) != shape
            ],
        ),
    ]
    if problems:
        raise ConfigError(
            f"{path} does not fit {type(module).__qualname__}: {'; '.join(problems)}. Does it belong to another model, "
            "or to another num_classes? Layers that are to start anew can be named in reset"
        )
    module.load_state_dict(own | state)


def _lies_in(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint, by key."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; correct checkpoint")
    safetensors = require("safetensors.torch", extra="timm") if path.suffix == ".safetensors" else None
    try:
        loaded = safetensors.load_file(path) if safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as exc:  # torch raises whatever the bytes lead it to
        culprit = re.search(r"GLOBAL (\S+)", str(exc))
        what = f"holds the Python object {culprit[1]}" if culprit else "is damaged or holds more than plain tensors"
        raise ConfigError(
            f"{path} is not loaded: it {what}, and loading objects can run code; save model.state_dict() alone, with "
            "torch.save or as .safetensors"
        ) from exc
    state = loaded
    if isinstance(loaded, Mapping):
        state = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), loaded)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f"a mapping of {_few(map(str, state))}" if isinstance(state, Mapping) else type(state).__qualname__
        raise ConfigError(
            f"{path} holds {keys}, and no state dict, alone or under {', '.join(_WRAPPERS)}; save model.state_dict()"
        )
    return dict(state)


def _without_prefixes(state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """`state` without what wrappers put in front of every key; a prefix that the model has itself stays."""
    while state and not any(name in wanted for name in state):
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _listed(kind: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {kind} ({_few(names)})"] if names else []


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
