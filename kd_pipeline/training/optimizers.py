"""The student's optimizer: its kind, and which parameters share a learning rate and a weight decay."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import chain
from typing import Annotated, Any, Self

import torch
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import nn
from torch.optim import Optimizer

from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError

__all__ = ["OptimizerSettings", "build_optimizer"]

_KNOWN_TO = {
    "sgd": {"momentum", "nesterov"},
    "adam": {"betas", "eps"},
    "adamw": {"betas", "eps"},
    "rmsprop": {"momentum", "eps"},
    "lamb": {"betas", "eps"},
    "lion": {"betas"},
}
"""Settings that not every optimizer has, by the optimizers that have them."""

_TORCH = "torch.optim."

_Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """Which optimizer trains the student, and how. A setting that the chosen one does not have is an error."""

    name: str = "adamw"
    """`sgd`, `adam`, `adamw` and `rmsprop` of torch, `lamb` and `lion` of timm, or another class of torch's as
    `torch.optim.RAdam`. `lamb` also scales a gradient whose norm is above 1 down to 1."""
    lr: PositiveFloat = 1e-3
    """The highest learning rate of the schedule."""
    weight_decay: float | None = Field(default=None, ge=0)
    """The optimizer's own unless given: 0.01 for `adamw` and `lamb`, 0 for the others."""
    decay_norm_and_bias: bool = False
    """Let weight decay act on parameters of one dimension too, which are biases and the scales of normalization, and
    on those that a network lists in its `no_weight_decay()`, as timm's transformers do."""
    momentum: _Share | None = None
    """For `sgd` and `rmsprop`; 0 unless given."""
    nesterov: bool = False
    """For `sgd` with momentum."""
    betas: tuple[_Share, _Share] | None = None
    """For `adam`, `adamw`, `lamb` and `lion`: how slowly the running means forget. The optimizer's own unless given."""
    eps: PositiveFloat | None = None
    """For `adam`, `adamw`, `rmsprop` and `lamb`. The optimizer's own unless given."""
    kwargs: dict[str, bool | int | float | tuple[float, float]] = Field(default_factory=dict)
    """More arguments for the class."""
    lr_scale: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Factors of the learning rate by a layer's or a parameter's name in the student, such as `{layer1: 0.1}`; the
    longest name that fits counts."""

    @field_validator("name")
    @classmethod
    def _is_there(cls, name: str) -> str:
        found = getattr(torch.optim, name.removeprefix(_TORCH), None) if name.startswith(_TORCH) else None
        if name not in _KNOWN_TO and not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise ValueError(
                f"there is no optimizer {name!r}, only {', '.join(_KNOWN_TO)} and torch's classes such as "
                f"{_TORCH}RAdam{suggest(name, _KNOWN_TO, otherwise='')}"
            )
        return name

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        known = _KNOWN_TO.get(self.name, set())
        for setting in sorted(set().union(*_KNOWN_TO.values()) - known):
            if (value := getattr(self, setting)) not in (None, False):
                raise ValueError(
                    f"{setting}: {value} means nothing to {self.name}; remove it or change name"
                    if self.name in _KNOWN_TO
                    else f"{setting}: {value} of {self.name} belongs into its kwargs"
                )
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true looks ahead along the momentum, and there is none; set momentum: 0.9")
        return self


def build_optimizer(
    student: nn.Module, settings: OptimizerSettings, *, extra: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """An optimizer of the student's parameters that need a gradient, in named groups.

    The groups are called `student` and, for each name in `lr_scale`, `student.<name>`; `/no_decay` follows where weight
    decay is off.

    Args:
        student: the network, and nothing but it: a teacher beside it would be trained too.
        settings: what to build.
        extra: more parameters to train, such as those of projectors; they belong with `student`.

    Raises:
        ConfigError: nothing needs a gradient, a name in `lr_scale` fits no parameter that does, or the class does not
            take its `kwargs`.
        MissingPackageError: timm is needed and not installed.
    """
    known = ("weight_decay", *sorted(_KNOWN_TO.get(settings.name, set())))
    arguments = {name: value for name in known if (value := getattr(settings, name)) is not None} | settings.kwargs
    groups, kind = _groups(student, settings, extra), _class_of(settings.name)
    try:
        optimizer: Optimizer = kind(groups, lr=settings.lr, **arguments)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"train.optimizer: {settings.name} cannot be made of {arguments}: {exc}") from exc
    return optimizer


def _class_of(name: str) -> Any:
    match name:
        case "sgd":
            return torch.optim.SGD
        case "adam":
            return torch.optim.Adam
        case "adamw":
            return torch.optim.AdamW
        case "rmsprop":
            return torch.optim.RMSprop
        case "lamb":
            return require("timm.optim", extra="timm").Lamb
        case "lion":
            return require("timm.optim", extra="timm").Lion
    return getattr(torch.optim, name.removeprefix(_TORCH))


def _groups(student: nn.Module, settings: OptimizerSettings, extra: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """torch's parameter groups, in the order in which the student has their first parameters."""
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(f"no parameter of the student {type(student).__qualname__} needs a gradient; unfreeze some")
    _check_names(settings.lr_scale, trained)
    exempt = set(_exempt_from_decay(student))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in chain(trained.items(), (("", parameter) for parameter in extra if parameter.requires_grad)):
        layer = max((layer for layer in settings.lr_scale if _lies_in(name, layer)), key=len, default=None)
        label, scale = ("student", 1.0) if layer is None else (f"student.{layer}", settings.lr_scale[layer])
        group: dict[str, Any] = {"lr": settings.lr * scale}
        is_exempt = parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in exempt)
        if is_exempt and not settings.decay_norm_and_bias:
            label += "/no_decay"
            group["weight_decay"] = 0.0
        groups.setdefault(label, {"name": label, "params": [], **group})["params"].append(parameter)
    return list(groups.values())


def _exempt_from_decay(student: nn.Module) -> Iterator[str]:
    """Patterns of the parameters, by name, that the student, or a network inside it, wants no weight decay on."""
    for prefix, module in student.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            yield from (f"{prefix}.{pattern}".removeprefix(".") for pattern in listed())


def _lies_in(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def _check_names(layers: Iterable[str], trained: Iterable[str]) -> None:
    """Refuse a layer that has none of the parameters `trained`."""
    known: dict[str, None] = {}  # a set that keeps the order
    for name in trained:
        parts = name.split(".")
        known |= {".".join(parts[:depth]): None for depth in range(1, len(parts) + 1)}
    for layer in layers:
        if layer not in known:
            raise ConfigError(f"lr_scale: no trained parameter of the student lies in {layer!r}{suggest(layer, known)}")
