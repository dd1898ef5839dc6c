"""YAML as plain data with the line of every key: no tags, no aliases, no type guessing beyond YAML 1.2."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import yaml

from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError

__all__ = ["Key", "Place", "Problem", "config_error", "parse", "parse_override", "read_plain"]

Key = tuple[str | int, ...]
"""Path to a value: the keys of mappings and the indices of lists that lead to it."""

_MAX_DEPTH = 32
_MAX_PROBLEMS = 20
_MAX_LENGTH = 2000
"""Of a problem in a message."""
_MAX_VALUES = 30_000
"""About a second of parsing, as are the lines."""
_MAX_LINES = 100_000
_CONSTANTS = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}
_NOT_NULL = {
    "None": 'None is a text in YAML; write null for nothing, or "None" in quotes for the text',
    "~": "~ alone is null in YAML; write null for nothing, or ~/ for your home folder",
}
"""Why an override has no such value."""
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,19})")
_FLOAT = re.compile(r"(?=.*[.eE])[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Place(NamedTuple):
    """Where a value is written."""

    order: int
    """Rank in the report: the line, or for an override a number after all lines."""
    name: str
    """The file and line, or the override."""
    override: str = ""
    """The override as it was typed."""


class Problem(NamedTuple):
    """What is wrong with the value at `key`."""

    place: Place
    key: Key
    text: str


def config_error(problems: Iterable[Problem]) -> ConfigError:
    """One error for all `problems`: a line each, in the order of the file, at most twenty."""
    found = sorted(problems, key=lambda problem: problem.place.order)
    lines = [
        ": ".join(filter(None, [printable(problem.place.name), _dotted(problem.key), printable(problem.text)]))
        for problem in found[:_MAX_PROBLEMS]
    ]
    lines = [line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]}..." for line in lines]
    more = [f"and {len(found) - _MAX_PROBLEMS} more problems"] if len(found) > _MAX_PROBLEMS else []
    return ConfigError("\n".join(lines + more))


def parse(text: str, place: Callable[[int], Place], key: Key = ()) -> tuple[Any, dict[Key, Place]]:
    """The plain data in the YAML document `text`, and the place of every key in it.

    Args:
        text: one document; an empty one is null.
        place: the place of a line, which counts from 1.
        key: prefix of all keys.

    Raises:
        ConfigError: `text` is not YAML, or is more than plain data.
    """
    if len(text.splitlines()) > _MAX_LINES:
        raise config_error(
            [Problem(place(_MAX_LINES + 1), (), f"more than {_MAX_LINES} lines; is this a config file?")]
        )
    parser = _Parser(text, place)
    data = parser.document(key)
    if parser.problems:
        raise config_error(parser.problems)
    return data, parser.places


def parse_override(text: str, place: Place, key: Key) -> tuple[Any, dict[Key, Place]]:
    """The value that an override gives to `key`, and the place of every key in it.

    If it starts with a bracket or a quote, it is a list, a mapping or a quoted text as in YAML. Otherwise it is a
    number, a constant or a text as it stands, in which `#`, `: `, `*`, `&` and `!` have no meaning.

    Raises:
        ConfigError: there is no value, or it is not YAML or more than plain data.
    """
    text = text.strip()
    if not text:
        raise config_error([Problem(place, key, "has no value (an unset variable?); write null for none")])
    if text[0] not in "[{'\"":
        problem = _problem_of(text, is_quoted=False)
        if "\0" in text:
            problem = "the character '\\x00' is not allowed"
        elif text in _NOT_NULL:
            problem = _NOT_NULL[text]
        if problem is not None:
            raise config_error([Problem(place, key, problem)])
        return read_plain(text), {key: place}
    parser = _Parser(text, lambda _: place)
    try:
        data = parser.document(key)
    except ConfigError as exc:
        comment = "; a # after a space starts a comment: put the text in quotes" if " #" in text else ""
        raise ConfigError(f"{exc}{comment}") from exc
    if rest := text[parser.end :].strip():
        parser.problems.append(Problem(place, key, f"{rest!r:.60} is a comment; put the whole text in quotes"))
    if parser.problems:
        raise config_error(parser.problems)
    return data, parser.places


class _Parser:
    """Builds plain data from PyYAML's events, so no tag is ever looked up and no alias expanded."""

    def __init__(self, text: str, place: Callable[[int], Place]) -> None:
        self.places: dict[Key, Place] = {}
        self.problems: list[Problem] = []
        self._text, self._place = text, place
        self._events = self._parse(text)
        self._latest: Key = ()  # the key whose value was begun last
        self._num_values = 0
        self.end = 0
        """Where the last value ends in the text; only comments follow."""

    def _parse(self, text: str) -> Iterator[Any]:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if not isinstance(event, yaml.DocumentEndEvent | yaml.StreamEndEvent):
                self.end = self.end if event.end_mark is None else event.end_mark.index
            yield event

    def document(self, key: Key) -> Any:
        self.places[key], self._latest = self._place(1), key
        try:
            next(self._events)  # StreamStartEvent
            if isinstance(next(self._events), yaml.StreamEndEvent):
                return None
            data = self._value(next(self._events), key)
            next(self._events)  # DocumentEndEvent
            if not isinstance(end := next(self._events), yaml.StreamEndEvent):
                self._complain(end, (), "a second document starts here; keep one in a file")
            return data
        except ConfigError:
            raise
        except yaml.MarkedYAMLError as exc:
            mark = exc.problem_mark or exc.context_mark
            reason = " ".join(filter(None, [exc.context, exc.problem]))
            hint = "; indent with spaces" if "'\\t'" in reason else ""
            raise self._syntax_error(mark.line + 1 if mark else 1, reason + hint) from exc
        except yaml.reader.ReaderError as exc:
            line = self._text.count("\n", 0, exc.position) + 1
            raise self._syntax_error(line, f"the character {chr(exc.character)!r} is not allowed") from exc
        except (OverflowError, ValueError) as exc:
            raise self._syntax_error(self.places[self._latest].order, "an escape beyond Unicode") from exc

    def _value(self, event: Any, key: Key) -> Any:
        self.places.setdefault(key, self._place(event.start_mark.line + 1))
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise config_error(
                [Problem(self.places[key], key[:3], f"more than {_MAX_VALUES} values; is this a config file?")]
            )
        if isinstance(event, yaml.AliasEvent):
            self._complain(event, key, f"aliases (*{event.anchor}) are not supported; write the value out")
            return None
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, key)
        if event.tag is not None:
            self._complain(event, key, f"tags ({event.tag}) are not supported; write plain values")
        if len(key) > _MAX_DEPTH:
            raise config_error([Problem(self.places[key], key[:3], f"nested more than {_MAX_DEPTH} levels deep")])
        return self._list(key) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(key)

    def _scalar(self, event: Any, key: Key) -> Any:
        if event.tag is not None:
            self._complain(event, key, f"tags ({event.tag}) are not supported; write plain values")
        if (problem := _problem_of(event.value, is_quoted=not event.implicit[0])) is not None:
            self._complain(event, key, problem)
        return read_plain(event.value) if event.implicit[0] else event.value

    def _list(self, key: Key) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*key, len(items))))
        return items

    def _mapping(self, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            place = self._place(event.start_mark.line + 1)
            if not isinstance(event, yaml.ScalarEvent):
                raise config_error([Problem(place, key, "a key must be text, not a list, a mapping or an alias")])
            child = (*key, event.value)
            if not isinstance(self._scalar(event, child), str):
                self._complain(event, child, f"keys must be text; put it in quotes: {json.dumps(event.value)}")
            if event.value in data:
                self._complain(event, child, f"duplicate key, first at {self.places[child].name}; remove one")
            self.places.setdefault(child, place)
            self._latest = child
            data[event.value] = self._value(next(self._events), child)
        return data

    def _complain(self, event: Any, key: Key, text: str) -> None:
        self.problems.append(Problem(self._place(event.start_mark.line + 1), key, text))

    def _syntax_error(self, line: int, reason: str) -> ConfigError:
        after = f"after {_dotted(self._latest)}: " if self._latest else ""
        return config_error([Problem(self._place(line), (), f"{after}not YAML: {reason}")])


def _problem_of(text: str, *, is_quoted: bool) -> str | None:
    """What is wrong with a text that is never meant as it stands."""
    if re.search("[\ud800-\udfff]", text):
        return f"{text!r:.60} is not valid Unicode"
    return "an empty text; leave the key out, or write null for nothing" if is_quoted and not text else None


def read_plain(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _dotted(key: Key) -> str:
    parts = (str(part)[:60] for part in key)
    return ".".join(part if part.isprintable() else repr(part) for part in parts)
