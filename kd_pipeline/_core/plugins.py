"""Import the user's functions by name, from modules that the user has allowed."""

import importlib
from collections.abc import Callable, Collection
from typing import Any

from kd_pipeline.errors import ConfigError

__all__ = ["import_function"]


def import_function(key: str, path: str, plugins: Collection[str]) -> Callable[..., Any]:
    """Import the function at `path`, which is `package.module:function`.

    A config file is data and must not run code by itself. The module must therefore be among `plugins`, which the user
    gives on the command line or in Python.

    Args:
        key: the setting that names the function, for messages.
        path: the function.
        plugins: names of the allowed modules.

    Raises:
        ConfigError: the module is not allowed or cannot be imported, or has no such function.
    """
    name, _, function = path.partition(":")
    if name not in plugins:
        raise ConfigError(
            f"{key}: {path} would run code of the module {name}; allow it with --plugin {name} on the command line, or "
            f'plugins=["{name}"] in Python'
        )
    try:
        module = importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(f"the plugin {name} cannot be imported ({exc}); add its folder to PYTHONPATH") from exc
    except Exception as exc:  # the user's code can raise anything
        raise ConfigError(f"the plugin {name} cannot be imported ({type(exc).__name__}: {exc}); correct it") from exc
    found: object = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{module.__file__} has no function called {function!r}; correct {key}: {path}")
    return found
