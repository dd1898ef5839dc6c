import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_pipeline.errors import StorageError
from kd_pipeline.storage import (
    ByteRange,
    FileStat,
    StoreSettings,
    cache_folder,
    downloads,
    open_store,
    read_ranges,
    remote,
    stat_files,
)
from kd_pipeline.storage.cache_folder import CacheFolder
from kd_pipeline.storage.cached import CachedStore
from tests.http_server import FolderServer
from tests.waiting import wait_until

SIZE = 1000
KEY = "0" * 40


def content_of(name: str) -> bytes:
    return (name.encode() * SIZE)[:SIZE]


@pytest.fixture
def urls(server: FolderServer) -> list[str]:
    for name in "abcde":
        (server.folder / name).write_bytes(content_of(name))
    return [f"{server.url}/{name}" for name in "abcde"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store_of(folder: Path) -> Callable[..., CachedStore]:
    def store_of(cache_size: int | str = 10**6, *, whole: bool = False) -> CachedStore:
        settings = StoreSettings(deadline_s=20, cache_dir=folder, cache_size=cache_size)
        store = open_store("http://host/", settings, whole=whole)
        assert isinstance(store, CachedStore)
        return store

    return store_of


def fetch(store: CachedStore, *urls: str) -> None:
    """Read ahead, and wait for it."""
    store.prefetch(urls)
    wait_until(lambda: not store._state.downloads.noted)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def files_in(folder: Path) -> int:
    return len(files(folder))


def test_file_that_was_read_ahead_is_not_requested_again(store_of, urls, server):
    store = store_of()
    fetch(store, urls[0])
    server.requests.clear()
    expected = store._state.stats[urls[0]]
    assert store.read(urls[0], 5, 10) == content_of("a")[5:15]
    assert store.read(urls[0], expected=expected) == content_of("a")
    again = store_of()  # as in the next run
    assert again.read(urls[0], 5, 10, expected=expected) == content_of("a")[5:15]
    assert server.requests == []


def test_other_files_are_read_in_ranges(store_of, urls, server, folder):
    store = store_of()
    fetch(store, urls[0])
    server.requests.clear()
    ranges = [ByteRange(url, 3, 4, store.stat(url)) for url in urls]
    assert read_ranges(store, ranges) == [content_of(name)[3:7] for name in "abcde"]
    assert [request.range for request in server.requests].count("bytes=3-6") == 4
    assert files_in(folder) == 1


def test_whole_files_are_kept_from_the_first_read_on(store_of, urls, server, folder):
    store = store_of(whole=True)
    assert store.read(urls[0]) == content_of("a")  # all of it
    assert store.read(urls[1], 3, 4) == content_of("b")[3:7]  # the rest of it is downloaded
    wait_until(lambda: not store._state.downloads.noted)
    server.requests.clear()
    assert store.read(urls[0], 3, 4) + store.read(urls[1], 5, 6) == content_of("a")[3:7] + content_of("b")[5:11]
    assert server.requests == [] and files_in(folder) == 2


def test_files_that_fit_are_kept_when_much_of_them_was_read(store_of, urls, server, folder):
    for cache_size, num_kept in ((5 * SIZE, 1), (4 * SIZE, 0)):
        store = store_of(cache_size)
        assert not [stat for stat in stat_files(store, urls) if isinstance(stat, StorageError)]
        store.read(urls[0], 0, 49)
        assert store._state.downloads.noted == set()
        store.read(urls[0], 0, 1)
        wait_until(lambda: not store._state.downloads.noted)  # noqa: B023
        assert files_in(folder) == num_kept
        shutil.rmtree(folder)


def test_failed_stat_is_the_error_of_its_range(store_of, urls):
    store = store_of(whole=True)
    missing, content = store.read_many([ByteRange(f"{urls[0]}.not"), ByteRange(urls[0])])
    assert "no such file" in str(missing) and content == content_of("a")


def test_new_version_is_another_file(store_of, urls, server):
    store = store_of()
    fetch(store, urls[0])
    old = store.stat(urls[0])
    (server.folder / "a").write_bytes(content_of("x"))
    again = store_of()
    new = again.stat(urls[0])
    assert store.read(urls[0], 0, 5, expected=old) == content_of("a")[:5]  # what was indexed, still
    assert again.read(urls[0], 0, 5, expected=new) == content_of("x")[:5]
    fetch(again, urls[0])
    assert again.read(urls[0], expected=new) == content_of("x")


def test_file_without_a_version_is_not_kept(store_of, urls, server, folder):
    server.has_etags = False
    store = store_of(whole=True)
    assert store.read(urls[0]) == content_of("a")
    fetch(store, urls[0])
    assert not folder.exists()


def test_range_is_read_from_a_download_that_has_it(store_of, urls, server, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 10)
    store = store_of()
    expected = store.stat(urls[0])
    read_many, go_on = store._remote.read_many, threading.Event()

    def hold(ranges, *args):
        if [each.start for each in ranges] == [40, 50, 60, 70]:
            go_on.wait(20)
        return read_many(ranges, *args)

    monkeypatch.setattr(store._remote, "read_many", hold)
    store.prefetch(urls[:1])
    wait_until(lambda: (download := store._state.downloads.parts.get(urls[0])) and download.num_done == 40)
    server.requests.clear()
    assert store.read(urls[0], 30, 10, expected=expected) == content_of("a")[30:40]
    assert server.requests == []
    assert store.read(urls[0], 31, 10, expected=expected) == content_of("a")[31:41]
    with pytest.raises(StorageError, match="changed"):
        store.read(urls[0], 3, 4, expected=FileStat(SIZE, "other"))
    assert len(server.requests) == 2
    go_on.set()
    wait_until(lambda: not store._state.downloads.noted)


@pytest.mark.parametrize("fault", ["cut", 500, "short range"])
def test_broken_download_leaves_nothing(store_of, urls, server, folder, fault):
    store = store_of()
    store.stat(urls[0])
    server.fail(fault, times=100)
    store._remote._settings = StoreSettings(deadline_s=0.3)
    fetch(store, urls[0])
    assert files_in(folder) == 0
    server.recover()
    assert store.read(urls[0]) == content_of("a")


def test_file_that_changes_while_it_is_downloaded_is_not_kept(store_of, urls, server, folder, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 10)
    store = store_of()
    store.stat(urls[0])
    server.etags["/a"] = '"other"'
    fetch(store, urls[0])
    assert files_in(folder) == 0


def test_cached_file_of_a_wrong_size_is_read_again(store_of, urls, folder):
    store = store_of()
    fetch(store, *urls[:2])
    expected = store.stat(urls[0])
    for path in files(folder):
        os.truncate(path, 900)
    assert store.read(urls[0], 500, 500) == content_of("a")[500:]  # of a store that had looked at it
    assert store_of().read(urls[0], expected=expected) == content_of("a")
    assert store_of().read(urls[1], 0, 10, expected=store.stat(urls[1])) == content_of("b")[:10]
    assert all(path.stat().st_size == SIZE for path in files(folder) if not path.name.endswith(".part"))


def test_oldest_files_are_deleted_and_stay_readable(store_of, urls, server, folder, monkeypatch):
    monkeypatch.setattr(cache_folder, "_UNLISTED", 0.0)
    store = store_of(3 * SIZE)
    fetch(store, *urls[:3])
    store.read(urls[0], 0, 1)
    store.read(urls[1], 0, 1)
    keys = {url: downloads._key_of(url, store.stat(url)) for url in urls}
    for age, url in enumerate([urls[1], urls[2], urls[0]]):
        os.utime(folder / keys[url], (10**9 + age, 10**9 + age))
    fetch(store, urls[3])
    assert not (folder / keys[urls[1]]).exists()
    assert (folder / keys[urls[0]]).exists() and (folder / keys[urls[3]]).exists()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3 * SIZE
    server.requests.clear()
    assert store.read(urls[1], 5, 10) == content_of("b")[5:15]  # it is open
    assert server.requests == []
    monkeypatch.setattr(downloads, "_TOUCH_S", 0.0)
    assert store.read(urls[1], 5, 10) == content_of("b")[5:15]
    assert len(server.requests) == 1


def test_file_larger_than_the_cache_is_read_in_ranges(store_of, urls, folder):
    store = store_of(SIZE - 1)
    fetch(store, urls[0])
    assert files_in(folder) == 0
    assert store.read(urls[0], 3, 4) == content_of("a")[3:7]


def test_largest_limit_holds_for_all(store_of, urls, server, folder):
    large = store_of(5 * SIZE)
    fetch(large, *urls[:4])
    small = store_of(SIZE)
    fetch(small, urls[4])
    assert files_in(folder) == 5
    del large, small
    (server.folder / "f").write_bytes(content_of("f"))
    fetch(store_of(2 * SIZE), f"{server.url}/f")
    assert files_in(folder) <= 2


def test_full_disk_deletes_first_and_then_reads_in_ranges(store_of, urls, folder, monkeypatch, caplog):
    allocate = cache_folder._allocate

    def full(descriptor: int, num_bytes: int) -> None:
        if files_in(folder) > 2:  # and the part itself
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, num_bytes)

    monkeypatch.setattr(cache_folder, "_allocate", full)
    store = store_of()
    fetch(store, *urls[:4])
    assert 1 <= files_in(folder) <= 2 and caplog.records == []

    def broken(descriptor: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_folder, "_allocate", broken)
    store = store_of()
    with caplog.at_level(logging.WARNING):
        fetch(store, *urls)
    assert [store.read(url) for url in urls] == [content_of(name) for name in "abcde"]
    assert len(caplog.records) == 1 and "No space left on device; make room, or set storage.cache_dir" in caplog.text


