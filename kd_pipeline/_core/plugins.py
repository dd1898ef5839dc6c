"""The user's own functions by name, from modules that the user has allowed to run."""

import importlib
from collections.abc import Callable, Collection
from typing import Any

from kd_pipeline.errors import ConfigError

__all__ = ["import_function"]


def import_function(key: str, path: str, plugins: Collection[str], *, caller: str) -> Callable[..., Any]:
    """The function at `path`, written `package.module:function`.

    A config file is data and cannot allow code to run by itself, so that the module must be among `plugins`, which
    come from what the user typed.

    Args:
        key: the setting that names it, for messages.
        path: where it is.
        plugins: names of the modules that may run.
        caller: what takes `plugins` in Python, for messages.

    Raises:
        ConfigError: its module is not allowed or cannot be imported, or has no such function.
    """
    name, _, function = path.partition(":")
    if name not in plugins:
        raise ConfigError(
            f"{key}: {path} would run code of the module {name}; allow it with --plugin {name} on the command line, or "
            f'{caller}(..., plugins=["{name}"])'
        )
    try:
        module = importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(f"the plugin {name} cannot be imported ({exc}); add its folder to PYTHONPATH") from exc
    except Exception as exc:  # it is the user's own code
        raise ConfigError(f"the plugin {name} cannot be imported ({type(exc).__name__}: {exc}); correct it") from exc
    found: object = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{module.__file__} has no function called {function!r}; correct {key}: {path}")
    return found
