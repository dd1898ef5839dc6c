"""Paths as users write them: `~` is expanded, and what is no path is refused with what to do."""

from pathlib import Path

import pytest

from kd_pipeline._core.paths import Url, find_url, local_path, path_or_url


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
        ("s3://bucket/train", "s3://bucket/train is a URL, and here only files on a local or mounted disk are read"),
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


@pytest.mark.parametrize(
    "url", ["s3://bucket//a", "https://me:pa$word@h/x?token=a#b", "hf://datasets/me/x", "http://[::1]:8/a"]
)
def test_url_stays_as_written(url: str) -> None:
    assert path_or_url(url) == Url(url) and isinstance(path_or_url(url), Url)


def test_repr_of_url_has_no_credentials() -> None:
    assert repr(Url("https://me:abc@h/x?token=abc")) == "'https://h/x'"


def test_path_is_local_where_a_url_may_be() -> None:
    assert path_or_url("a/b") == path_or_url(Path("a/b")) == Path("a/b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (Path("s3://me:abc@bucket/x?token=abc"), "s3://bucket/x has lost a slash"),
        ("s3:///x", "without a host or bucket"),
        ("https://", "without a host or bucket"),
        ("file:///data/x", "write the path alone: /data/x"),
        ("s3://$BUCKET/x", "has the variable $BUCKET"),
        ("$DATA/x", "has the variable $DATA"),
    ],
)
def test_what_is_neither_path_nor_url_is_refused(text: str | Path, words: str) -> None:
    with pytest.raises(ValueError) as info:
        path_or_url(text)
    assert words in str(info.value) and "abc" not in str(info.value)
