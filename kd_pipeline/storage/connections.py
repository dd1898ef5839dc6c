"""One driver for each kind of store in each process, and the loop of events that all of them run in."""

import asyncio
import atexit
import ctypes
import os
from contextlib import suppress
from threading import Lock
from typing import Protocol

from kd_pipeline._core.optional import require
from kd_pipeline.errors import ConfigError
from kd_pipeline.storage.base import FileStat, FolderEntry
from kd_pipeline.storage.http import HttpDriver
from kd_pipeline.storage.hubs import GoogleDriver, HubDriver
from kd_pipeline.storage.s3 import S3Driver

__all__ = ["Driver", "advice_of", "check_installed", "driver_of", "event_loop", "make_driver"]

_CLOSE_S = 1.0


class Driver(Protocol):
    """Single attempts, without deadline; what they raise is for `failure_of`."""

    async def stat(self, url: str) -> FileStat:
        """See `Store.stat`."""
        ...

    async def read(self, url: str, start: int, end: int, expected: FileStat | None) -> tuple[bytes, FileStat]:
        """The bytes from `start` to `end` or the end of the file, and what the file is that they are of."""
        ...

    async def find(self, pattern: str) -> list[str]:
        """See `Store.find`."""
        ...

    async def list_folder(self, url: str) -> list[FolderEntry]:
        """See `Store.list_folder`, in any order."""
        ...

    async def write(self, url: str, content: bytes) -> None:
        """See `Store.write`."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


_CLASSES: dict[str, type[HttpDriver] | type[S3Driver]] = {
    "http": HttpDriver,
    "https": HttpDriver,
    "s3": S3Driver,
    "gs": GoogleDriver,
    "hf": HubDriver,
}


def check_installed(scheme: str) -> None:
    """Import what reads URLs of `scheme`.

    Raises:
        ConfigError: nothing does.
        MissingPackageError: it is not installed.
    """
    if scheme not in _CLASSES:
        raise ConfigError(f"nothing here reads {scheme}:// URLs; there are {', '.join(_CLASSES)}, and paths of files")
    _CLASSES[scheme].check_installed()


def advice_of(scheme: str) -> str:
    """What to do about a credential that is missing or has expired."""
    return _CLASSES[scheme].denied


def driver_of(scheme: str) -> Driver | None:
    """The driver of this process, if there is one already."""
    return _connections.drivers.get(_CLASSES[scheme])


def make_driver(scheme: str) -> Driver:
    """The driver of this process, whose connections all stores share.

    Raises:
        Whatever the driver raises when it looks for credentials, which may also take a while.
    """
    maker = _CLASSES[scheme]
    with _connections.lock:
        if maker not in _connections.drivers:
            _connections.drivers[maker] = maker()
        return _connections.drivers[maker]


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process that fsspec runs in a thread of its own."""
    loop: asyncio.AbstractEventLoop = require("fsspec.asyn", extra="urls").get_loop()
    return loop


class _Connections:
    def __init__(self) -> None:
        self.lock, self.drivers, self.process = Lock(), dict[type, Driver](), os.getpid()

    def close(self) -> None:
        """Close them all, unless they are those of a parent."""
        if self.process == os.getpid() and self.drivers:
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._close_all(), event_loop()).result(_CLOSE_S)

    async def _close_all(self) -> None:
        await asyncio.gather(*(driver.close() for driver in self.drivers.values()), return_exceptions=True)


_connections = _Connections()


def _leave() -> None:
    """In a fork: connect again, and never close what is the parent's.

    The child shares the parent's sockets and the object by which the kernel tells the parent's loop of them; to close
    a connection here would take it out of that loop.
    """
    global _connections
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_connections))
    _connections = _Connections()


os.register_at_fork(after_in_child=_leave)
atexit.register(lambda: _connections.close())
