"""The student's optimizer, and its parameter groups by learning rate and weight decay."""

from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import is_in_layer

__all__ = ["OptimizerSettings", "build_optimizer", "match_memory_format"]

_SETTINGS_OF = {
    "sgd": {"momentum", "nesterov"},
    "adam": {"betas", "eps"},
    "adamw": {"betas", "eps"},
    "rmsprop": {"momentum", "eps"},
    "lamb": {"betas", "eps"},
    "lion": {"betas"},
}
"""The settings of each optimizer that not all optimizers have."""
_TORCH_CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
_TIMM_CLASSES = {"lamb": "Lamb", "lion": "Lion"}

_TORCH = "torch.optim."

_Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """Which optimizer trains the student, and how. Setting what the chosen one does not have is an error."""

    name: str = "adamw"
    """torch's `sgd`, `adam`, `adamw` and `rmsprop`, timm's `lamb` and `lion`, or any other class of torch, such as
    `torch.optim.RAdam`. `lamb` also clips the gradient to a norm of 1."""
    factory: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")
    """Your own function that returns an optimizer of torch, as `package.module:function`, instead of a `name`. It is
    called as `function(groups, lr=..., **kwargs)`, with torch's parameter groups, which have `lr` and `weight_decay`
    where `lr_scale` and `decay_norm_and_bias` say so; and with `weight_decay` if it is set."""
    lr: PositiveFloat = 1e-3
    """The peak learning rate of the schedule."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Defaults to the optimizer's own: 0.01 for `adamw` and `lamb`, 0 for the others."""
    decay_norm_and_bias: bool = False
    """Also decay parameters of one dimension (biases and normalization scales) and those that a network lists in
    `no_weight_decay()`, as timm's transformers do."""
    momentum: _Fraction | None = None
    """For `sgd` and `rmsprop`; defaults to 0."""
    nesterov: bool = False
    """For `sgd` with momentum."""
    betas: tuple[_Fraction, _Fraction] | None = None
    """For `adam`, `adamw`, `lamb` and `lion`: decay of the running means; defaults to the optimizer's own."""
    eps: PositiveFloat | None = None
    """For `adam`, `adamw`, `rmsprop` and `lamb`; defaults to the optimizer's own."""
    kwargs: dict[str, bool | int | float | str | tuple[float, float]] = Field(default_factory=dict)
    """More arguments of the class or factory."""
    state_from: Path | None = None
    """A checkpoint of an earlier run, such as `runs/a/checkpoints/last.ckpt`, from which the optimizer takes its state,
    such as Adam's moments; the weights are those of `student`, and learning rate and schedule start as set here."""
    lr_scale: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Factors of the learning rate by the name of a layer or parameter of the student, such as `{layer1: 0.1}`; the
    longest matching name wins."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        found = getattr(torch.optim, name.removeprefix(_TORCH), None) if name.startswith(_TORCH) else None
        if name not in _SETTINGS_OF and not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise ValueError(
                f"there is no optimizer {name!r}, only {', '.join(_SETTINGS_OF)} and torch's classes such as "
                f"{_TORCH}RAdam{suggest(name, _SETTINGS_OF, otherwise='')}"
            )
        return name

    @model_validator(mode="after")
    def _uses_every_setting(self) -> Self:
        if self.factory is not None and self.state_from is not None:
            raise ValueError("state_from has no effect with a factory; load the state in the function")
        if self.factory is not None and self.name != type(self).model_fields["name"].default:
            raise ValueError(f"name: {self.name} has no effect with a factory; remove one of them")
        known = set[str]() if self.factory is not None else _SETTINGS_OF.get(self.name, set())
        for setting in sorted(set().union(*_SETTINGS_OF.values()) - known):
            if (value := getattr(self, setting)) not in (None, False):
                raise ValueError(
                    f"{setting}: {value} has no effect with {self.name}; remove it or change name"
                    if self.factory is None and self.name in _SETTINGS_OF
                    else f"{setting}: {value} is an argument of {self.factory or self.name}; set it in kwargs"
                )
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs momentum; set momentum: 0.9")
        return self


