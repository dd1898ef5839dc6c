"""What a run was started with: its command, the machine, and the versions of all packages."""

import os
import platform
import shlex
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kd_pipeline._core.secret_values import hide_in_arguments, hide_in_settings

__all__ = ["command_line", "describe_environment", "shown_settings"]

_NAMES_OF_LAYERS = "student_from_teacher"
"""Its keys are names of layers, such as `cls_token`."""


def command_line() -> str:
    """The command of this process, as one would type it, with secrets hidden."""
    name, *arguments = sys.argv[:1] + hide_in_arguments(sys.argv[1:])
    program = Path(name).name
    if program == "__main__.py":  # python -m package
        program = f"python -m {Path(name).parent.name}"
        return shlex.join([*program.split(), *arguments])
    return shlex.join(["python", name, *arguments] if program.endswith(".py") else [program, *arguments])


def shown_settings(config: BaseModel, *, exclude_none: bool = False) -> dict[str, Any]:
    """The plain values of a config for files and services that others may read: without secrets.

    `exclude_none` leaves out the settings that are None by default, and so None again where they are read.
    """
    settings = config.model_dump(mode="json")
    if exclude_none:
        settings = _without_default_nones(config, settings)
    layers = {key: value for key, value in settings.items() if key == _NAMES_OF_LAYERS}
    shown: dict[str, Any] = hide_in_settings(settings)
    return shown | layers


def _without_default_nones(value: Any, dumped: Any) -> Any:
    """`dumped`, the plain values of `value`; a setting that is None although that is not its default stays."""
    match value, dumped:
        case BaseModel(), dict():
            fields = type(value).model_fields
            return {
                name: _without_default_nones(getattr(value, name), plain)
                for name, plain in dumped.items()
                if plain is not None or fields[name].default is not None
            }
        case dict(), dict():
            return {key: _without_default_nones(value.get(key), plain) for key, plain in dumped.items()}
        case ((list() | tuple()), list()):
            return [_without_default_nones(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


def describe_environment() -> dict[str, Any]:
    """Command, folder, machine, and the version of every installed package; no environment variables."""
    packages = {name: version for each in distributions() for name, version in _name_and_version(each)}
    return {
        "command": [sys.executable, *sys.argv[:1], *hide_in_arguments(sys.argv[1:])],
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda each: each[0].lower())),
    }


def _name_and_version(package: Distribution) -> Iterator[tuple[str, str]]:
    """Nothing for a damaged package. `package.metadata` would also parse the description, which is a whole README."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    header = text.partition("\n\n")[0]
    fields = dict(line.split(": ", 1) for line in header.splitlines() if line.startswith(("Name: ", "Version: ")))
    if "Name" in fields and "Version" in fields:
        yield fields["Name"], fields["Version"]
