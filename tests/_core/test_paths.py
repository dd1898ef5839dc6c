"""Paths as users write them: `~` is expanded, and what is no path is refused with what to do."""

from pathlib import Path

import pytest

from kd_pipeline._core.paths import find_url, local_path


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/data") == Path("/home/me/data")
    assert local_path(Path("~")) == Path("/home/me")


@pytest.mark.parametrize("path", ["x", "/x/y", "a~b/~", "./a b", "a$", "a$1", "C:/x", "C:\\x", "a:b", "x#1", ".."])
def test_other_paths_stay_as_written(path: str) -> None:
    assert local_path(path) == Path(path) and find_url(path) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "is empty"),
        ("a\0b", "NUL"),
        ("None", "write null"),
        ("$DATA/x", "has the variable $DATA"),
        ("x/${DATA}/y", "has the variable ${DATA}"),
        ("~nobody-of-this-name/x", "no such user has a home folder"),
        ("s3://bucket/train", "s3://bucket/train is a URL, and only files on a local or mounted disk are read"),
        ("s3://bucket/train/1.jpg", "(aws s3 sync s3://bucket/train FOLDER)"),
        ("gs://bucket/train", "gcloud storage rsync"),
        ("https://x.org/a.tar", "(wget https://x.org/a.tar)"),
        ("https://x.org/$(touch owned);a.tar", "(wget 'https://x.org/$(touch owned);a.tar')"),
        ("hf://datasets/x", "is a URL"),
        ("file:///data/x", "write the path alone: /data/x"),
        ("file://localhost/data/x", "write the path alone: /data/x"),
    ],
)
def test_what_is_no_path_is_refused(path: str, words: str) -> None:
    for written in {path, str(Path(path))} if path else {path}:
        with pytest.raises(ValueError) as info:
            local_path(written)
        assert words in str(info.value)
