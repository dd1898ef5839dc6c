from pathlib import Path

import pytest

from kd_pipeline.errors import DataError
from kd_pipeline.storage import expand
from kd_pipeline.storage.local import LocalStore

STORE = LocalStore()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-1.tar", "a-2.tar", "a-10.tar", "b.tar", "c[1].tar", "c1.tar"):
        (tmp_path / name).touch()
    return tmp_path


def names(pattern: object) -> list[str]:
    return [Path(path).name for path in expand(pattern, STORE)]  # type: ignore[arg-type]


def test_one_path_is_itself_without_a_look(folder):
    assert expand("nowhere.tar", STORE) == ["nowhere.tar"]
    assert expand(folder / "b.tar", STORE) == [str(folder / "b.tar")]


def test_glob_is_sorted(folder):
    assert names(folder / "a-*.tar") == ["a-1.tar", "a-10.tar", "a-2.tar"]
    assert names(f"{folder}/a-?.tar") == ["a-1.tar", "a-2.tar"]
    assert names(f"{folder}/[ab]*1.tar") == ["a-1.tar"]


def test_file_named_as_a_glob_is_itself(folder):
    assert names(f"{folder}/c[1].tar") == ["c[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("x-{008..010}.tar", ["x-008.tar", "x-009.tar", "x-010.tar"]),
        ("x-{9..10}.tar", ["x-9.tar", "x-10.tar"]),
        ("x-{0..1}.tar", ["x-0.tar", "x-1.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{,.gz}", ["x", "x.gz"]),
        ("{x}.tar", ["{x}.tar"]),
        ("{x}-{1..2}", ["{x}-1", "{x}-2"]),
        ("s3://bucket/x-{00..01}.tar", ["s3://bucket/x-00.tar", "s3://bucket/x-01.tar"]),
        ("http://[::1]:80/a.tar", ["http://[::1]:80/a.tar"]),
        ("https://host/a.tar?key=1*", ["https://host/a.tar?key=1*"]),
    ],
)
def test_braces_need_no_store(pattern, paths):
    assert expand(pattern, STORE) == paths


def test_list_keeps_its_order(folder):
    assert names([f"{folder}/b.tar", f"{folder}/a-{{2..2}}.tar", f"{folder}/c1*"]) == ["b.tar", "a-2.tar", "c1.tar"]


def test_braces_with_glob(folder):
    assert names(f"{folder}/{{b,a}}*.tar") == ["b.tar", "a-1.tar", "a-10.tar", "a-2.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{3..1}", r"counts down; write \{1..3\}"),
        ("x-{a..c}", "should be two numbers"),
        ("x-{0..99999999}", "is more than 10000000 files"),
        ("x-{a,{1..2}}", "cannot be nested"),
        ([], "is empty"),
        (["a", "./a"], "twice"),
        ("{a,a}", "twice"),
    ],
)
def test_wrong_patterns(pattern, message):
    with pytest.raises(DataError, match=message):
        expand(pattern, STORE)


def test_glob_without_a_match_says_what_is_near(folder):
    with pytest.raises(DataError, match=r"no file matches; .* holds something else.*b.tar"):
        expand(f"{folder}/d*.tar", STORE)
    with pytest.raises(DataError, match=r"no file matches; .* holds something else.*b.tar"):
        expand(f"{folder}/no-folder/b*.tar", STORE)
    with pytest.raises(DataError, match=r"no file matches; check the folder"):
        expand("/no-folder-a/b/c/d/b*.tar", STORE)
