import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from kd_pipeline.errors import ConfigError, NoSuchFileError, StorageError
from kd_pipeline.storage import ByteRange, FileStat, Store, StoreSettings, http, open_store, read_ranges, remote
from tests.http_server import FolderServer
from tests.storage.forked import assert_reads_in_a_fork

CONTENT = bytes(range(256)) * 4
DEADLINE_S = 0.5
MARGIN_S = 2.0


@pytest.fixture
def url(server: FolderServer) -> str:
    (server.folder / "a.bin").write_bytes(CONTENT)
    return f"{server.url}/a.bin"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url, StoreSettings(deadline_s=20, cache_size=0))


@pytest.fixture
def hasty(url: str) -> Store:
    return open_store(url, StoreSettings(deadline_s=DEADLINE_S, cache_size=0))


def seconds(call: Callable[[], Any], match: str, error: type[Exception] = StorageError) -> float:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        call()
    return time.monotonic() - started


def test_ranges_are_exact(store, url):
    assert store.stat(url).num_bytes == len(CONTENT)
    assert store.read(url) == CONTENT
    assert store.read(url, 10, 20) == CONTENT[10:30]
    assert store.read(url, 1000) == CONTENT[1000:]
    assert store.read(url, 5, 0) == b""


def test_only_the_range_is_sent(store, url, server):
    store.read(url, 10, 20)
    assert [request.range for request in server.requests] == ["bytes=10-29"]


def test_empty_file(store, url, server):
    (server.folder / "empty").touch()
    assert store.read(f"{server.url}/empty") == b""
    assert store.stat(f"{server.url}/empty").num_bytes == 0


def test_large_reads_are_several_requests(store, url, server, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 300)
    assert store.read(url) == CONTENT
    assert store.read(url, 1, 900) == CONTENT[1:901]
    assert len(server.requests) == 4 + 3


@pytest.mark.parametrize(("start", "length", "left"), [(1020, 11, 4), (3000, 5, 0)])
def test_range_past_the_end_is_an_error(store, url, server, start, length, left):
    with pytest.raises(StorageError, match=f"{length} bytes were expected here and {left} are left") as caught:
        store.read(url, start, length)
    assert (caught.value.path, caught.value.offset) == (url, start)
    assert len(server.requests) == 1


def test_missing_file(store, url, server):
    for call in (store.stat, store.read):
        with pytest.raises(NoSuchFileError, match=r"no such file \(status 404\)"):
            call(f"{url}.not")
    assert len(server.requests) == 2


def test_many_ranges_are_requested_at_once(store, url, server):
    server.latency_s = 0.05
    started = time.monotonic()
    ranges = [ByteRange(url, start, 3) for start in range(90)]
    assert read_ranges(store, ranges, 30) == [CONTENT[start : start + 3] for start in range(90)]
    assert time.monotonic() - started < 90 * 0.05 / 2


def test_connections_are_used_again(store, url, server, monkeypatch):
    opened = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda *args: opened.append(args) or connect(*args))
    for start in range(20):
        store.read(url, start, 3)
    assert len(opened) <= 2


@pytest.mark.parametrize("fault", [429, 500, 503, "close", "cut", "short range"])
def test_failures_that_pass_are_tried_again(store, url, server, fault):
    server.fail(fault, times=2)
    assert store.read(url, 10, 20) == CONTENT[10:30]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (500, "status 500"),
        (503, "status 503"),
        ("close", "Disconnect"),
        ("cut", "ClientPayloadError"),
        ("short body", "sent 100 of 200 bytes"),
        ("short range", "another range"),
    ],
)
def test_failures_end_after_the_retries(url, server, fault, match):
    server.fail(fault, times=100)
    store = open_store(url, StoreSettings(deadline_s=60, retries=2, cache_size=0))
    seconds(lambda: store.read(url, 100, 200), f"{match}.*; tried 3 times.*raise storage.retries")


@pytest.mark.parametrize(("fault", "tried"), [("drip", "tried"), ("hang", "tried 2 times"), ("hang in body", "tried")])
def test_silence_ends_by_the_deadline(hasty, url, server, fault, tried):
    server.fail(fault, times=100)
    match = f"no answer in time; {tried} .*within 0.5 s.*raise storage.deadline_s"
    took = seconds(lambda: hasty.read(url, 100, 200), match)
    assert took < DEADLINE_S + MARGIN_S


def test_failures_end_by_the_deadline(hasty, url, server):
    server.fail(500, times=100)
    took = seconds(lambda: hasty.read(url, 100, 200), "tried .* within 0.5 s.*raise storage.deadline_s")
    assert took < DEADLINE_S + MARGIN_S


def test_no_server_ends_by_the_deadline(hasty):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
        assert seconds(lambda: hasty.read(url, 0, 1), "Connect") < DEADLINE_S + MARGIN_S


