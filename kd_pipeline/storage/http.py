"""Files on web servers, with range requests; Google Cloud Storage and the Hugging Face Hub are read like this too."""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.storage.base import FileStat, FolderEntry
from kd_pipeline.storage.changes import changed
from kd_pipeline.storage.failures import Failure, failure_of_status

__all__ = ["OPTIONS", "HttpDriver", "folder_entries"]

_MAX_WHOLE = 32 * 2**20
"""Largest file that is read whole for a part of it, from a server that knows no ranges."""
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


class HttpDriver:
    """Reads `http://` and `https://`. Its methods run in the event loop of this process, and fail as a driver may."""

    denied = (
        "if the URL is signed, get a new one; a header such as Authorization can be set in fsspec's own configuration, "
        "under https"
    )

    @staticmethod
    def check_installed() -> None:
        """Import what this needs."""
        require("aiohttp", extra="urls")
        require("fsspec", extra="urls")

    def __init__(self) -> None:
        self._web = require("fsspec", extra="urls").filesystem("http", **OPTIONS)

    async def stat(self, url: str) -> FileStat:
        """Asked for with a range of one byte: signed URLs often allow no HEAD."""
        async with self._get(url, 0, 1) as response:
            return _stat_of(response)

    async def read(self, url: str, start: int, end: int, expected: FileStat | None) -> tuple[bytes, FileStat]:
        """The bytes from `start` to `end` or the end of the file, and what the file is that they are of."""
        async with self._get(url, start, end) as response:
            stat = _stat_of(response)
            if expected is not None and stat != expected and (stat.version or stat.num_bytes != expected.num_bytes):
                raise Failure("final", changed(expected, stat))
            end = min(end, stat.num_bytes)
            if start >= end:
                return b"", stat
            if response.status == 206:
                if _range_of(response) != (start, end):
                    raise Failure("passing", "the server sent another range than it was asked for")
                content = await response.read()
            elif stat.num_bytes <= _MAX_WHOLE:
                content = (await response.read())[start:end]
            else:
                raise Failure(
                    "final",
                    f"the server sends only whole files, and this one has {stat.num_bytes} bytes, more than "
                    f"{_MAX_WHOLE}; download it and read the local copy, or use a server with range requests",
                )
        if len(content) != end - start:
            raise Failure("passing", f"the server sent {len(content)} of {end - start} bytes")
        return content, stat

    async def find(self, pattern: str) -> list[str]:
        """The links that match on the page of the folder, for servers that list their folders."""
        return list(await self._web._glob(pattern))

    async def list_folder(self, url: str) -> list[FolderEntry]:
        """Not of a web server, whose pages have links of all kinds, or a part of a folder."""
        raise Failure(
            "final",
            "web servers do not list their files; write a list of them, and take kind: file_list with this root",
        )

    async def write(self, url: str, content: bytes) -> None:
        """Not to a web server, as each has its own way."""
        raise Failure("final", "cannot be written: web servers are only read; write to a folder, or to s3:// or gs://")

    async def close(self) -> None:
        """Close the connections."""
        if self._web._session is not None:
            await self._web._session.close()

    async def _address(self, url: str) -> tuple[str, dict[str, str]]:
        """Where the bytes of `url` are, and the headers with the credential."""
        return url, {}

    @asynccontextmanager
    async def _get(self, url: str, start: int, end: int) -> AsyncIterator[Any]:
        address, headers = await self._address(url)
        options = dict(self._web.kwargs)
        # Compressed bytes would have offsets of their own.
        headers = {**options.pop("headers", {}), **headers, "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{end - 1}"
        session = await self._web.set_session()
        async with session.get(self._web.encode_url(address), headers=headers, **options) as response:
            if response.status >= 400 and response.status != 416:
                raise failure_of_status(response.status, self.denied, retry_after=response.headers.get("Retry-After"))
            yield response


OPTIONS = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
"""For all file systems of fsspec: they run in a loop that this package waits for, and belong to one process."""


def folder_entries(folder: str, listed: Iterable[Mapping[str, Any]]) -> list[FolderEntry]:
    """What a file system of fsspec lists for a folder, which may be itself among it."""
    own = folder.partition("://")[2].rstrip("/")
    names = ((entry["name"].rstrip("/"), entry) for entry in listed)
    return [
        FolderEntry(name.rpartition("/")[2], None if entry["type"] == "directory" else int(entry["size"]))
        for name, entry in names
        if name != own
    ]


def _stat_of(response: Any) -> FileStat:
    headers = response.headers
    size = headers.get("Content-Length")
    if response.status in (206, 416):
        match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        size = match[3] if match else None
    if size is None:
        raise Failure("final", "the server does not say how large the file is; download it and read the local copy")
    return FileStat(int(size), headers.get("ETag") or headers.get("Last-Modified") or "")


def _range_of(response: Any) -> tuple[int, int] | None:
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2]) + 1) if match and match[1] else None
