import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_pipeline._core.atomic_write import atomic_file, locked, write_atomic


def test_write_atomic_replaces_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, expected in (("für\n", "für\n".encode()), (b"\x00\xff", b"\x00\xff")):
        write_atomic(path, content)
        assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_old_file_stays_until_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_error_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_fsync_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("replace"), replace(source, target)))
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]


def test_lock_is_exclusive(tmp_path: Path) -> None:
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


def test_lock_does_not_follow_symlink(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".file.lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "file", lambda: None):
        pass
    assert not target.exists()
