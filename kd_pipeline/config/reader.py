"""Read a YAML file and overrides into a settings model; report everything that is wrong, and where, in one message."""

import errno
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kd_pipeline._core.files import read_regular
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.secret_values import hide_in_arguments, hide_in_text
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.text import printable
from kd_pipeline.config.compose import EXTENDS, compose
from kd_pipeline.config.yaml import Key, Place, Problem, config_error, parse, parse_override
from kd_pipeline.errors import ConfigError

__all__ = ["read_config", "read_text", "read_values"]

Model = TypeVar("Model", bound=BaseModel)

_MAX_BYTES = 2**20
_AFTER_ALL_FILES = 2**40
"""Order of overrides in a report."""
_MAX_ERRORS = 1000
"""Of pydantic, to look into; a message shows twenty."""
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
    "tuple_type": "a list",
}
"""What pydantic's error types expect, where its own message is in a programmer's terms."""


_UNION = re.compile(r"(function-\w+\[\w+\(\), |tagged-)?union\[")
"""How pydantic calls a union among the members of another one; a member of it comes next."""


def read_config(model: type[Model], path: str | PathLike[str], overrides: Sequence[str] = ()) -> Model:
    """Read the YAML file `path`, apply `overrides`, and validate the result against `model`.

    The YAML is plain data: no tags, no aliases, no duplicate keys, at most 1 MiB. Only `true` and `false` are booleans,
    and numbers are decimal without leading zeros. Everything else is text: `no`, `2020-01-01`, `010` and `1:30` stay as
    written, while `1e-3` is a number. Nothing is converted: `"12"` is not a number, and `5.0` is not a whole number.
    Relative paths stay as written, relative to the working directory, except those of `extends`: files, or presets such
    as `preset:distilbert`, that the file builds on. These paths are relative to the folder of the file that has them.
    Mappings are merged key by key, and later files win. `compose` says when a section is replaced as a whole.

    An override is `key.path=value`; `ops.0.size=32` reaches into a list. The value is a number, `true`, `false`, `null`
    or a text as it stands, with `#`, `: ` and all other signs. In brackets, braces or quotes it is YAML. Sections that
    the file does not have are created.

    Raises:
        ConfigError: every problem on its own line, in the order of the file: place, key, what was expected, what was
            found.
    """
    path = argument_path(path)
    text = read_text(path)
    if (found := compose(path, text, read_text)) is None:
        place = Place(1, f"{path}:1")
        data, _ = parse(text, lambda _: place)
        expected = f"should be a mapping with keys of {', '.join(model.model_fields)}, {_found(data)}"
        raise config_error([Problem(place, (), expected)])
    return _validated(model, *found, overrides)


def read_values(model: type[Model], values: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str) -> Model:
    """Apply `overrides` to plain `values`, as they would stand in a YAML file, and validate them as `read_config` does.

    Args:
        model: the settings.
        values: of JSON's types.
        overrides: each `key.path=value`.
        name: where the values are from, for messages.

    Raises:
        ConfigError: every problem on its own line.
    """
    return _validated(model, deepcopy(dict(values)), {(): Place(0, name)}, overrides)


def _validated(model: type[Model], data: dict[str, Any], places: dict[Key, Place], overrides: Sequence[str]) -> Model:
    for number, text in enumerate(overrides):
        _override(data, places, Place(_AFTER_ALL_FILES + number, f"override {hide_in_arguments([text])[0]!r}", text))
    try:
        # Strict JSON mode is strict about types, yet lets lists become tuples and text become paths.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as exc:
        raise config_error(_problems(exc.errors(include_url=False)[:_MAX_ERRORS], model, places)) from None


