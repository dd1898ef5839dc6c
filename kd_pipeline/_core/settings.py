"""Base class of all settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator

from kd_pipeline._core.paths import local_path

__all__ = ["Settings"]


class Settings(BaseModel):
    """Frozen, validated values from a config file; unknown keys are errors. Subclasses are next to their code.

    `~` is expanded in every path, and URLs and variables such as `$DATA` are refused in every path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    refused_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that are no settings on purpose, and why; for the message about an unknown key."""

    @field_validator("*", mode="after")
    @classmethod
    def _read_paths(cls, value: Any) -> Any:
        return _with_local_paths(value)


def _with_local_paths(value: Any) -> Any:
    """`value` with every path in it as `local_path` reads it."""
    match value:
        case Path():
            return local_path(value)
        case tuple() if any(isinstance(item, Path | tuple | dict) for item in value):
            return tuple(_with_local_paths(item) for item in value)
        case dict() if any(isinstance(item, Path | tuple | dict) for item in value.values()):
            return {key: _with_local_paths(item) for key, item in value.items()}
    return value
