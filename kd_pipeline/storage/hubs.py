"""Google Cloud Storage and the Hugging Face Hub: their drivers say where bytes are and with which credential."""

from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.storage.base import FolderEntry
from kd_pipeline.storage.http import OPTIONS, HttpDriver, folder_entries
from kd_pipeline.storage.parallel import in_thread

__all__ = ["GoogleDriver", "HubDriver"]


class GoogleDriver(HttpDriver):
    """Reads and writes `gs://`."""

    denied = (
        "log in with gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
        "set FSSPEC_GS_TOKEN=anon"
    )

    @staticmethod
    def check_installed() -> None:
        """Import what this needs."""
        require("aiohttp", extra="gcs")
        require("gcsfs", extra="gcs")

    def __init__(self) -> None:
        super().__init__()
        self._google = require("fsspec", extra="gcs").filesystem("gs", **OPTIONS)

    async def find(self, pattern: str) -> list[str]:
        """The matching objects and prefixes."""
        return [f"gs://{path}" for path in await self._google._glob(pattern)]

    async def list_folder(self, url: str) -> list[FolderEntry]:
        """Objects and prefixes."""
        return folder_entries(url, await self._google._ls(url, detail=True))

    async def write(self, url: str, content: bytes) -> None:
        """One object, which appears when all of it is there."""
        await self._google._pipe_file(url, content)

    async def close(self) -> None:
        """Close the connections."""
        await super().close()
        if self._google._session is not None:
            await self._google._session.close()

    async def _address(self, url: str) -> tuple[str, dict[str, str]]:
        headers: dict[str, str] = {}
        credentials: Any = self._google.credentials
        await in_thread(lambda: credentials.apply(headers))  # which may ask Google for a new token
        return self._google.url(url), headers


class HubDriver(HttpDriver):
    """Reads and writes `hf://`."""

    denied = (
        "log in with hf auth login, or set HF_TOKEN; a gated dataset also wants its terms accepted on its page, and a "
        "misspelled one is refused in the same way"
    )

    @staticmethod
    def check_installed() -> None:
        """Import what this needs."""
        require("aiohttp", extra="hf")
        require("huggingface_hub", extra="hf")

    def __init__(self) -> None:
        self._hub = require("huggingface_hub", extra="hf")
        super().__init__()
        options = {**OPTIONS, "asynchronous": False}
        self._files = require("fsspec", extra="hf").filesystem("hf", **options)
        self._addresses: dict[str, str] = {}

    async def find(self, pattern: str) -> list[str]:
        """The matching files and folders."""
        return await in_thread(lambda: [f"hf://{path}" for path in self._files.glob(pattern)])

    async def list_folder(self, url: str) -> list[FolderEntry]:
        """Files and folders."""
        listed = await in_thread(lambda: self._files.ls(url, detail=True))
        return folder_entries(url, listed)

    async def write(self, url: str, content: bytes) -> None:
        """One file, which is a commit of its own."""
        await in_thread(lambda: self._files.pipe_file(url, content))

    async def _address(self, url: str) -> tuple[str, dict[str, str]]:
        if url not in self._addresses:
            self._addresses[url] = await in_thread(lambda: self._find_address(url))
        return self._addresses[url], self._hub.utils.build_hf_headers()

    def _find_address(self, url: str) -> str:
        place = self._files.resolve_path(url)  # its own `url` asks the Hub about each file
        return str(
            self._hub.hf_hub_url(
                place.repo_id,
                place.path_in_repo,
                repo_type=place.repo_type,
                revision=place.revision,
                endpoint=self._files.endpoint,
            )
        )
