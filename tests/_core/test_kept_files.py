import os
from pathlib import Path

import pytest

from kd_pipeline._core.kept_files import kept_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kd_pipeline" / "exports"


def test_folder_is_made_once_for_each_key(cache: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    assert kept_folder("exports", "a", make) == kept_folder("exports", "a", make) == cache / "a"
    assert (kept_folder("exports", "b", make) / "file").read_text() == "2"
    assert (cache / "a" / "file").read_text() == "1"
    assert len(made) == 2


def test_nothing_is_kept_of_a_failure(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept_folder("exports", "a", fail)
    assert not [each for each in cache.iterdir() if each.is_dir()]
    assert kept_folder("exports", "a", lambda folder: (folder / "whole").touch()) == cache / "a"
    assert [each.name for each in (cache / "a").iterdir()] == ["whole"]


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    kept_folder("exports", "b", lambda folder: None)
    leftover = cache / ".a.building"
    leftover.mkdir()
    (leftover / "half").touch()
    assert os.listdir(kept_folder("exports", "a", lambda folder: (folder / "whole").touch())) == ["whole"]


def test_without_a_cache_it_lasts_for_this_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o777)
    first = kept_folder("exports", "a", lambda folder: (folder / "file").touch())
    assert tmp_path not in first.parents
    assert kept_folder("exports", "a", lambda folder: None) == first
    assert (first / "file").is_file()
    assert "lasts only for this process" in caplog.text