def build_optimizer(
    student: nn.Module,
    settings: OptimizerSettings,
    *,
    extra: Iterable[nn.Parameter] = (),
    plugins: Collection[str] = (),
) -> Optimizer:
    """An optimizer of the student's trainable parameters, in named groups.

    The groups are `student` and, for each name in `lr_scale`, `student.<name>`, with the suffix `/no_decay` where
    weight decay is off.

    Args:
        student: the network alone; a teacher inside it would be trained too.
        settings: what to build.
        extra: more parameters to train, such as those of projectors; they join the group `student`.
        plugins: modules that a factory may come from.

    Raises:
        ConfigError: nothing is trainable, a name in `lr_scale` matches no trainable parameter, or the class does not
            accept its `kwargs`; or the factory is not allowed, fails, or returns no optimizer of all parameters.
        MissingPackageError: timm is needed and not installed.
    """
    if settings.factory is not None:
        return _from_factory(settings, settings.factory, _parameter_groups(student, settings, extra), plugins)
    names = ("weight_decay", *sorted(_SETTINGS_OF.get(settings.name, set())))
    arguments = {name: value for name in names if (value := getattr(settings, name)) is not None} | settings.kwargs
    groups, optimizer_class = _parameter_groups(student, settings, extra), _optimizer_class(settings.name)
    try:
        optimizer: Optimizer = optimizer_class(groups, lr=settings.lr, **arguments)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"train.optimizer: {settings.name} does not accept {arguments}: {exc}") from exc
    return optimizer


def _from_factory(
    settings: OptimizerSettings, factory: str, groups: list[dict[str, Any]], plugins: Collection[str]
) -> Optimizer:
    """What the user's function returns, if it is an optimizer of all parameters."""
    function = import_function("train.optimizer.factory", factory, plugins)
    decay = {} if settings.weight_decay is None else {"weight_decay": settings.weight_decay}
    arguments = {"lr": settings.lr, **decay, **settings.kwargs}
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    try:
        found = function(groups, **arguments)
    except Exception as exc:  # the user's code can raise anything
        raise ConfigError(
            f"train.optimizer.factory: {factory} failed ({type(exc).__name__}: {exc}); it is called with torch's "
            f"parameter groups and {arguments}"
        ) from exc
    if not isinstance(found, Optimizer):
        raise ConfigError(
            f"train.optimizer.factory: {factory} returned a {type(found).__name__}; return a torch.optim.Optimizer"
        )
    if missing := len(wanted - {id(parameter) for group in found.param_groups for parameter in group["params"]}):
        raise ConfigError(
            f"train.optimizer.factory: {factory} left out {missing} of {len(wanted)} parameters, which would not be "
            "trained; give the optimizer all groups, and freeze what is not to be trained in the student"
        )
    return found


def match_memory_format(optimizer: Optimizer) -> None:
    """Lay out the state of `optimizer`, which was loaded, as its parameters are; else it would take slower loops."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_alike = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _optimizer_class(name: str) -> Any:
    if name in _TIMM_CLASSES:
        return getattr(require("timm.optim", extra="timm"), _TIMM_CLASSES[name])
    return getattr(torch.optim, _TORCH_CLASSES.get(name, name.removeprefix(_TORCH)))


def _parameter_groups(
    student: nn.Module, settings: OptimizerSettings, extra: Iterable[nn.Parameter]
) -> list[dict[str, Any]]:
    """torch's parameter groups, in the order of their first parameters."""
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(f"no parameter of the student {type(student).__qualname__} is trainable; unfreeze some")
    _check_layers(settings.lr_scale, trained)
    exempt = set(_exempt_from_decay(student))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in chain(trained.items(), (("", parameter) for parameter in extra if parameter.requires_grad)):
        layer = max((layer for layer in settings.lr_scale if is_in_layer(name, layer)), key=len, default=None)
        label, scale = ("student", 1.0) if layer is None else (f"student.{layer}", settings.lr_scale[layer])
        group: dict[str, Any] = {"lr": settings.lr * scale}
        is_exempt = parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in exempt)
        if is_exempt and not settings.decay_norm_and_bias:
            label += "/no_decay"
            group["weight_decay"] = 0.0
        groups.setdefault(label, {"name": label, "params": [], **group})["params"].append(parameter)
    return list(groups.values())


def _exempt_from_decay(student: nn.Module) -> Iterator[str]:
    """Patterns of parameter names that the student, or a network inside it, lists in `no_weight_decay()`."""
    for prefix, module in student.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            yield from (f"{prefix}.{pattern}".removeprefix(".") for pattern in listed())


def _check_layers(layers: Iterable[str], trained: Iterable[str]) -> None:
    """Refuse a layer with no trained parameter."""
    known: dict[str, None] = {}  # a set that keeps the order
    for name in trained:
        parts = name.split(".")
        known |= {".".join(parts[:depth]): None for depth in range(1, len(parts) + 1)}
    for layer in layers:
        if layer not in known:
            raise ConfigError(f"lr_scale: the student has no trained parameter in {layer!r}{suggest(layer, known)}")
