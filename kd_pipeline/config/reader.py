"""Read a YAML file and overrides into a settings model, or say in one message what is wrong and where."""

import json
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.config.yaml import Key, Place, Problem, failure, parse
from kd_pipeline.errors import ConfigError

__all__ = ["read_config"]

Model = TypeVar("Model", bound=BaseModel)

_MAX_BYTES = 2**20
_WISHES = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
    "tuple_type": "a list",
}
"""What should be there, by pydantic's type of error, where its own words are a programmer's."""


def read_config(model: type[Model], path: str | PathLike[str], overrides: Sequence[str] = ()) -> Model:
    """Read the YAML file `path`, change it by `overrides` and check it against `model`.

    The YAML is plain data: no tags, no aliases, no key twice, at most 1 MiB. Only `true` and `false` are booleans, and
    numbers are decimal without leading zeros; all else is text: `no`, `2020-01-01`, `010` and `1:30` stay as they are
    written, while `1e-3` is a number. No value becomes another type: `"12"` is not a number, `5.0` not a whole number.
    Relative paths stay as they are written, relative to the working directory.

    An override is `key.path=value` with the value in YAML; `ops.0.size=32` reaches into a list. Sections that the file
    leaves out are made on the way.

    Raises:
        ConfigError: every problem on a line of its own, in the order of the file: place, key, what was expected, what
            was found.
    """
    path = Path(path)
    data, places = parse(_read_text(path), lambda line: Place(line, f"{path}:{line}"))
    if not isinstance(data, dict):
        text = f"should be a mapping with keys of {', '.join(model.model_fields)}, {_found(data)}"
        raise failure([Problem(places[()], (), text)])
    for number, text in enumerate(overrides):
        _override(data, places, text, Place(_MAX_BYTES + number, f"override {text!r}"))
    try:
        # Strict JSON is strict about types, yet lets lists become tuples and texts become paths.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as exc:
        raise failure(_problems(exc.errors(include_url=False), model, places)) from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror}); check the path") from exc
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes; is this a config file?")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte 0x{raw[exc.start]:02x}); save the file as UTF-8") from exc


def _override(data: dict[str, Any], places: dict[Key, Place], text: str, place: Place) -> None:
    """Put the value of the override `text` into `data`, and its place into `places`."""
    name, equals, value = text.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        raise failure([Problem(place, (), "should be key.path=value, such as data.batch_size=64")])
    key: Key = ()
    node: Any = data
    for depth, part in enumerate(parts, start=1):
        if isinstance(node, list) and part in map(str, range(len(node))):
            step: str | int = int(part)
        elif isinstance(node, dict):
            step = part
        else:
            raise failure([Problem(place, key, f"has nothing called {part!r} in it, {_found(node)}")])
        key = (*key, step)
        if depth == len(parts):
            for stale in [other for other in places if other[:depth] == key]:
                del places[stale]
            node[step], below = parse(value, lambda _: place, key)
            places.update(below)
        elif isinstance(node, dict) and node.get(step) is None:
            node[step], places[key] = {}, place
        node = node[step]


class _Spot(NamedTuple):
    """What pydantic's location of an error means."""

    key: Key
    annotation: Any
    """What is expected at `key`."""
    owner: Any
    """What is expected one level above."""
    choice: Key | None
    """Where the last union on the way was, whose members pydantic tries one by one."""


def _problems(errors: Sequence[ErrorDetails], model: type[BaseModel], places: dict[Key, Place]) -> Iterator[Problem]:
    spots = [_spot(model, error["loc"]) for error in errors]
    # Where one member of a union fits well enough to complain about its inside, the others have nothing to add.
    fitting = {spot.choice for spot in spots if spot.choice is not None and spot.key != spot.choice}
    wanted: dict[Key, tuple[Any, list[str]]] = {}
    for spot, error in zip(spots, errors, strict=True):
        if spot.key == spot.choice and spot.choice in fitting:
            continue
        key, value, wish = _wish(spot, error)
        if wish is None:
            yield Problem(_place(key, places), key, _statement(spot, error))
        else:
            wanted.setdefault(key, (value, []))[1].append(wish)
    for key, (value, wishes) in wanted.items():
        wish = " or ".join(dict.fromkeys(wishes))
        yield Problem(_place(key, places), key, f"should be {wish}, {_found(value)}{_hint(wish, value)}")


def _spot(model: type[BaseModel], location: Sequence[str | int]) -> _Spot:
    """Follow pydantic's location, which also names the members of unions that it tried, through the types."""
    key: Key = ()
    annotation: Any = model
    owner: Any = Any
    choice = None
    for part in location:
        members = _members(annotation)
        if len(members) > 1:
            choice = key
            annotation = next((member for member in members if _is_called(member, part)), Any)
        else:
            owner, annotation, key = members[0], _inside(members[0], part), (*key, part)
    return _Spot(key, annotation, owner, choice)


def _members(annotation: Any) -> list[Any]:
    """The types that a union is made of, without None; other types alone."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for arg in get_args(annotation) if arg is not NoneType for member in _members(arg)]
    return [annotation]


def _is_called(member: Any, word: str | int) -> bool:
    """Whether pydantic means the union member `member` by `word`: its tag, or its name with what validates it."""
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


def _wish(spot: _Spot, error: ErrorDetails) -> tuple[Key, Any, str | None]:
    """The key that is wrong, what was found there, and what should be there, where pydantic puts it in such words."""
    name = error.get("ctx", {}).get("discriminator", "").strip("'")
    if error["type"] == "union_tag_invalid" and name in error["input"]:
        return (*spot.key, name), error["input"][name], f"one of {error['ctx']['expected_tags']}"
    usual = "Input should be "
    words = error["msg"].removeprefix(usual) if error["msg"].startswith(usual) else None
    return spot.key, error["input"], _WISHES.get(error["type"], words)


def _statement(spot: _Spot, error: ErrorDetails) -> str:
    """What is wrong, where it is not the value alone."""
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden" if _is_model(spot.owner):
            keys = list(spot.owner.model_fields)
            return "unknown key" + suggest(str(spot.key[-1]), keys, otherwise=f"known keys: {', '.join(keys)}")
        case "union_tag_not_found":
            name = context["discriminator"].strip("'")
            tags = [tag for member in _members(spot.annotation) for tag in get_args(_inside(member, name))]
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
            return f"found the text {value!r:.60}"
    return f"found {json.dumps(value):.60}"


def _hint(wish: str, value: Any) -> str:
    """A way out, where there is one to guess."""
    if isinstance(value, str) and "number" in wish:
        return "; write decimal digits, without quotes or leading zeros"
    if isinstance(value, str):
        return suggest(value, re.findall(r"'([^']*)'", wish), otherwise="")
    return "; put it in quotes" if "text" in wish and isinstance(value, bool | int | float) else ""


def _place(key: Key, places: dict[Key, Place]) -> Place:
    """The place of `key`, or of the closest section around it where the file leaves it out."""
    while key not in places:
        key = key[:-1]
    return places[key]
