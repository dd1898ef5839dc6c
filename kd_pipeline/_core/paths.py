"""One reading of every path that a user writes, in a setting, on the command line or as an argument."""

import os
import re
import shlex
from pathlib import Path

from kd_pipeline.errors import ConfigError, shown

__all__ = ["Url", "argument_path", "find_url", "local_path", "path_or_url"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/|(?=[^/\\]))")
"""A scheme of two letters or more, because `C:/` is a drive. `Path` keeps one of the two slashes."""
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*|\{[^}]*\})")
_DOWNLOADS = {
    "s3": "aws s3 sync {url} FOLDER",
    "gs": "gcloud storage rsync -r {url} FOLDER",
    "http": "wget {url}",
    "https": "wget {url}",
}
"""The usual command, by scheme."""


class Url(str):
    """A URL as it was written, which may have credentials; its repr has none."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(shown(self))


def path_or_url(text: str | os.PathLike[str]) -> Path | Url:
    """`local_path` where a URL may be too, which stays as it is.

    Raises:
        ValueError: as `local_path`, or it is a URL of a local file, of no host, or with one slash where two belong.
    """
    text = os.fspath(text)
    match = _URL.match(text)
    if match is None or match[1].lower() == "file":
        return local_path(text)
    rest = text[match.end() :].lstrip("/")
    if match[2] != "/":
        url = shown(f"{match[1]}://{rest}")
        raise ValueError(f"{url} has lost a slash, as URLs do in a pathlib.Path; give it as text")
    if not rest or text[match.end()] == "/":
        raise ValueError(f"{shown(text)} is a URL without a host or bucket; write it after the two slashes")
    _refuse_variable(shown(text))  # a password may have a $
    return Url(text)


def local_path(text: str | os.PathLike[str]) -> Path:
    """The path `text` with `~` expanded to the user's home folder; nothing else in it has a meaning.

    Variables are refused instead of expanded, so a config means the same on every machine and in every shell.

    Raises:
        ValueError: it is empty, a URL, `None`, has a variable such as `$DATA` in it, or `~` and an unknown user.
    """
    text = os.fspath(text)
    if not text or "\0" in text:
        raise ValueError(f"the path {text!r} is empty or has a NUL character; write a path, or leave the setting out")
    if text in ("None", "none"):
        raise ValueError(f"the path {text!r} stands for no path: write null")
    if (advice := find_url(text)) is not None:
        raise ValueError(advice)
    _refuse_variable(text)
    try:
        expanded = os.path.expanduser(text)
        if text.startswith("~") and expanded == text:
            raise RuntimeError
    except RuntimeError:
        raise ValueError(
            f"the path {text!r} starts with ~, and no such user has a home folder; write the whole path, from / on"
        ) from None
    return Path(expanded)


def argument_path(text: str | os.PathLike[str]) -> Path:
    """`local_path` for an argument of a function.

    Raises:
        ConfigError: as `local_path`.
    """
    try:
        return local_path(text)
    except ValueError as exc:
        raise ConfigError(str(exc)) from None


def find_url(text: str) -> str | None:
    """What to do if `text` is a URL instead of a path; None if it is a path."""
    match = _URL.match(text)
    if match is None:
        return None
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme == "file":
        return f"{text} is a URL; write the path alone: /{rest.removeprefix('localhost').lstrip('/')}"
    url = shown(f"{match[1]}://{rest}")
    is_file = "." in rest.rpartition("/")[2] and "/" in rest
    folder = url.rpartition("/")[0] if is_file and scheme in ("s3", "gs") else url
    command = f" ({_DOWNLOADS[scheme].format(url=shlex.quote(folder))})" if scheme in _DOWNLOADS else ""
    return (
        f"{url} is a URL, and here only files on a local or mounted disk are read; download it first{command}, and "
        "write the path of the local copy"
    )


def _refuse_variable(text: str) -> None:
    if variable := _VARIABLE.search(text):
        raise ValueError(
            f"the path {text!r} has the variable {variable[0]}, and only ~ is expanded in paths; write the path "
            "out, or set it on the command line, where the shell expands variables outside of single quotes"
        )
