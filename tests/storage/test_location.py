"""Settings that are paths or URLs keep both as they were written."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kd_pipeline._core.settings import Settings
from kd_pipeline.storage import Location
from kd_pipeline.storage.location import folder_of, join


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


@pytest.mark.parametrize(
    ("folder", "name", "path"),
    [
        ("/data", "a/b.jpg", "/data/a/b.jpg"),
        ("/data", "../b.jpg", "/data/../b.jpg"),
        ("s3://bucket/data", "a b.jpg", "s3://bucket/data/a b.jpg"),
        ("s3://bucket/data/", "./a//b.jpg", "s3://bucket/data/a/b.jpg"),
        ("s3://bucket/x/y", "../../../b.jpg", "s3://bucket/b.jpg"),
        ("s3://bucket", "b#?.jpg", "s3://bucket/b#?.jpg"),
        ("https://me:p@host", "b.jpg", "https://me:p@host/b.jpg"),
        ("https://host/a%20b/?token=x", "c d#?%.jpg", "https://host/a%20b/c%20d%23%3F%25.jpg?token=x"),
        ("https://host/x", "/data/b.jpg", "/data/b.jpg"),
        ("https://host/x", "s3://bucket/b.jpg", "s3://bucket/b.jpg"),
        ("/data", "https://host/b.jpg?a=1", "https://host/b.jpg?a=1"),
    ],
)
def test_names_are_joined_to_folders(folder: str, name: str, path: str) -> None:
    assert join(folder, name) == path


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("/data/l.csv", "/data"),
        ("l.csv", ""),
        ("s3://bucket/l.csv", "s3://bucket"),
        ("https://me:p@host/x/l.csv?token=abc/d", "https://me:p@host/x"),
    ],
)
def test_folder_of_a_file(path: str, folder: str) -> None:
    assert folder_of(path) == folder
