"""Lazy imports: of a package's public names (PEP 562), and of a module that others import and hardly ever use."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["lazy_exports", "postpone_import"]


def lazy_exports(
    package: str, exports: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of `package`, which imports a name when it is first used.

    Args:
        package: its `__name__`.
        exports: names by the module that defines them. The module `package.name` is itself the name `name`.
    """
    modules = {name: module for module, names in exports.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(modules[name])
        return module if module.__name__ == f"{package}.{name}" else getattr(module, name)

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return getattr_, dir_, sorted(modules)


@contextmanager
def postpone_import(name: str, *, attributes: Iterable[str] = ()) -> Iterator[None]:
    """Let the code in this context `import name` at no cost, until it uses the module.

    After the context, `name` is as if it had not been imported, unless it was used. Python's own `LazyLoader` imports
    a module when it is asked whether it has a function, and leaves its substitute in `sys.modules`.

    Args:
        name: the module; its parent is imported.
        attributes: functions and classes that code may take from the module without using it yet: to call one, or to
            take something from it, uses the module.
    """
    spec = None if name in sys.modules else _find(name)
    if spec is None:
        yield
        return
    substitute = _Substitute(name)
    # Known without the import: `inspect` asks every module for its file.
    substitute.__spec__, substitute.__loader__, substitute.__file__ = spec, spec.loader, spec.origin
    if spec.submodule_search_locations is not None:
        substitute.__path__ = [*spec.submodule_search_locations]  # which `from package import name` asks for
    for attribute in attributes:
        setattr(substitute, attribute, _Attribute(name, attribute))
    sys.modules[name] = substitute
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, substitute)
    try:
        yield
    finally:
        _remove_substitute(name)


class _Substitute(ModuleType):
    """Takes every attribute from the module itself, which it imports for that."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_import_itself(self.__name__), attribute)


class _Attribute:
    """Stands for a function or class of a postponed module."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_import_itself(self._module), self._name)(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(_import_itself(self._module), self._name), attribute)


def _find(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except ModuleNotFoundError:  # the parent
        return None


def _import_itself(name: str) -> ModuleType:
    _remove_substitute(name)
    return import_module(name)


def _remove_substitute(name: str) -> None:
    if isinstance(sys.modules.get(name), _Substitute):
        del sys.modules[name]
    parent, _, child = name.rpartition(".")
    if parent and isinstance(vars(sys.modules[parent]).get(child), _Substitute):
        delattr(sys.modules[parent], child)