def test_server_that_hangs_in_one_of_two_requests_is_outlived(url, server):
    server.fail("hang")
    store = open_store(url, StoreSettings(deadline_s=4, cache_size=0))
    assert store.read(url, 10, 20) == CONTENT[10:30]


def test_many_ranges_of_a_dead_server_take_one_deadline(hasty, url, server):
    server.fail("hang", times=1000)
    started = time.monotonic()
    results = read_ranges(hasty, [ByteRange(url, start, 3) for start in range(40)], 4)
    assert all(isinstance(result, StorageError) and result.offset == start for start, result in enumerate(results))
    assert time.monotonic() - started < 2 * DEADLINE_S + MARGIN_S


def test_retries_are_limited(url, server):
    server.fail(500, times=10)
    store = open_store(url, StoreSettings(deadline_s=60, retries=1, cache_size=0))
    assert seconds(lambda: store.read(url, 0, 1), "tried 2 times") < 10


@pytest.mark.parametrize("status", [401, 403])
def test_denied_is_tried_once_more(store, url, server, status):
    server.fail(status)
    assert store.read(url, 0, 1) == CONTENT[:1]
    server.fail(status, times=10)
    server.requests.clear()
    seconds(lambda: store.read(url, 0, 1), rf"missing or has expired.*status {status}.*get a new one")
    assert len(server.requests) == 2


def test_refused_request_is_not_tried_again(store, url, server):
    server.fail(400, times=10)
    seconds(lambda: store.read(url, 0, 1), "status 400")
    assert len(server.requests) == 1


def test_server_that_ignores_ranges(store, url, server, monkeypatch):
    server.fail("ignore range", times=2)
    assert store.read(url, 10, 20) == CONTENT[10:30]
    monkeypatch.setattr(http, "_MAX_WHOLE", 1000)
    seconds(lambda: store.read(url, 10, 20), "sends only whole files, and this one has 1024 bytes")


def test_file_that_has_changed_is_an_error(store, url, server):
    expected = store.stat(url)
    assert store.read(url, 0, 5, expected=expected) == CONTENT[:5]
    server.etags["/a.bin"] = '"other"'
    seconds(lambda: store.read(url, 0, 5, expected=expected), 'changed since it was indexed .version "')
    seconds(lambda: store.read(url, 0, 5, expected=FileStat(7, '"other"')), "7 bytes then, 1024 now")


def test_file_that_changes_while_it_is_read_is_an_error(store, url, server, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    send = http._stat_of

    def change(response):
        server.etags["/a.bin"] = '"other"'
        return send(response)

    monkeypatch.setattr(http, "_stat_of", change)
    seconds(lambda: store.read(url), "changed")


def test_server_without_versions_is_read_by_size(store, url, server):
    server.has_etags = False
    expected = store.stat(url)
    assert expected == FileStat(len(CONTENT), "")
    assert store.read(url, 0, 5, expected=expected) == CONTENT[:5]
    seconds(lambda: store.read(url, 0, 5, expected=FileStat(7, "")), "7 bytes then")


def test_credentials_are_in_no_message(hasty, url, server):
    server.fail(500, times=100)
    secret = url.replace("http://", "http://user:hunter2@") + "?signature=hunter2"
    for path in (secret, secret.replace("127.0.0.1", "nowhere.invalid"), secret.replace("127.0.0.1", "[")):
        with pytest.raises(StorageError) as caught:
            hasty.read(path, 0, 1)
        exc: BaseException | None = caught.value
        while exc is not None:
            assert "hunter2" not in f"{exc} {exc!r} {exc.args}"
            exc = exc.__cause__ or exc.__context__
    assert "signature" in server.requests[0].path


def test_user_of_a_url_is_sent(store, url, server):
    server.token = "x"
    path = url.replace("http://", "http://user:pass@")
    seconds(lambda: store.read(path, 0, 1), "status 401")
    assert server.requests[0].headers["Authorization"].startswith("Basic ")


def test_listing_of_a_folder_is_searched(store, url, server):
    for name in ("b.tar", "c.tar"):
        (server.folder / name).touch()
    assert store.find(f"{server.url}/*.tar") == [f"{server.url}/b.tar", f"{server.url}/c.tar"]


def test_web_server_is_not_written(store, url):
    seconds(lambda: store.write(url, b""), "only read; write to a folder")


def test_unknown_scheme():
    with pytest.raises(ConfigError, match="nothing here reads ftp:// URLs"):
        open_store("ftp://host/a")
    with pytest.raises(ConfigError, match="write the path alone: /a"):
        open_store("file:///a")


def test_fork_connects_anew(store, url):
    assert_reads_in_a_fork(store, url, CONTENT)
