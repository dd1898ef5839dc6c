"""Where data is, as users write it: a local path, or the URL of a file or folder in a store."""

import os
import posixpath
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from kd_pipeline._core.paths import Url, path_or_url
from kd_pipeline.storage.base import scheme_of

__all__ = ["Location", "folder_of", "join", "relative_to"]


def _read(value: object) -> Path | Url:
    if not isinstance(value, str | os.PathLike):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return path_or_url(value)


# Not a union for pydantic, which would report what is wrong once for each of its members.
Location = Annotated[str | Path, PlainValidator(_read), WithJsonSchema({"type": "string"})]
"""A setting that is a local path, read as a `Path`, or a URL, which stays as it was written and becomes a `Url`."""

_WEB = ("http", "https")
"""Schemes whose URLs have a query, and signs of names as `%20`."""


def join(folder: str, name: str) -> str:
    """The file `name` in `folder`, as `os.path.join` has it; `name` itself if it is absolute or a URL.

    Below a URL of the web, the name is still one of files, so `a b.jpg` becomes `a%20b.jpg`, and the query of the
    folder, which may be its credential, is also that of its files.
    """
    if name.startswith("/") or scheme_of(name) is not None:
        return name
    if scheme_of(folder) is None:
        return os.path.join(folder, name)
    start, query = _split_query(folder)
    name = posixpath.normpath(name)
    while name.startswith("../"):  # which no store knows
        start, name = _parent(start), name[len("../") :]
    return f"{start.rstrip('/')}/{quote(name) if _is_web(folder) else name}{query}"


def relative_to(folder: str, url: str) -> str | None:
    """The name that `join` needs for `url`; None if it is not below the URL `folder`, or says more than a name can."""
    start, query = _split_query(folder)
    start = f"{start.rstrip('/')}/"
    name = url.removeprefix(start).removesuffix(query)
    return name if name and join(folder, name) == url else None


def folder_of(path: str) -> str:
    """The folder of a file; that of a URL has no query, which may allow to read this file alone."""
    return os.path.dirname(path) if scheme_of(path) is None else _parent(_split_query(path)[0])


def _split_query(url: str) -> tuple[str, str]:
    start, mark, query = url.partition("?") if _is_web(url) else (url, "", "")
    return start, mark + query


def _parent(url: str) -> str:
    """The folder around a file or folder, or the host or bucket itself."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.rstrip("/").partition("/")
    return f"{scheme}://{host}/{posixpath.dirname(path)}".rstrip("/")


def _is_web(url: str) -> bool:
    return scheme_of(url) in _WEB
