"""Import the user's functions by name, from modules that the user has allowed."""

import importlib
from collections.abc import Callable, Collection
from types import FunctionType, ModuleType
from typing import Any

from kd_pipeline.errors import ConfigError

__all__ = ["import_function"]


def import_function(key: str, path: str, plugins: Collection[str]) -> Callable[..., Any]:
    """Import the function at `path`, which is `package.module:function`.

    A config file is data and must not run code by itself. The module must therefore be among `plugins`, which the user
    gives on the command line or in Python. What the module has only imported, such as `torch.load`, is not allowed
    along with it: a function counts if it is defined there, or listed in the module's `__all__`.

    Args:
        key: the setting that names the function, for messages.
        path: the function.
        plugins: names of the allowed modules.

    Raises:
        ConfigError: the module is not allowed or cannot be imported, or has no such function of its own.
    """
    name, _, function = path.partition(":")
    if name not in plugins:
        raise ConfigError(
            f"{key}: {path} would run code of the module {name}; allow it with --plugin {name} on the command line, or "
            f'plugins=["{name}"] in Python'
        )
    if function.startswith("_"):
        raise ConfigError(f"{key}: {path} is private to its module; name a function without an underscore in front")
    try:
        module = importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(f"the plugin {name} cannot be imported ({exc}); add its folder to PYTHONPATH") from exc
    except Exception as exc:  # the user's code can raise anything
        raise ConfigError(f"the plugin {name} cannot be imported ({type(exc).__name__}: {exc}); correct it") from exc
    found: object = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{module.__file__} has no function called {function!r}; correct {key}: {path}")
    if not _is_own(found, function, module):
        raise ConfigError(
            f"{key}: {path} is not defined in {module.__file__}; define a function there that calls it, or list "
            f"{function!r} in its __all__"
        )
    return found


def _is_own(found: Callable[..., Any], name: str, module: ModuleType) -> bool:
    """Whether `module` defines `found`, or lists its name in `__all__`."""
    listed = getattr(module, "__all__", ())
    if isinstance(listed, list | tuple) and name in listed:
        return True
    # Any other object has the `__module__` of its class, which says nothing about what it calls.
    is_definition = isinstance(found, type | FunctionType)
    return is_definition and found.__module__ == module.__name__
