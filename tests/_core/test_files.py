import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_pipeline._core.files import (
    NotAFileError,
    UntrustedFileError,
    check_trusted_folder,
    open_own,
    open_regular,
    open_trusted,
    read_regular,
    read_trusted,
)

STRANGER = 12345


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `path` belong to somebody else, or, without the right to, this process run as somebody else."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make_pipe, "a pipe"), (make_socket, "a socket"), (make_device, "a device"), (Path.mkdir, "a directory")],
)
@pytest.mark.parametrize("read", [open_regular, lambda path: read_regular(path, max_bytes=10)])
def test_what_is_no_file_is_refused(
    make: Callable[[Path], None],
    kind: str,
    read: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 bytes
    make(Path("it"))
    with pytest.raises(NotAFileError) as caught:
        read(Path("it"))
    assert caught.value.strerror == f"this is {kind} and no file"


def test_reading_stops_at_limit(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NotAFileError, match="it has 1099511627776 bytes, and at most 1000 are read"):
        read_regular(path, max_bytes=1000)
    with pytest.raises(NotAFileError, match="at most 1000"):
        read_trusted(path, max_bytes=1000)
    path.write_bytes(b"x" * 1000)
    assert read_regular(path, max_bytes=1000) == read_trusted(path, max_bytes=1000) == b"x" * 1000


def test_link_is_followed_for_reading_and_not_for_trust(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"content")
    (tmp_path / "link").symlink_to("target")
    assert read_regular(tmp_path / "link", max_bytes=100) == b"content"
    with pytest.raises(NotAFileError, match=f"this is a link; give the file itself, {tmp_path}/target"):
        open_trusted(tmp_path / "link")


@pytest.mark.parametrize(("mode", "who"), [(0o664, "group"), (0o646, "others"), (0o666, "group and others")])
def test_file_that_others_can_write_is_not_trusted(mode: int, who: str, tmp_path: Path) -> None:
    path = tmp_path / "it's"
    path.write_bytes(b"content")
    path.chmod(mode)
    with pytest.raises(UntrustedFileError, match=f"^[^:]*{who} may write to {path}; if nobody did, chmod ") as caught:
        open_trusted(path)
    advice = str(caught.value.strerror).partition("if nobody did, ")[2]
    assert os.system(advice) == 0
    assert read_trusted(path, max_bytes=10) == b"content"


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_folder_above_that_others_can_write_is_not_trusted(level: int, mode: int, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    folders[-1].mkdir(parents=True)
    (folders[-1] / "file").write_bytes(b"content")
    read_trusted(folders[-1] / "file", max_bytes=10)
    folders[level].chmod(mode)
    with pytest.raises(UntrustedFileError, match=f"may write to {folders[level]};"):
        open_trusted(folders[-1] / "file")
    with pytest.raises(UntrustedFileError, match=f"may write to {folders[level]};"):
        check_trusted_folder(folders[-1])
    folders[level].chmod(0o1777)  # as /tmp: nobody else can replace what is in there
    read_trusted(folders[-1] / "file", max_bytes=10)


@pytest.mark.parametrize("which", ["file", "folder", "link"])
def test_what_somebody_else_owns_is_not_trusted(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("folder")
    path = tmp_path / "link" / "file"
    assert read_trusted(path, max_bytes=10) == b"content"
    give_away({"file": path, "folder": tmp_path / "folder", "link": tmp_path / "link"}[which], monkeypatch)
    with pytest.raises(UntrustedFileError, match="belongs to user"):
        open_trusted(path)


def test_folder_links_are_followed_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "file").write_bytes(b"content")
    (tmp_path / "relative").symlink_to("real/deep")
    (tmp_path / "absolute").symlink_to(tmp_path / "relative")
    (tmp_path / "loop").symlink_to("loop")
    # `..` after a link is the parent of what it points to.
    assert read_trusted(tmp_path / "absolute" / ".." / "file", max_bytes=10) == b"content"
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_trusted(tmp_path / "loop" / "file")


@pytest.mark.slow
def test_links_that_move_never_let_a_strangers_file_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode())
    (tmp_path / "theirs" / "file").chmod(0o666)
    link, stop = tmp_path / "link", threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for name in ("mine", "theirs"):
                (tmp_path / "next").symlink_to(name)
                os.replace(tmp_path / "next", link)

    link.symlink_to("mine")
    flipping = threading.Thread(target=flip)
    flipping.start()
    read, refused = set(), 0
    try:
        for _ in range(3000):
            try:
                read.add(read_trusted(link / "file", max_bytes=10))
            except UntrustedFileError:
                refused += 1
    finally:
        stop.set()
        flipping.join()
    assert read == {b"mine"}
    assert refused


@pytest.mark.parametrize("mode", ["ab", "w+b", "r+b"])
def test_nothing_is_written_through_link_or_pipe(mode: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFileError, match="this is a link"):
        open_own(tmp_path / "link", mode)  # type: ignore[arg-type]
    with pytest.raises(NotAFileError, match="this is a pipe"):
        open_own(tmp_path / "pipe", mode)  # type: ignore[arg-type]
    assert victim.read_bytes() == b"precious"


def test_own_file_is_created_truncated_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        open_own(path, "r+b")
    for mode, wanted in (("ab", b"x"), ("ab", b"xx"), ("w+b", b"x"), ("r+b", b"x")):
        with open_own(path, mode, permissions=0o600) as file:  # type: ignore[arg-type]
            file.write(b"x")
        assert path.read_bytes() == wanted
    assert path.stat().st_mode & 0o777 == 0o600
