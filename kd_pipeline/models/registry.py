"""Models by name: from timm, torchvision, the user's own factory, or the small ones of this package."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import is_in_layer
from kd_pipeline.models.resnet import create_builtin

__all__ = ["ModelSettings", "PretrainedInput", "open_model", "pretrained_input"]

_STATE_DICT_KEYS = ("state_dict", "model", "student", "model_state_dict")
"""Where checkpoints keep the weights: Lightning and timm, torchvision's scripts, kd_pipeline, hand-written loops."""
_PREFIXES = ("module.", "model.", "student.", "_orig_mod.")
"""Key prefixes that DistributedDataParallel, Lightning modules and torch.compile add."""


class ModelSettings(Settings):
    """Which model to build, and its weights. Set exactly one of the first four."""

    timm: str | None = None
    """Name of a timm model, such as `resnet18` or, with its pretrained tag, `resnet18.a1_in1k`."""
    torchvision: str | None = None
    """Name of a torchvision classifier."""
    builtin: Literal["small_resnet", "resnet8x4", "resnet32x4"] | None = None
    """A small network of this package: `small_resnet`, or one of the pair in papers on CIFAR-100 distillation."""
    factory: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")
    """Your own function that returns an `nn.Module`, as `package.module:function`."""
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """More arguments for the function that builds the model."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of logits; defaults to the model's own."""
    pretrained: bool = False
    """Download the pretrained weights of timm or torchvision."""
    checkpoint: Path | None = None
    """File to load the weights from: a state dict saved by `torch.save`, or a `.safetensors` file."""
    reset: tuple[str, ...] = ()
    """Names of layers that keep their random initialization instead of the checkpoint's weights: `[fc]` for the head
    of a model that is to learn different classes."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        names = ("timm", "torchvision", "builtin", "factory")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set one of {', '.join(names)}, got {' and '.join(given) or 'none of them'}")
        if self.pretrained and given[0] in ("builtin", "factory"):
            raise ValueError(f"pretrained has no effect on a {given[0]}; set checkpoint to a file with the weights")
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(f"two sets of weights: pretrained and checkpoint: {self.checkpoint}; set one of them")
        if self.reset and self.checkpoint is None:
            raise ValueError(f"reset: {', '.join(self.reset)} has no effect without a checkpoint; set checkpoint")
        return self


class PretrainedInput(NamedTuple):
    """The images that a pretrained model expects; timm's `pretrained_cfg`."""

    mean: tuple[float, float, float]
    """Mean per channel, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation per channel."""
    size: tuple[int, int]
    """Height and width in pixels."""
    fixed_input_size: bool
    """Whether the model accepts no other size."""


def open_model(settings: ModelSettings, *, plugins: Collection[str] = ()) -> nn.Module:
    """Build a model in float32 on the CPU, and load its weights.

    A checkpoint may be the state dict itself or hold it under `state_dict`, `model`, `student` or `model_state_dict`;
    prefixes that wrappers add to every key are removed. Its keys must be those of the model, except in layers that are
    reset. Only tensors and plain values are unpickled, so a checkpoint cannot run code.

    Args:
        settings: what to build.
        plugins: modules that a `factory` may come from. A config file is data and cannot grant this itself: pass what
            the user typed.

    Raises:
        ConfigError: there is no such model, it cannot be built or downloaded, its factory is not allowed, or the
            checkpoint cannot be read or does not fit.
        MissingPackageError: timm, torchvision or safetensors is needed and not installed.
    """
    build, name = _find_builder(settings, plugins)
    arguments: dict[str, Any] = {} if settings.num_classes is None else {"num_classes": settings.num_classes}
    if settings.pretrained:
        arguments |= {"pretrained": True} if settings.timm else {"weights": "DEFAULT"}
    try:
        model = build(**settings.kwargs, **arguments)
    except Exception as exc:
        if settings.pretrained and isinstance(exc, OSError):  # how downloads fail in both libraries
            raise ConfigError(
                f"the pretrained weights of {name} cannot be downloaded ({exc}); check the connection, or download "
                "them on another machine and set checkpoint to the file"
            ) from exc
        raise ConfigError(f"{name} cannot be built: {exc}; check kwargs, num_classes and pretrained") from exc
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} should return an nn.Module, got {type(model).__qualname__}")
    if settings.checkpoint is not None:
        _load_checkpoint(model, settings.checkpoint, settings.reset)
    return model


