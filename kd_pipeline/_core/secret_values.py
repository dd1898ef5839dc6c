"""Passwords, tokens and keys in settings, arguments and text: hidden before they are written where others may read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError

__all__ = ["HIDDEN", "hide_in_arguments", "hide_in_settings", "hide_in_text", "is_secret", "refuse_hidden"]

HIDDEN = "***"
"""Written in place of a secret."""

_KEYS = "access|account|api|encryption|private|secret|shared|signing|ssh"
_SECRET = re.compile(
    rf"passw(or)?d|passphrase|secret|credential|({_KEYS})_?key|(^|_)(pwd|bearer|o?auth|authorization|authentication)(_|$)"
)
_TOKEN = re.compile(r"(token|signature|(^|_)sig)(_|$)")
"""Tokens, and what signs a URL. Numbers under such a name are not secret: networks have tokens too."""
_USER_OF_URL = re.compile(r"(?<=://)[^\s/]+@")
_QUERY_OF_URL = re.compile(r"(?<=[?&;])([^?&;=\s]+)=[^&;#\s'\"]+")
_KEY_IN_BRACES = re.compile(r"([\w.-]+)[\"']?\s*[:=]")
"""In an argument such as `student.kwargs={api_key: abc}`."""


def hide_in_settings(values: Any, name: str = "") -> Any:
    """`values` of a config, without what is secret by its name or is the user of a URL.

    Args:
        values: plain values, nested as in a config. Those of `true`, `false` and null are no secrets.
        name: of `values` themselves.
    """
    match values:
        case Mapping():
            return {
                key: hide_in_settings(value, str(key) if is_secret(str(key)) or not is_secret(name) else name)
                for key, value in values.items()
            }
        case list() | tuple():
            return [hide_in_settings(value, name) for value in values]
        case str():
            return HIDDEN if values and is_secret(name) else hide_in_text(values)
        case int() | float() if not isinstance(values, bool) and _SECRET.search(_words(name)):
            return HIDDEN
    return values


def hide_in_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without secrets: `--token abc`, `--token=abc`, `logger.kwargs.api_key=abc`."""
    shown: list[str] = []
    is_next_secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if is_next_secret and not argument.startswith("-"):
            shown.append(HIDDEN)
        elif equals and (is_secret(name) or _has_secret_key(argument)):
            shown.append(f"{name}={HIDDEN}")
        elif "{" in argument and _has_secret_key(argument):
            shown.append(HIDDEN)
        else:
            shown.append(hide_in_text(argument))
        is_next_secret = not equals and argument.startswith("-") and is_secret(argument)
    return shown


def hide_in_text(text: str) -> str:
    """`text` without the users of URLs, which may have passwords, and without secrets in their queries."""
    if "://" not in text:
        return text
    return _QUERY_OF_URL.sub(_hide_in_query, _USER_OF_URL.sub(f"{HIDDEN}@", text))


def refuse_hidden(settings: Any, where: str, *, otherwise: str = "") -> None:
    """Refuse settings that were written by `hide_in_settings` and then used again.

    Args:
        settings: plain values.
        where: the file that they come from, for the message.
        otherwise: how else to give the value, such as ", or on the command line".

    Raises:
        ConfigError: a value is hidden; names its key.
    """
    if keys := [*_hidden(settings, "")]:
        names = printable(", ".join(keys))
        raise ConfigError(
            f"{where}: {names}: the value is {HIDDEN}, which stands for a secret that was hidden when this file was "
            f"written; put the value itself in its place{otherwise}"
        )


def is_secret(name: str) -> bool:
    """Whether values under `name` are secret: `password`, `hf_token`, `apiKey`, `logger.kwargs.api_key`."""
    words = _words(name)
    return bool(_SECRET.search(words) or _TOKEN.search(words))


def _words(name: str) -> str:
    """`api_key` of `--apiKey`."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return "_".join(re.findall(r"[a-z]+", separated))


def _has_secret_key(argument: str) -> bool:
    return any(is_secret(key) for key in _KEY_IN_BRACES.findall(argument.partition("{")[2]))


def _hide_in_query(match: re.Match[str]) -> str:
    return f"{match[1]}={HIDDEN}" if is_secret(match[1]) else match[0]


def _hidden(values: Any, key: str) -> Iterator[str]:
    match values:
        case Mapping():
            for name, value in values.items():
                yield from _hidden(value, f"{key}.{name}".removeprefix("."))
        case list() | tuple():
            for position, value in enumerate(values):
                yield from _hidden(value, f"{key}.{position}")
        case str() if values == HIDDEN or ("://" in values and HIDDEN in values):
            yield key
