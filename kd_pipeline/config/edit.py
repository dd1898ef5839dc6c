"""Change settings in the text of a YAML file: comments, order and everything else stay as they are."""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import yaml
from pydantic import ValidationError

from kd_pipeline._core.paths import argument_path
from kd_pipeline.config.compose import compose
from kd_pipeline.config.config import Config
from kd_pipeline.config.reader import read_text
from kd_pipeline.config.yaml import Place, parse
from kd_pipeline.errors import ConfigError

__all__ = ["edited_config"]


def edited_config(path: str | PathLike[str], values: Mapping[str, bool | int | float | str | None]) -> str:
    """The text of the config file `path` with `values` in place of what it has for these keys.

    The files that it extends stay as they are: a value of theirs is overridden in `path`.

    Args:
        path: a config file.
        values: by key of two names, such as `data.num_threads`; a section that the file does not have is added.

    Raises:
        ConfigError: the file cannot be read or is no config, or a value does not go with the others in it; says which
            lines to add by hand.
    """
    path = argument_path(path)
    text = read_text(path)
    wanted, _ = parse(text, lambda line: Place(line, f"{path}:{line}"))
    by_hand = ", ".join(f"{key}: {_written(value)}" for key, value in values.items())
    try:
        for key, value in values.items():
            section, _, name = key.partition(".")
            text = _with_value(text, section, name, _written(value))
            wanted[section] = (wanted.get(section) or {}) | {name: value}
        found, _ = parse(text, lambda line: Place(line, f"{path}:{line}"))
        composed = compose(path, text, read_text)
        Config.model_validate_json(json.dumps(None if composed is None else composed.data), strict=True)
    except (ConfigError, ValidationError, TypeError, AttributeError) as exc:
        found, reason = None, f" ({exc})" if isinstance(exc, ConfigError) else ""
    else:
        reason = ""
    if found != wanted:
        raise ConfigError(f"{path}: its settings cannot be changed by themselves{reason}; write into it {by_hand}")
    return text


def _with_value(text: str, section: str, name: str, value: str) -> str:
    """`text` with `value` at the key `name` of `section`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    node = _child(root, section)
    if node is None and not root.flow_style:
        return f"{text.rstrip()}\n\n{section}:\n  {name}: {value}\n"
    if node is None or isinstance(node, yaml.ScalarNode):  # a section that is null
        return _with_entry(text, root, section, f"{{{name}: {value}}}")
    return _with_entry(text, node, name, value)


def _with_entry(text: str, mapping: Any, name: str, value: str) -> str:
    """`text` with `value` at the key `name` of `mapping`; a new key becomes the first."""
    old = _child(mapping, name)
    if old is not None:
        start, end = old.start_mark.index, old.end_mark.index
        space = "" if text[start - 1].isspace() else " "  # after `name:` alone
        return f"{text[:start]}{space}{value}{text[end:]}"
    start = mapping.start_mark.index
    if mapping.flow_style:
        comma = ", " if mapping.value else ""
        return f"{text[: start + 1]}{name}: {value}{comma}{text[start + 1 :]}"
    indent = " " * mapping.start_mark.column
    return f"{text[:start]}{name}: {value}\n{indent}{text[start:]}"


def _child(mapping: Any, name: str) -> Any:
    return next((value for key, value in mapping.value if key.value == name), None)


def _written(value: bool | int | float | str | None) -> str:
    return value if isinstance(value, str) else json.dumps(value)
