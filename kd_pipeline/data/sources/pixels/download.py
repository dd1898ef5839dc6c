"""Download a file that is known by its size and its digest."""

import hashlib
import tempfile
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError

from kd_pipeline.errors import DataError

__all__ = ["fetch_file"]

_TIMEOUT_S = 60
_BLOCK = 2**20


def fetch_file(url: str, folder: Path, *, num_bytes: int, sha256: str) -> Path:
    """Download the file at `url` into `folder`, whole or not at all; returns its path.

    Redirects are followed to https alone, and no more is read than the file should have.

    Raises:
        DataError: it cannot be downloaded, or is a different file.
    """
    name = url.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: concurrent processes do not collide, and a failed download leaves nothing.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as own:
            part = Path(own) / name
            opener = urllib.request.build_opener(_OnlyToHttps)
            with opener.open(url, timeout=_TIMEOUT_S) as response, part.open("wb") as file:
                num_found, sha256_found = _copy(response, file, num_bytes)
            if (num_found, sha256_found) != (num_bytes, sha256):
                found = "more" if num_found > num_bytes else num_found
                raise DataError(
                    f"{url}: the download has {found} bytes and SHA-256 {sha256_found}, expected {num_bytes} and "
                    f"{sha256}; it is incomplete or was changed on the way; try again"
                )
            return part.replace(folder / name)
    except (OSError, HTTPException) as exc:
        if isinstance(exc, HTTPError):
            exc.close()
        raise DataError(
            f"{url}: cannot be downloaded ({exc}); download it on another machine and put it into {folder}, packed or "
            "unpacked"
        ) from exc


class _OnlyToHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirects as long as nobody on the way can read or change what they lead to."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """The next request.

        Raises:
            URLError: the address does not start with https.
        """
        if not newurl.lower().startswith("https://"):
            fp.close()
            raise URLError(f"it leads to {newurl!r:.200}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _copy(response: IO[bytes], file: IO[bytes], num_bytes: int) -> tuple[int, str]:
    """Copy `num_bytes`, and one more if there are more; returns how many it copied, and their SHA-256."""
    digest, left = hashlib.sha256(), num_bytes + 1
    while left and (block := response.read(min(left, _BLOCK))):
        digest.update(block)
        file.write(block)
        left -= len(block)
    return num_bytes + 1 - left, digest.hexdigest()
