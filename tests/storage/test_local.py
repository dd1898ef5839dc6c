import os
from pathlib import Path

import pytest

from kd_pipeline.errors import FileTooLargeError, NoSuchFileError, StorageError
from kd_pipeline.storage import ByteRange, FileStat, FolderEntry, open_store, read_ranges
from kd_pipeline.storage.local import LocalStore

CONTENT = bytes(range(200))


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    return str(tmp_path / "a.bin")


@pytest.fixture
def store(path: str) -> LocalStore:
    store = open_store(path)
    assert isinstance(store, LocalStore)
    return store


def test_ranges_are_exact(store, path):
    assert store.stat(path).num_bytes == 200
    assert store.read(path) == CONTENT
    assert store.read(path, 10, 20) == CONTENT[10:30]
    assert store.read(path, 150) == CONTENT[150:]
    assert store.read(path, 200, 0) == b""


def test_file_that_is_too_large_is_not_read(store, path):
    assert store.read(path, max_bytes=200) == CONTENT
    with pytest.raises(FileTooLargeError, match="it has 200 bytes, and at most 199 are read"):
        store.read(path, max_bytes=199)
    assert isinstance(read_ranges(store, [ByteRange(path, max_bytes=199)])[0], FileTooLargeError)


def test_folder_is_listed(store, path, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").touch()
    assert store.list_folder(str(tmp_path)) == [FolderEntry("a.bin", 200), FolderEntry("b", None)]
    with pytest.raises(NoSuchFileError):
        store.list_folder(f"{tmp_path}/not")


@pytest.mark.parametrize(("start", "length", "left"), [(190, 11, 10), (300, 5, 0), (0, 201, 200)])
def test_range_past_the_end_is_an_error(store, path, start, length, left):
    with pytest.raises(StorageError, match=f"{length} bytes were expected here and {left} are left") as caught:
        store.read(path, start, length)
    assert (caught.value.path, caught.value.offset) == (path, start)


def test_file_that_is_cut_while_open_is_an_error(store, path):
    store.read(path, 0, 10)
    os.truncate(path, 100)
    with pytest.raises(StorageError, match="was cut"):
        store.read(path, 90, 20)


def test_missing_file(store, path):
    for call in (store.stat, store.read):
        with pytest.raises(NoSuchFileError, match="no such file"):
            call(f"{path}.not")


def test_only_regular_files_are_read(store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(StorageError, match="cannot be read"):
            store.read(str(path), 0, 1)


def test_file_that_differs_from_the_expected_is_an_error(store, path):
    expected = store.stat(path)
    assert store.read(path, 0, 5, expected=expected) == CONTENT[:5]
    with pytest.raises(StorageError, match="changed since it was indexed"):
        store.read(path, 0, 5, expected=FileStat(199, expected.version))
    with pytest.raises(StorageError, match="changed since it was indexed"):
        store.read(path, expected=FileStat(200, "1"))


def test_file_that_was_replaced_is_read_anew(store, path, tmp_path):
    old = store.stat(path)
    store.read(path, 0, 5, expected=old)
    store.write(path, b"other")
    new = store.stat(path)
    assert store.read(path, 0, 5, expected=new) == b"other"
    with pytest.raises(StorageError, match="200 bytes then, 5 now"):
        store.read(path, 0, 5, expected=old)


def test_open_files_are_few_and_closed(store, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(300):
        (tmp_path / f"{number}").write_bytes(b"x")
        store.read(str(tmp_path / f"{number}"), 0, 1)
    assert len(os.listdir("/proc/self/fd")) <= before + 128
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_write_makes_folders(store, tmp_path):
    path = str(tmp_path / "new" / "part" / "a")
    store.write(path, b"abc")
    assert store.read(path) == b"abc"
    assert store.find(str(tmp_path / "new" / "*" / "?")) == [path]


def test_write_that_fails(store, path):
    with pytest.raises(StorageError, match="cannot be written"):
        store.write(f"{path}/b", b"")
