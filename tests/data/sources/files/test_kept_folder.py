"""A large folder is scanned once and then found in the cache, but never as it was before a change."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.sources.files import file_systems, folder_scan, image_folder
from kd_pipeline.data.sources.files.file_systems import keep_folder_times
from tests.data.sources.helpers import error_of, make_files

TREE = ("cat/1.jpg", "cat/b/2.jpg", "cat/b/c/é 3.PNG", "dog/1.jpg", "dog/.hidden", "dog/notes.txt")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of which an index is kept, though it is small and new."""
    monkeypatch.setattr(image_folder, "_MIN_KEPT", 1)
    monkeypatch.setattr(folder_scan, "_MIN_AGE_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_files(tmp_path / "other", "4.jpg", "d/5.jpg")
    root = make_files(tmp_path / "images", *TREE)
    _wait()
    return root


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were listed, in order."""
    folders: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: [folders.append(folder), scandir(folder)][1])
    return folders


def _wait() -> None:
    """Wait until a change would have another time, on any file system that tests run on."""
    time.sleep(0.02)


def contents(source: ImageFolder) -> tuple[object, ...]:
    names = [source.name(index) for index in range(len(source))]
    labels = None if source.labels is None else source.labels.tolist()
    return (
        names,
        labels,
        source.classes,
        source.warnings,
        source.fingerprint,
        source.read(np.arange(len(source))).tolist(),
    )


@pytest.mark.parametrize("options", [{}, {"labeled": False}, {"classes": ("dog", "cow", "cat")}], ids=str)
def test_kept_folder_equals_scanned_folder(root, listed, options):
    first = contents(ImageFolder(root, **options))
    assert listed
    listed.clear()
    assert contents(ImageFolder(root, **options)) == first
    assert str(root) not in listed and len(first[0]) == 4 and len(first[3]) >= 1


def test_each_way_to_open_a_folder_has_its_own_index(root):
    labeled, unlabeled = ImageFolder(root), ImageFolder(root, labeled=False)
    given = ImageFolder(root, classes=("dog", "cat"))
    assert ImageFolder(root).labels.tolist() == labeled.labels.tolist() == [0, 0, 0, 1]
    assert ImageFolder(root, labeled=False).labels is unlabeled.labels is None
    assert ImageFolder(root, classes=("dog", "cat")).labels.tolist() == given.labels.tolist() == [1, 1, 1, 0]


def _file_to_folder(root: Path) -> None:
    (root / "dog/notes.txt").unlink()
    make_files(root, "dog/notes.txt/9.jpg")


def _with_old_time(root: Path) -> None:
    before = (root / "cat/b").stat()
    make_files(root, "cat/b/9.jpg")
    os.utime(root / "cat/b", ns=(before.st_atime_ns, before.st_mtime_ns))


def _swapped(root: Path) -> None:
    shutil.copytree(root / "cat/b", root.parent / "copy")
    make_files(root.parent / "copy", "9.jpg")
    (root / "cat/b").rename(root.parent / "away")
    (root.parent / "copy").rename(root / "cat/b")


CHANGES: dict[str, Callable[[Path], object]] = {
    "new file": lambda root: make_files(root, "cat/9.jpg"),
    "new file deep below": lambda root: make_files(root, "cat/b/c/9.jpg"),
    "new class": lambda root: make_files(root, "cow/9.jpg"),
    "new folder": lambda root: make_files(root, "dog/x/9.jpg"),
    "removed file": lambda root: (root / "cat/1.jpg").unlink(),
    "removed folder": lambda root: shutil.rmtree(root / "cat/b"),
    "renamed file": lambda root: (root / "cat/b/2.jpg").rename(root / "cat/b/9.jpg"),
    "renamed folder": lambda root: (root / "cat/b").rename(root / "cat/d"),
    "new link to a folder": lambda root: (root / "dog/link").symlink_to(root.parent / "other"),
    "folder in place of a file": _file_to_folder,
    "folder whose time was set back": _with_old_time,
    "folder in place of another": _swapped,
    "skipped file": lambda root: make_files(root, "dog/more.txt"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_folder_is_scanned_again(root, monkeypatch, change):
    old = contents(ImageFolder(root))
    change(root)
    _wait()
    found = contents(ImageFolder(root))
    assert found != old
    assert contents(ImageFolder(root)) == found
    monkeypatch.setattr(image_folder, "has_index", lambda key: False)
    assert contents(ImageFolder(root)) == found


def test_link_to_another_folder_is_noticed(root, listed):
    (root / "dog/link").symlink_to(root.parent / "other")
    _wait()
    old = contents(ImageFolder(root))
    listed.clear()
    assert contents(ImageFolder(root)) == old and not listed
    make_files(root.parent / "other/d", "9.jpg")
    assert len(ImageFolder(root)) == len(old[0]) + 1
    (root.parent / "other").rename(root.parent / "away")
    make_files(root.parent / "other", "6.jpg")
    assert len(ImageFolder(root)) == len(old[0]) - 1


def test_removed_folder_is_an_error_again(root):
    ImageFolder(root)
    shutil.rmtree(root)
    assert "cannot be listed (No such file or directory)" in error_of(ImageFolder, root)


NOT_KEPT: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "changed just now": lambda root, patch: patch.setattr(folder_scan, "_MIN_AGE_NS", 60 * 10**9),
    "few images": lambda root, patch: patch.setattr(image_folder, "_MIN_KEPT", 5),
    "link to an image": lambda root, patch: (root / "dog/2.jpg").symlink_to(root / "cat/1.jpg"),
    "link to another file": lambda root, patch: (root / "dog/2.txt").symlink_to(root / "cat/1.jpg"),
    "link to nothing": lambda root, patch: (root / "dog/2").symlink_to(root / "nothing"),
    "link beside the classes": lambda root, patch: (root / "2.jpg").symlink_to(root / "cat/1.jpg"),
    "other file system": lambda root, patch: patch.setattr(file_systems, "_RELIABLE", frozenset()),
    "no list of mounts": lambda root, patch: patch.setattr(file_systems, "_MOUNTS", str(root / "nothing")),
}


@pytest.mark.parametrize("change", NOT_KEPT.values(), ids=NOT_KEPT)
def test_folder_that_may_change_unnoticed_is_not_kept(root, tmp_path, monkeypatch, change):
    change(root, monkeypatch)
    _wait()
    ImageFolder(root)
    assert not (tmp_path / "cache").exists()


def test_file_system_is_that_of_the_nearest_mount(tmp_path, monkeypatch):
    lines = [
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
        f"23 22 0:5 / {tmp_path}/a\\040b rw - fuse.gcsfuse bucket rw",
        f"24 23 8:2 / {tmp_path}/a\\040b/c rw master:2 - xfs /dev/sdb rw",
        f"25 22 8:3 / {tmp_path}/d rw - vfat /dev/sdc rw",
        f"26 22 8:4 / {tmp_path}/d rw - nfs4 server:/x rw",
    ]
    (tmp_path / "mounts").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(file_systems, "_MOUNTS", str(tmp_path / "mounts"))
    for folder in ("a b/x", "a b/c/x", "d/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a b/x")
    found = {name: keep_folder_times(str(tmp_path / name)) for name in (".", "a b", "a b/x", "a b/c/x", "d/x", "link")}
    assert found == {".": True, "a b": False, "a b/x": False, "a b/c/x": True, "d/x": True, "link": False}
