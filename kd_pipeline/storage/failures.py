"""What went wrong in a remote store: whether to try again, and a reason that holds no credential."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from kd_pipeline._core.text import printable
from kd_pipeline.errors import NoSuchFileError, StorageError, shown

__all__ = ["Failure", "failure_of", "failure_of_status"]

Kind = Literal["missing", "denied", "passing", "final"]
"""`denied` is tried once more, as drivers renew what has expired; `passing` until the deadline."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>()]+")
_QUERY = re.compile(r"\?[^\s'\"<>()]+")
_MAX_TEXT = 200
_PASSING = {408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529}
_DENIED_NAMES = re.compile(r"Credential|Refresh|SSO|Token|Unauthorized|Gated|GoogleAuth|ProfileNotFound|Permission")
_PASSING_NAMES = re.compile(r"Timeout|Connect|Disconnect|ClientPayload|IncompleteRead|ResponseParser|HTTPClientError")
"""Classes of several packages, which are not imported for their names."""


class Failure(Exception):
    """One attempt that failed.

    Attributes:
        kind: what to do about it.
        reason: one line without credentials.
        pause_s: what the server asked to wait.
    """

    def __init__(self, kind: Kind, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.pause_s = kind, reason, pause_s

    def as_error(self, path: str, offset: int | None, note: str = "") -> StorageError:
        """The error to raise for it."""
        error = NoSuchFileError if self.kind == "missing" else StorageError
        return error(path, self.reason + note, offset=offset)


def failure_of_status(status: int, denied: str, *, retry_after: str | None = None) -> Failure:
    """The failure that a status of HTTP stands for.

    Args:
        status: 400 or more.
        denied: what to do about credentials.
        retry_after: the header of this name.
    """
    if status in (404, 410):
        return Failure("missing", f"no such file (status {status})")
    if status in (401, 403, 407):
        return Failure(
            "denied", f"the credential is missing or has expired, or may not read this (status {status}); {denied}"
        )
    if status in _PASSING:
        pause_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
        return Failure("passing", f"the server answered with status {status}", pause_s)
    return Failure("final", f"the server refused the request with status {status}; check the address")


def failure_of(exc: BaseException, denied: str) -> Failure:
    """The failure that an exception of a driver stands for."""
    if isinstance(exc, Failure):
        return exc
    if isinstance(exc, TimeoutError) and not str(exc):
        return Failure("passing", "there was no answer in time")
    if isinstance(exc, FileNotFoundError):
        return Failure("missing", "no such file")
    causes = list(_causes(exc))
    if (status := next(filter(None, map(_status, causes)), None)) is not None:
        is_expired = status == 400 and any(map(_is_expired, causes))
        return failure_of_status(401 if is_expired else status, denied)
    names = " ".join(cls.__name__ for cause in causes for cls in type(cause).__mro__)
    text = f"{type(exc).__name__}: {_without_secrets(str(exc))}"
    if _DENIED_NAMES.search(names):
        return Failure("denied", f"the credential is missing or has expired, or may not read this ({text}); {denied}")
    if _PASSING_NAMES.search(names):
        return Failure("passing", text)
    return Failure("final", text)


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    for _ in range(5):
        if exc is None:
            return
        yield exc
        exc = exc.__cause__ or exc.__context__


def _status(exc: BaseException) -> int | None:
    """The status of HTTP that an exception of aiohttp, botocore, gcsfs or huggingface_hub holds."""
    response: Any = getattr(exc, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif type(exc).__name__ == "HttpError":
        status = getattr(exc, "code", None)  # aiohttp has a `code` too, in its errors about a body
    else:
        status = getattr(response, "status_code", None) or getattr(exc, "status", None)
    return int(status) if isinstance(status, int | str) and str(status).isdecimal() and int(status) >= 400 else None


def _is_expired(exc: BaseException) -> bool:
    """Whether S3 says so, with status 400 as for any wrong request."""
    response: Any = getattr(exc, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")


def _without_secrets(text: str) -> str:
    text = _QUERY.sub("", _URL.sub(lambda match: shown(match[0]), text))
    return printable(" ".join(text.split()))[:_MAX_TEXT]
