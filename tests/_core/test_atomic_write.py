import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_pipeline._core.atomic_write import locked, whole_file, write_whole


def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, wanted in (("für\n", "für\n".encode()), (b"\x00\xff", b"\x00\xff")):
        write_whole(path, content)
        assert path.read_bytes() == wanted
    assert list(tmp_path.iterdir()) == [path]


def test_until_all_is_written_the_old_file_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_after_an_error_only_the_old_file_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(path) as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("replace"), replace(source, target)))
    write_whole(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]


def test_one_at_a_time_holds_the_right_to_write_a_file(tmp_path: Path) -> None:
    path, waited = tmp_path / "number", []
    path.write_text("0")

    def add_one(_: int) -> None:
        with locked(path, lambda: waited.append(1)):
            number = int(path.read_text())
            time.sleep(0.005)
            path.write_text(str(number + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_one, range(20)))
    assert path.read_text() == "20" and waited


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".file.lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "file", lambda: None):
        pass
    assert not target.exists()
