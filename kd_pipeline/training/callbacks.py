"""Callbacks of Lightning that a config names."""

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import Field

from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import ConfigError

__all__ = ["CallbackSettings", "open_callbacks"]


class CallbackSettings(Settings):
    """A callback of a run."""

    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")
    """A class or function that returns a callback of Lightning, as `package.module:function`."""
    kwargs: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Its arguments."""


def open_callbacks(settings: Sequence[CallbackSettings], *, plugins: Collection[str]) -> list[Any]:
    """The callbacks that `settings` describe, new ones.

    Args:
        settings: of the callbacks.
        plugins: modules that they may come from.

    Raises:
        ConfigError: one is not allowed, does not exist or fails.
    """
    return [_open(each, f"train.callbacks[{number}]", plugins) for number, each in enumerate(settings)]


def _open(settings: CallbackSettings, key: str, plugins: Collection[str]) -> Any:
    function = import_function(f"{key}.factory", settings.factory, plugins)
    try:
        return function(**settings.kwargs)
    except Exception as exc:  # the user's code can raise anything
        raise ConfigError(
            f"{key}.factory: {settings.factory} failed ({type(exc).__name__}: {exc}); it is called with the kwargs "
            f"{settings.kwargs}"
        ) from exc
