"""From parsed arguments to a room's settings, with errors that name the option."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kd_pipeline.errors import ConfigError

__all__ = ["checked"]

Model = TypeVar("Model", bound=BaseModel)


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
