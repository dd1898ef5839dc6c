"""Imports of optional packages."""

import importlib
from types import ModuleType

from kd_pipeline.errors import MissingPackageError

__all__ = ["require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which `pip install 'kd_pipeline[extra]'` installs.

    Raises:
        MissingPackageError: it cannot be imported; the message holds the `pip install` line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingPackageError(
            f"{module} is needed here and could not be imported ({exc}); pip install 'kd_pipeline[{extra}]'"
        ) from exc
