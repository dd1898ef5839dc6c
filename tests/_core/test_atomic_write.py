import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_pipeline._core.atomic_write import atomic_file, locked, write_atomic
from kd_pipeline._core.files import NotAFileError


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


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_permissions_are_those_asked_for_less_the_umask(tmp_path: Path, umask: int) -> None:
    private, shared = tmp_path / "private", tmp_path / "shared"
    private.touch(0o666)
    before = os.umask(umask)
    try:
        write_atomic(private, "x", permissions=0o600)
        write_atomic(shared, "x")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600
    assert shared.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_link_is_replaced_and_not_written_through(tmp_path: Path, target: str) -> None:
    (tmp_path / "victim").write_text("mine")
    path = tmp_path / "file"
    path.symlink_to(tmp_path / target)
    write_atomic(path, "new")
    assert not path.is_symlink() and path.read_text() == "new"
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(NotAFileError, match="this is a pipe and no file"):
        write_atomic(path, "new")
    assert path.is_fifo() and list(tmp_path.iterdir()) == [path]


def test_lock_that_is_a_link_or_a_pipe_says_what_to_do(tmp_path: Path) -> None:
    lock, target = tmp_path / ".file.lock", tmp_path / "target"
    lock.symlink_to(target)
    with pytest.raises(NotAFileError) as caught, locked(tmp_path / "file", lambda: None):
        pass
    assert caught.value.strerror == f"this is a link, and nothing is written through links; delete it ({lock})"
    assert not target.exists()
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(NotAFileError, match="this is a pipe"), locked(tmp_path / "file", lambda: None):
        pass


def test_signal_ends_the_wait_for_a_lock(tmp_path: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    waited = []
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with locked(tmp_path / "file", lambda: None), pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with locked(tmp_path / "file", lambda: waited.append(1)):
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert waited
