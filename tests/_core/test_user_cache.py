import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from kd_pipeline._core.files import UntrustedFileError
from kd_pipeline._core.user_cache import user_cache


@pytest.fixture
def group_umask() -> Iterator[None]:
    """The default of distributions where each user has a group."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_every_created_folder_is_private(group_umask: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    folder = user_cache("engines")
    assert folder == tmp_path / "new" / "cache" / "kd_pipeline" / "engines"
    made = (folder, *folder.parents[:3])
    assert [each.stat().st_mode & 0o777 for each in made] == [0o700] * 4
    assert user_cache("engines") == folder


@pytest.mark.parametrize("loose", ["cache", "cache/kd_pipeline", "cache/kd_pipeline/engines"])
def test_folder_that_others_can_write_is_refused(loose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / loose).mkdir(parents=True)
    (tmp_path / loose).chmod(0o775)
    with pytest.raises(UntrustedFileError, match=f"group may write to {tmp_path / loose};"):
        user_cache("engines")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kd_pipeline").mkdir(mode=0o700)
    os.chown(tmp_path / "kd_pipeline", 12345, 12345)
    with pytest.raises(UntrustedFileError, match="belongs to user 12345"):
        user_cache("engines")
    assert not any((tmp_path / "kd_pipeline").iterdir())


@pytest.mark.parametrize("relative", ["", "cache", "./cache"])
def test_relative_folder_is_not_used(relative: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache("engines") == tmp_path / "home" / ".cache" / "kd_pipeline" / "engines"


def test_user_without_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError, match="home"):
        user_cache("engines")
