"""What the commands share: options, a room's settings out of them, and lines of progress."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kd_pipeline.errors import ConfigError

__all__ = ["add_config", "checked", "tell"]

Model = TypeVar("Model", bound=BaseModel)


def add_config(parser: argparse.ArgumentParser, *, plugins: str = "factories") -> None:
    """The options of a command that does what a config says; `plugins` is what modules of the user's bring to it."""
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the YAML file")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help=f"brings {plugins}")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the file")


def tell(line: str) -> None:
    """Show a line of progress, beside what a command prints as its result."""
    print(line, file=sys.stderr, flush=True)


def checked(model: Callable[..., Model], options: Mapping[str, str] | None = None, /, **values: Any) -> Model:
    """`model(**values)`, where a value that it refuses is an error of the option of that name.

    Args:
        model: the settings.
        options: the option by field, where its name is another one.
        values: what was typed.

    Raises:
        ConfigError: what is wrong with which option.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            if each["type"] == "value_error":
                problems.append(str(each["ctx"]["error"]))
            else:
                field = str(each["loc"][0])
                option = (options or {}).get(field, field.replace("_", "-"))
                problems.append(f"--{option}: {each['msg']}, got {each['input']!r}")
        raise ConfigError("; ".join(problems)) from None
