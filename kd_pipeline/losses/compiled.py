"""The losses of this package by name, as they are or by `torch.compile`."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from kd_pipeline import losses
from kd_pipeline._core.torch_compile import torch_compile

__all__ = ["CompiledLosses", "LossFunctions", "loss_by_name"]

LossFunctions = Callable[[str], Callable[..., Tensor]]
"""Finds a loss by its name in `kd_pipeline.losses`."""


def loss_by_name(name: str) -> Callable[..., Tensor]:
    """The function as it is."""
    found: Callable[..., Tensor] = getattr(losses, name)
    return found


class CompiledLosses:
    """Compiles a loss when it is first called, for those shapes and options alone: other calls run without it.

    So a smaller last batch, or a temperature that changes, compiles nothing again. Results differ in their last digits.
    """

    def __init__(self) -> None:
        self._num_rows: int | None = None
        self._compiled: dict[Any, tuple[Any, Callable[..., Tensor]]] = {}

    def __call__(self, name: str) -> Callable[..., Tensor]:
        """The loss `name`, compiled where that has been or can be done."""
        return partial(self._call, name)

    def _call(self, name: str, student: Tensor, *others: Any, **options: Any) -> Tensor:
        function = loss_by_name(name)
        if self._num_rows is None:
            self._num_rows = len(student)
        if len(student) != self._num_rows:
            return function(student, *others, **options)
        given = {**{str(number): each for number, each in enumerate(others)}, **options}
        shapes = tuple((key, each.shape) for key, each in given.items() if isinstance(each, Tensor))
        plain = {key: each for key, each in given.items() if not isinstance(each, Tensor)}
        key = name, student.shape, shapes
        if key not in self._compiled:
            self._compiled[key] = plain, torch_compile(function)
            with warnings.catch_warnings():
                # Torch looks at the gradient of its inputs when it compiles, and warns that they are no leaves.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
                return self._compiled[key][1](student, *others, **options)
        known, compiled = self._compiled[key]
        return (compiled if known == plain else function)(student, *others, **options)