def test_full_disk_while_writing_leaves_nothing(store_of, urls, folder, monkeypatch, caplog):
    def broken(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", broken)
    store = store_of()
    fetch(store, urls[0])
    assert files_in(folder) == 0 and "No space left" in caplog.text
    assert store.read(urls[0]) == content_of("a")


def test_folder_that_cannot_be_made_is_a_warning(store_of, urls, folder, caplog):
    folder.write_bytes(b"")
    store = store_of()
    fetch(store, urls[0])
    assert store.read(urls[0], 0, 3) == content_of("a")[:3] and "set storage.cache_dir" in caplog.text


def test_signed_urls_are_one_file(store_of, urls, server):
    store = store_of()
    fetch(store, f"{urls[0]}?signature=1")
    expected = store.stat(urls[0])
    server.requests.clear()
    assert store_of().read(f"{urls[0]}?signature=2", 3, 4, expected=expected) == content_of("a")[3:7]
    assert server.requests == []


def in_fork(function: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def test_one_of_several_processes_downloads(store_of, urls, server):
    server.latency_s = 0.1
    children = [in_fork(lambda: fetch(store_of(), urls[0])) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert [request.range for request in server.requests].count(f"bytes=0-{SIZE - 1}") == 1


def test_killed_download_blocks_nobody(folder):
    child = in_fork(lambda: CacheFolder(folder, 10**6).add(KEY, SIZE, lambda descriptor: time.sleep(60), 1))
    part = folder / f"{KEY}.part"
    wait_until(lambda: part.exists() and part.stat().st_size == SIZE)
    shared = CacheFolder(folder, 10**6)
    assert shared.add(KEY, SIZE, lambda descriptor: None, patience_s=0.2) is None  # it waits, but not for ever
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert shared.find(KEY, SIZE) is None
    added = shared.add(KEY, SIZE, lambda descriptor: downloads._write_all(descriptor, content_of("a"), 0), 20)
    assert added is not None and added.read_bytes() == content_of("a")


def test_who_waited_for_a_failed_download_begins_anew(folder):
    shared = CacheFolder(folder, 10**6)
    waiting = threading.Thread(target=shared.add, args=(KEY, SIZE, lambda descriptor: None, 20))

    def fail(descriptor: int) -> None:
        waiting.start()
        time.sleep(0.1)
        raise StorageError("a", "failed")

    with pytest.raises(StorageError, match="failed"):
        shared.add(KEY, SIZE, fail, 20)
    waiting.join()
    assert shared.find(KEY, SIZE) is not None


def test_part_of_a_killed_download_is_deleted_for_room(folder):
    shared = CacheFolder(folder, 2 * SIZE)
    (folder / "left.part").write_bytes(bytes(SIZE))
    for key in "abc":
        shared.add(key, SIZE, lambda descriptor: None, 20)
    assert not (folder / "left.part").exists() and (folder / "c").exists()


def test_fork_while_downloading_has_its_own_downloads(store_of, urls, server):
    server.latency_s = 0.2
    store = store_of()
    store.prefetch(urls)
    child = in_fork(lambda: fetch(store, *urls))
    assert os.waitpid(child, 0)[1] == 0
    wait_until(lambda: not store._state.downloads.noted)


def test_large_files_are_downloaded_in_chunks(store_of, urls, server, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 90)
    monkeypatch.setattr(remote, "CHUNK_BYTES", 90)
    store = store_of()
    fetch(store, urls[0])
    num_requests = len(server.requests)
    assert num_requests == 1 + 12 and store.read(urls[0], 0, SIZE) == content_of("a")
    assert len(server.requests) == num_requests


@pytest.mark.parametrize(("size", "num_bytes"), [(0, 0), ("1.5 kB", 1500), ("20 GB", 20 * 10**9), ("2TB", 2 * 10**12)])
def test_sizes(size, num_bytes):
    assert StoreSettings(cache_size=size).cache_bytes == num_bytes


@pytest.mark.parametrize("size", ["20 GiB", "-1", "much", -5])
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match="should be a number of bytes, or one with kB, MB, GB or TB"):
        StoreSettings(cache_size=size)
