"""The store of a path."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from kd_pipeline._core.paths import find_url
from kd_pipeline.errors import ConfigError, shown
from kd_pipeline.storage.base import Store, StoreSettings, scheme_of
from kd_pipeline.storage.cached import CachedStore
from kd_pipeline.storage.local import LocalStore
from kd_pipeline.storage.remote import RemoteStore

__all__ = ["local_only", "open_store"]

_advice: ContextVar[str] = ContextVar("advice", default="")
"""Why no store of URLs is opened, and what allows it; empty if it is."""


@contextmanager
def local_only(advice: str) -> Iterator[None]:
    """Refuse to open stores of URLs in this block, with a ConfigError that ends with `advice`; not in other threads."""
    token = _advice.set(advice)
    try:
        yield
    finally:
        _advice.reset(token)


def open_store(path: str | Path, settings: StoreSettings | None = None, *, whole: bool = False) -> Store:
    """The store that `path` is in: a local one, or one for all URLs of its scheme.

    Args:
        path: a file or a pattern.
        settings: for URLs.
        whole: whether each file is kept in the cache from its first read on. By default those are that `prefetch`
            names, and if all files that `stat` was asked about fit into the cache, those of which much was read.

    Raises:
        ConfigError: nothing reads URLs of this scheme, or none is to be read.
        MissingPackageError: the package that reads URLs of this scheme is not installed.
    """
    scheme = scheme_of(path)
    if scheme is None:
        return LocalStore()
    if scheme == "file":
        raise ConfigError(find_url(shown(path)))
    if advice := _advice.get():
        raise ConfigError(f"{shown(path)} is not a local file, {advice}")
    settings = settings or StoreSettings()
    remote = RemoteStore(scheme, settings)
    return CachedStore(remote, settings, whole=whole) if settings.cache_bytes else remote
