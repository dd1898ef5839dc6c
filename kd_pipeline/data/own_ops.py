"""Ops of the user's own: functions that add nodes to DALI's graph, and the random numbers that they are given."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from kd_pipeline._core.optional import require
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.auto_augment import Array, Node
from kd_pipeline.errors import ConfigError

__all__ = ["FactoryOp", "OwnOp"]


class OwnOp(Settings):
    """An op of your own, among those of `order`: `factory(images, *numbers, **kwargs)`, which returns the new images.

    `images` is a DALI node of uint8 images HWC of the view's size, before they are normalized and flipped, and so is
    what is returned: on the GPU if the loader is for one. Each of `numbers` is a node of one float32 from 0 to 1, 1
    excluded, always on the CPU as DALI's named arguments must be. They are pure functions of (seed, epoch, index, view,
    `name`), and an op must draw no others, or a resumed run would not see the same images. The function is called once
    for each graph that is built.
    """

    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")
    """The function, as `package.module:function`. Its module is allowed by `--plugin` or, in Python, `plugins=`."""
    name: str | None = None
    """Whose random numbers it gets; defaults to `factory`. Two ops of one function need different names."""
    num_draws: int = Field(default=0, ge=0, le=64)
    """Random numbers for each image."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Share of the images that it is applied to. That is decided by a number besides those of the function."""
    changes: Literal["colors", "positions"] = "colors"
    """`colors` if every pixel stays where it is: a view that follows with `color: own` draws it again, one with
    `color: none` goes without it, and masks stay as they are. `positions` if it moves pixels: views that follow always
    do the same, with the same numbers, and masks are refused."""
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """More arguments of the function."""

    @property
    def key(self) -> str:
        """The name of its random numbers."""
        return self.name or self.factory

    @property
    def num_columns(self) -> int:
        """Random numbers for each image, with the one that decides whether it is applied."""
        return 1 + self.num_draws


@dataclass(frozen=True)
class FactoryOp:
    """An op of the user's own as a view has it."""

    settings: OwnOp
    columns: slice
    """Its numbers among those of the view, after which there may be those of other ops; counted from the last."""
    function: Callable[..., Any] | None = field(default=None, compare=False)
    """None until `opened`."""

    @classmethod
    def after(cls, all_settings: list[OwnOp]) -> list["FactoryOp"]:
        """Ops with numbers one after the other, at the end of those of the view."""
        start, ops = -sum(each.num_columns for each in all_settings), []
        for each in all_settings:
            stop = start + each.num_columns
            ops.append(cls(each, slice(start, stop or None)))
            start = stop
        return ops

    @property
    def key(self) -> str:
        """The name of its random numbers, among those of all ops."""
        return f"op {self.settings.key}"

    @property
    def num_columns(self) -> int:
        """Random numbers for each image."""
        return self.settings.num_columns

    @property
    def ndims(self) -> tuple[int, ...]:
        """Dimensions per sample of each array that `apply` takes."""
        return (1,) if self.settings.num_draws or self._is_random else ()

    @property
    def _is_random(self) -> bool:
        """Whether it is not applied to all images."""
        return self.settings.probability < 1

    def opened(self, key: str, plugins: Collection[str]) -> "FactoryOp":
        """The same with its function.

        Args:
            key: the setting that names it, for messages.
            plugins: modules that it may come from.

        Raises:
            ConfigError: the module is not allowed or cannot be imported, or has no such function of its own.
        """
        return replace(self, function=import_function(key, self.settings.factory, plugins))

    def parameters(self, draws: Array) -> tuple[Array, ...]:
        """Whether it is applied, unless it always is, and the numbers of the function, `[N, ...]` in one array."""
        own = draws[:, self.columns]
        numbers = own[:, 1:]
        if self._is_random:
            numbers = np.concatenate([own[:, :1] < self.settings.probability, numbers], axis=1)
        return (numbers,) if self.ndims else ()

    def apply(self, images: Node, parameters: Node = None) -> Node:
        """Apply the function to uint8 images.

        Raises:
            ConfigError: it fails, or returns no node.
        """
        first = int(self._is_random)
        numbers = [parameters[first + place] for place in range(self.settings.num_draws)]
        if not self._is_random:
            return self.call(images, *numbers)
        # What DALI makes of an `if`: the function gets those of the batch that drew it.
        conditional = _fn()._conditional
        is_applied = parameters[0] > 0.5
        forks = [conditional.split(node, predicate=is_applied, _if_stmt=True) for node in (images, *numbers)]
        changed = self.call(*(fork[0] for fork in forks))
        return conditional.merge(changed, forks[0][1], predicate=is_applied)

    def call(self, images: Node, *numbers: Node) -> Node:
        """What the function returns, as HWC.

        Raises:
            ConfigError: it fails, or returns no node.
        """
        assert self.function is not None
        settings = self.settings
        try:
            changed = self.function(images, *numbers, **settings.kwargs)
        except Exception as exc:  # the user's code can raise anything
            raise ConfigError(
                f"the op {settings.factory} failed ({type(exc).__name__}: {exc}); it is called with a DALI node of "
                f"images, {settings.num_draws} of random numbers (num_draws) and the kwargs {settings.kwargs}"
            ) from exc
        if not isinstance(changed, type(images)):
            raise ConfigError(
                f"the op {settings.factory} returned a {type(changed).__name__}; return the DALI node of the images"
            )
        # Some of DALI's ops do not say what their dimensions are.
        return _fn().reshape(changed, layout="HWC")


def _fn() -> Any:
    return require("nvidia.dali.fn", extra="cpu")
