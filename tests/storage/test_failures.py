import pytest

from kd_pipeline.storage.failures import failure_of, failure_of_status


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code}) when calling the GetObject operation")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As gcsfs's."""

    code = 401


class NoCredentialsError(Exception):
    """As botocore's."""


class RefreshError(Exception):
    """As google.auth's."""


class ServerDisconnectedError(Exception):
    """As aiohttp's."""


def wrapped(exc: Exception) -> Exception:
    """As s3fs raises what botocore does."""
    outer = OSError(5, "Input/output error")
    outer.__cause__ = exc
    return outer


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (wrapped(ClientError("SlowDown", 503)), "passing"),
        (wrapped(ClientError("ExpiredToken", 400)), "denied"),
        (wrapped(ClientError("AccessDenied", 403)), "denied"),
        (wrapped(ClientError("PermanentRedirect", 301)), "final"),
        (wrapped(ClientError("InvalidArgument", 400)), "final"),
        (HttpError(), "denied"),
        (NoCredentialsError(), "denied"),
        (RefreshError(), "denied"),
        (PermissionError("Forbidden"), "denied"),
        (FileNotFoundError("a"), "missing"),
        (TimeoutError(), "passing"),
        (ConnectionResetError(), "passing"),
        (ServerDisconnectedError(), "passing"),
        (ValueError("no"), "final"),
    ],
)
def test_kinds(exc, kind):
    assert failure_of(exc, "renew it").kind == kind


@pytest.mark.parametrize(
    "text",
    [
        "cannot get https://user:hunter2@host/a?X-Amz-Signature=hunter2",
        "url=URL('https://host/a?sig=hunter2#hunter2')",
        "GET /a?sig=hunter2 failed",
        "s3://hunter2:hunter2@host/a",
    ],
)
def test_reasons_have_no_credentials(text):
    for exc in (ValueError(text), PermissionError(text), ServerDisconnectedError(text)):
        reason = failure_of(exc, "renew it").reason
        assert "hunter2" not in reason and "/a" in reason


def test_long_reasons_are_one_short_line():
    assert len(failure_of(ValueError("a\nb" * 1000), "").reason) < 300


def test_server_may_ask_to_wait():
    assert failure_of_status(503, "", retry_after="7").pause_s == 7
    assert failure_of_status(503, "", retry_after="Wed, 21 Oct 2026 07:28:00 GMT").pause_s == 0
