"""Base class of all settings."""

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator

from kd_pipeline._core.paths import local_path
from kd_pipeline.errors import ConfigError

__all__ = ["Settings", "require_config"]


class Settings(BaseModel):
    """Frozen, validated values from a config file; unknown keys are errors. Subclasses are next to their code.

    `~` is expanded in every path, and URLs and variables such as `$DATA` are refused in every path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    refused_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that are no settings on purpose, and why; for the message about an unknown key."""

    @classmethod
    def docstring_of(cls, field: str) -> str:
        """The docstring of a field; empty if it has none, or there is no source code to read it from."""
        for base in cls.__mro__:
            if field in vars(base).get("__annotations__", {}):
                return _field_docstrings(base).get(field, "")
        return ""

    @field_validator("*", mode="after")
    @classmethod
    def _read_paths(cls, value: Any) -> Any:
        return _with_local_paths(value)


def require_config(config: object) -> None:
    """Refuse what stands for a config by mistake: its file, or a mapping.

    Raises:
        ConfigError: it does.
    """
    if not isinstance(config, str | PathLike | Mapping | None):
        return
    if isinstance(config, str | PathLike):
        advice = f"read the file with kd_pipeline.load_config({fspath(config)!r})"
    else:
        advice = "make one with kd_pipeline.Config(...), or of a file with kd_pipeline.load_config(path)"
    raise ConfigError(f"config should be a Config, got {type(config).__qualname__}; {advice}")


@cache
def _field_docstrings(model: type) -> dict[str, str]:
    """By field. Read when it is needed: pydantic's own way reads the code of every class while it is imported."""
    try:
        (code,) = ast.parse(dedent(inspect.getsource(model))).body
    except OSError:
        return {}
    assert isinstance(code, ast.ClassDef)
    found = {}
    for field, docstring in pairwise(code.body):
        match field, docstring:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


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
