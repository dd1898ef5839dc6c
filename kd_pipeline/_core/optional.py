"""Import an optional package, or say what to install."""

import importlib
from types import ModuleType

from kd_pipeline.errors import MissingPackageError

__all__ = ["require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` of this package installs.

    Raises:
        MissingPackageError: it is not installed or does not import; the message says what to type.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingPackageError(
            f"{module} is needed here and could not be imported ({exc}); pip install 'kd_pipeline[{extra}]'"
        ) from exc
