"""Validation by a function of the user's own, whose numbers take the place of the built-in metrics."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.progress import timed
from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import SCALARS, Evaluation, only_metrics
from kd_pipeline.evaluation.predictions import Predictions
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.modules import eval_mode
from kd_pipeline.workflows.parts import Validate, qualified_name
from kd_pipeline.workflows.validation import Bar

__all__ = ["OwnEvaluator", "open_validate"]


def open_validate(config: Config, own: Validate | None, *, plugins: Collection[str]) -> Validate | None:
    """The function that validates: the object, or the one that `train.validate` names; None for the built-in metrics.

    Raises:
        ConfigError: both are given, the function does not exist or is not allowed, or does not take two arguments.
    """
    named = config.train.validate
    if own is not None and named is not None:
        raise ConfigError("two functions validate: the argument validate and train.validate; leave out one of them")
    found = own if named is None else import_function("train.validate", named, plugins)
    if found is None:
        return None
    try:
        inspect.signature(found).bind(None, None)
    except TypeError:
        raise ConfigError(
            f"validate: {qualified_name(found)} should take the student and the loaders by name: validate(model, "
            "loaders)"
        ) from None
    except ValueError:  # of a built-in, which has no signature
        pass
    if config.train.metrics:
        raise ConfigError(
            "train.metrics are part of the built-in validation, which a function of your own replaces; remove them, or "
            "measure them in the function"
        )
    return found


class OwnEvaluator:
    """Calls the function on all ranks, each with its shard of the splits; the numbers of rank zero count."""

    def __init__(self, function: Validate, open_loader: Callable[[str], AnyLoader]) -> None:
        """Evaluate by `function` on the loaders of `open_loader`."""
        self._function, self._open_loader = function, open_loader
        self.predictions: dict[str, Predictions] = {}
        """None, as only the function knows them."""

    def evaluate(
        self,
        model: nn.Module,
        distillation: Distillation,
        splits: Collection[str],
        *,
        compare: bool = False,
        with_probe: bool = False,
        bar: Bar = timed,
    ) -> dict[str, Evaluation]:
        """The numbers by split, or by what a name has in front of a `/`; the arguments are those of `StageEvaluator`.

        The split `test` is evaluated in a call of its own.

        Raises:
            ConfigError: the function does not return numbers by name.
        """
        found: dict[str, Evaluation] = {}
        for place, names in (("val", [name for name in splits if name != "test"]), ("test", ["test"])):
            loaders = {name: self._open_loader(name) for name in names if name in splits}
            if not loaders:
                continue
            with bar(f"validation on {', '.join(loaders)}"), eval_mode(model), torch.no_grad():
                returned = self._function(model, loaders)
            for split, numbers in _by_split(returned, place, self._function).items():
                if split in found:
                    raise ConfigError(
                        f"{_name(self._function)} returned numbers of {split!r} for the validation sets and for "
                        "test; name those of test after the loaders that it gets"
                    )
                found[split] = _evaluation(numbers)
        return found


def _by_split(returned: Any, place: str, function: Validate) -> dict[str, dict[str, float]]:
    """Numbers by split and name.

    Raises:
        ConfigError: they are no numbers, there are none, or two have one name.
    """
    name = _name(function)
    if not isinstance(returned, Mapping) or not returned:
        found = "an empty mapping" if isinstance(returned, Mapping) else type(returned).__qualname__
        raise ConfigError(f"{name} should return numbers by name, such as {{'wer': 0.1}}, got {found}")
    splits: dict[str, dict[str, float]] = {}
    for key, value in returned.items():
        if not isinstance(key, str) or not key or printable(key) != key:
            raise ConfigError(f"{name} should name its numbers with printable characters, got {key!r}")
        front, _, rest = key.rpartition("/")
        split, metric = (place, key) if not front or not rest else key.split("/", 1)
        numbers = splits.setdefault(split, {})
        if metric in numbers:
            raise ConfigError(f"{name} returned {split}/{metric} twice, also as {metric!r}; leave out one of them")
        numbers[metric] = _number(name, key, value)
    return splits


def _number(function: str, key: str, value: Any) -> float:
    is_scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (is_scalar or isinstance(value, Real)):
        shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
        raise ConfigError(
            f"{function} should return numbers by name, got {type(value).__qualname__}{shape} for {key!r}"
        )
    return float(value)


def _evaluation(numbers: Mapping[str, float]) -> Evaluation:
    """Numbers of one split; how many samples they are of is not known."""
    known: dict[str, Any] = {name: value for name, value in numbers.items() if name in SCALARS}
    others = {name: value for name, value in numbers.items() if name not in SCALARS}
    return replace(only_metrics(others, num_samples=0), **known)


def _name(function: Validate) -> str:
    return f"validate: {qualified_name(function)}"