def read_text(path: Path) -> str:
    """The text of a file of at most 1 MiB.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        raw = read_regular(path, max_bytes=_MAX_BYTES)
    except OSError as exc:
        advice = "is this a config file?" if exc.errno == errno.EFBIG else "check the path"
        raise ConfigError(f"{printable(path)}: cannot be read ({exc.strerror}); {advice}") from exc
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise ConfigError(
            f"{printable(path)}:{line}: not UTF-8 (byte 0x{raw[exc.start]:02x}); save the file as UTF-8"
        ) from exc


def _override(data: dict[str, Any], places: dict[Key, Place], place: Place) -> None:
    """Apply the override at `place` to `data`, and record its keys in `places`."""
    name, equals, value = place.override.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        raise config_error([Problem(place, (), "should be key.path=value, such as data.batch_size=64")])
    if parts[0] == EXTENDS:
        raise config_error([Problem(place, (EXTENDS,), "can only stand in a file; write it into the config file")])
    key: Key = ()
    node: Any = data
    for depth, part in enumerate(parts, start=1):
        if isinstance(node, list) and part in map(str, range(len(node))):
            step: str | int = int(part)
        elif isinstance(node, dict):
            step = part
        else:
            raise config_error([Problem(place, key, f"has no {part!r} in it, {_found(node)}")])
        key = (*key, step)
        if depth == len(parts):
            for stale in [other for other in places if other[:depth] == key]:
                del places[stale]
            node[step], below = parse_override(value, place, key)
            places.update(below)
        elif isinstance(node, dict) and node.get(step) is None:
            node[step], places[key] = {}, place
        node = node[step]


class _Location(NamedTuple):
    """What a location in a pydantic error stands for."""

    key: Key
    annotation: Any
    """The type at `key`."""
    owner: Any
    """The type one level above."""
    union: Key | None
    """The last union on the way, whose members pydantic tries one by one."""


def _problems(errors: Sequence[ErrorDetails], model: type[BaseModel], places: dict[Key, Place]) -> Iterator[Problem]:
    locations = [_resolve(model, error["loc"]) for error in errors]
    # Once an error lies inside a union, one of its members matched; those that failed as a whole add nothing.
    matched = {location.union for location in locations if location.union not in (None, location.key)}
    # The same if a member took the kind of value, and refused this one.
    refused = {
        location.key
        for location, error in zip(locations, errors, strict=True)
        if error["type"] == "value_error" and location.key == location.union
    }
    expected_at: dict[Key, tuple[Any, list[str]]] = {}
    for location, error in zip(locations, errors, strict=True):
        if location.key == location.union and (
            location.union in matched or (location.key in refused and error["type"] != "value_error")
        ):
            continue
        key, value, expected = _expected(location, error)
        if expected is None:
            yield Problem(_place(key, places), key, _message(location, error))
        else:
            expected_at.setdefault(key, (value, []))[1].append(expected)
    for key, (value, parts) in expected_at.items():
        expected = " or ".join(dict.fromkeys(parts))
        place = _place(key, places)
        yield Problem(place, key, f"should be {expected}, {_found(value)}{_hint(expected, value, place)}")


def _resolve(model: type[BaseModel], loc: Sequence[str | int]) -> _Location:
    """Follow pydantic's `loc`, which also names the union members it tried, through the annotations."""
    key: Key = ()
    annotation: Any = model
    owner: Any = Any
    union = None
    for part in loc:
        if _UNION.match(str(part)):
            continue
        members = _members(annotation)
        if len(members) > 1:
            union = key
            annotation = next((member for member in members if _is_tagged(member, part)), Any)
        else:
            owner, annotation, key = members[0], _inside(members[0], part), (*key, part)
    return _Location(key, annotation, owner, union)


def _members(annotation: Any) -> list[Any]:
    """The members of a union without None; any other type alone."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for arg in get_args(annotation) if arg is not NoneType for member in _members(arg)]
    return [annotation]


def _is_tagged(member: Any, word: str | int) -> bool:
    """Whether pydantic calls the union member `member` `word`: its tag, or its class name within a validator's."""
    if not _is_model(member):
        return False
    tags = (tag for info in member.model_fields.values() for tag in get_args(info.annotation))
    return word in tags or member.__name__ in str(word)


def _inside(annotation: Any, part: str | int) -> Any:
    """The type of the value at `part` of a model, list, tuple or mapping."""
    if _is_model(annotation):
        info = annotation.model_fields.get(part)
        return info.annotation if info else Any
    args = [arg for arg in get_args(annotation) if arg is not Ellipsis] or [Any]
    return args[0] if isinstance(part, int) else args[-1]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _expected(location: _Location, error: ErrorDetails) -> tuple[Key, Any, str | None]:
    """The wrong key, the value found there, and what was expected; None where pydantic does not put it that way."""
    name = error.get("ctx", {}).get("discriminator", "").strip("'")
    if error["type"] == "union_tag_invalid" and name in error["input"]:
        return (*location.key, name), error["input"][name], f"one of {error['ctx']['expected_tags']}"
    prefix = "Input should be "
    usual = error["msg"].removeprefix(prefix) if error["msg"].startswith(prefix) else None
    return location.key, error["input"], _EXPECTED.get(error["type"], usual)


def _message(location: _Location, error: ErrorDetails) -> str:
    """What is wrong, where it is more than one value of the wrong kind."""
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden" if _is_model(location.owner):
            name, keys = str(location.key[-1]), list(location.owner.model_fields)
            if reason := getattr(location.owner, "refused_keys", {}).get(name):
                return str(reason)
            return "unknown key" + suggest(name, keys, otherwise=f"known keys: {', '.join(keys)}")
        case "union_tag_not_found":
            name = context["discriminator"].strip("'")
            tags = [tag for member in _members(location.annotation) for tag in get_args(_inside(member, name))]
            return f"has no {name}; should be one of {', '.join(map(repr, tags))}" if tags else error["msg"]
        case "value_error":
            return str(context["error"])
    return f"should {error['msg'].partition(' should ')[2]}" if " should " in error["msg"] else error["msg"]


def _found(value: Any) -> str:
    match value:
        case None:
            return "found nothing"
        case dict():
            return "found a mapping"
        case list():
            return f"found a list of {len(value)}"
        case str():
            return f"found the text {hide_in_text(value)!r:.60}"
    return f"found {json.dumps(value):.60}"


def _hint(expected: str, value: Any, place: Place) -> str:
    """How to correct `value`, or nothing."""
    if value in ("None", "none"):
        return "; write null for nothing"
    if isinstance(value, str) and "number" in expected:
        return "; write decimal digits, without quotes or leading zeros"
    if isinstance(value, str):
        return suggest(value, re.findall(r"'([^']*)'", expected), otherwise="")
    if "text" not in expected or not isinstance(value, bool | int | float):
        return ""
    name, _, typed = place.override.partition("=")
    if not typed or typed.strip()[0] in "[{":
        return "; put it in quotes"
    quoted = f'{name}="{typed.strip()}"'
    return f"; put it in quotes that the shell keeps: {shlex.quote(quoted)}"


def _place(key: Key, places: dict[Key, Place]) -> Place:
    """The place of `key`, or of the closest section around it that the file has."""
    while key not in places:
        key = key[:-1]
    return places[key]
