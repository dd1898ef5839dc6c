"""Objects on S3 and what speaks its protocol."""

from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.storage.base import FileStat, FolderEntry
from kd_pipeline.storage.changes import changed
from kd_pipeline.storage.failures import Failure
from kd_pipeline.storage.http import OPTIONS, folder_entries

__all__ = ["S3Driver"]

_MAX_CONNECTIONS = 64


class S3Driver:
    """Reads and writes `s3://`; see `HttpDriver`. Requests of s3fs, which are repeated here and not by it."""

    denied = (
        "renew it as for other tools of AWS (aws sso login, aws configure, or AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY); for a public bucket set FSSPEC_S3_ANON=true"
    )

    @staticmethod
    def check_installed() -> None:
        """Import what this needs."""
        require("s3fs", extra="s3")

    def __init__(self) -> None:
        fsspec = require("fsspec", extra="s3")
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        config = {"retries": {"max_attempts": 0}, "max_pool_connections": _MAX_CONNECTIONS, **own}
        self._s3 = fsspec.filesystem("s3", config_kwargs=config, **OPTIONS)
        self._s3.retries = 1

    async def stat(self, url: str) -> FileStat:
        """Size and ETag."""
        return self._stat_of(await self._call("head_object", url))

    async def read(self, url: str, start: int, end: int, expected: FileStat | None) -> tuple[bytes, FileStat]:
        """See `HttpDriver.read`."""
        try:
            answer = await self._call("get_object", url, Range=f"bytes={start}-{end - 1}")
        except OSError as exc:
            if getattr(exc.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode") != 416:
                raise
            answer = None  # it starts after the end
        stat = self._stat_of(answer) if answer is not None else await self.stat(url)
        try:
            if expected is not None and stat != expected:
                raise Failure("final", changed(expected, stat))
            content = b"" if answer is None else await answer["Body"].read()
        finally:
            if answer is not None:
                answer["Body"].close()
        if len(content) != max(min(end, stat.num_bytes) - start, 0):
            raise Failure("passing", f"the store sent {len(content)} of {end - start} bytes")
        return content, stat

    async def find(self, pattern: str) -> list[str]:
        """The matching objects and prefixes."""
        return [f"s3://{path}" for path in await self._s3._glob(pattern)]

    async def list_folder(self, url: str) -> list[FolderEntry]:
        """Objects and prefixes."""
        return folder_entries(url, await self._s3._ls(url, detail=True))

    async def write(self, url: str, content: bytes) -> None:
        """One object, which appears when all of it is there."""
        await self._s3._pipe_file(url, content)

    async def close(self) -> None:
        """Close the connections."""
        if (creator := getattr(self._s3, "_s3creator", None)) is not None:
            await creator.__aexit__(None, None, None)

    async def _call(self, method: str, url: str, **options: str) -> Any:
        bucket, key, version = self._s3.split_path(self._s3._strip_protocol(url))
        if version:
            options["VersionId"] = version
        return await self._s3._call_s3(method, Bucket=bucket, Key=key, **options)

    @staticmethod
    def _stat_of(answer: Any) -> FileStat:
        size = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
        return FileStat(int(size), answer.get("ETag", ""))
