"""Settings that are paths or URLs keep both as they were written."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kd_pipeline._core.settings import Settings
from kd_pipeline.storage import Location


class Where(Settings):
    at: Location | tuple[Location, ...]


@pytest.mark.parametrize("url", ["s3://bucket//a", "https://me:abc@host/x?token=abc"])
def test_url_is_kept(url: str) -> None:
    where = Where.model_validate_json(Where(at=url).model_dump_json(), strict=True)
    assert where.at == url and "abc" not in repr(where)


def test_local_path_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Where(at=["~/a", Path("b/c"), "s3://d"]).at == (Path("/home/me/a"), Path("b/c"), "s3://d")


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(ValidationError, match="has lost a slash"):
        Where(at=Path("s3://bucket/a"))