def pretrained_input(module: nn.Module) -> PretrainedInput | None:
    """The images that a timm model was trained on; None for a model without timm's `pretrained_cfg`."""
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= config.keys():
        return None
    _, height, width = config["input_size"]
    fixed = bool(config.get("fixed_input_size"))
    return PretrainedInput(tuple(config["mean"]), tuple(config["std"]), (height, width), fixed)


def _find_builder(settings: ModelSettings, plugins: Collection[str]) -> tuple[Callable[..., Any], str]:
    """The function that builds the model, and the model's name for messages."""
    if settings.timm is not None:
        timm = require("timm", extra="timm")
        if not timm.is_model(settings.timm):
            raise _unknown_model("timm", settings.timm, timm.list_models())
        return partial(timm.create_model, settings.timm), f"timm's {settings.timm}"
    if settings.torchvision is not None:
        models = require("torchvision.models", extra="timm")
        names = models.list_models(module=models)  # classifiers only; detectors are in submodules
        if settings.torchvision not in names:
            raise _unknown_model("torchvision", settings.torchvision, names)
        return models.get_model_builder(settings.torchvision), f"torchvision's {settings.torchvision}"
    if settings.builtin is not None:
        return partial(create_builtin, settings.builtin), f"the builtin {settings.builtin}"
    assert settings.factory is not None
    return import_function("factory", settings.factory, plugins, caller="open_model"), f"the factory {settings.factory}"


def _unknown_model(library: str, name: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"{library} has no classifier called {name!r}{suggest(name.partition('.')[0], names)}")


def _load_checkpoint(model: nn.Module, path: Path, reset: Sequence[str]) -> None:
    own = model.state_dict()
    for layer in reset:
        if not any(is_in_layer(name, layer) for name in own):
            raise ConfigError(
                f"reset: {type(model).__qualname__} has no weights in a layer {layer!r}"
                f"{suggest(layer, (name for name, _ in model.named_modules() if name))}"
            )

    def without_reset(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if not any(is_in_layer(name, layer) for layer in reset)}

    expected = without_reset(own)
    found = without_reset(_remove_prefixes(_read_state_dict(path), own))
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of a different shape": [
            f"{name} {list(found[name].shape)} in the file, {list(value.shape)} in the model"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    if any(differences.values()):
        counts = (f"{len(names)} {kind} ({first_few(names)})" for kind, names in differences.items() if names)
        raise ConfigError(
            f"{path} does not fit {type(model).__qualname__}: {'; '.join(counts)}. Is it the checkpoint of another "
            "model, or of another num_classes? Name layers that should keep their random initialization in reset"
        )
    model.load_state_dict(own | found)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; correct checkpoint")
    safetensors = require("safetensors.torch", extra="timm") if path.suffix == ".safetensors" else None
    try:
        loaded = safetensors.load_file(path) if safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as exc:  # damaged bytes can make torch raise anything
        unsafe = re.search(r"GLOBAL (\S+)", str(exc))
        reason = f"holds the Python object {unsafe[1]}" if unsafe else "is damaged or holds more than plain tensors"
        raise ConfigError(
            f"{path} is not loaded: it {reason}, and loading objects can run code; save model.state_dict() alone, with "
            "torch.save or as .safetensors"
        ) from exc
    state = loaded
    if isinstance(loaded, Mapping):
        state = next((loaded[key] for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a mapping of {first_few([*map(str, state)])}" if isinstance(state, Mapping) else type(state).__name__
        raise ConfigError(
            f"{path} holds {found}, and no state dict, alone or under {', '.join(_STATE_DICT_KEYS)}; save "
            "model.state_dict()"
        )
    return dict(state)


def _remove_prefixes(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Remove wrappers' prefixes from all keys, as long as no key is one of the model's `own`."""
    while state and not any(name in own for name in state):
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
