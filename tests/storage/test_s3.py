import json
import time
from collections.abc import Iterator

import fsspec
import pytest

from kd_pipeline.errors import NoSuchFileError, StorageError
from kd_pipeline.storage import ByteRange, Store, StoreSettings, expand, open_store, read_ranges, remote
from tests.http_server import FolderServer, serve_folder
from tests.s3_server import S3Server, fresh_connections, serve_s3
from tests.storage.forked import assert_reads_in_a_fork

pytestmark = pytest.mark.slow  # to import what speaks S3

CONTENT = bytes(range(256)) * 4
PATH = "s3://bucket/a"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="module")
def url(s3: S3Server) -> str:
    return s3.put("a/b c.bin", CONTENT)


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url, StoreSettings(deadline_s=20, cache_size=0))


def test_ranges_are_exact(store, url, monkeypatch):
    assert store.read(url, 10, 20) == CONTENT[10:30]
    assert store.read(url) == CONTENT
    ranges = [ByteRange(url, start, 3) for start in range(60)]
    assert read_ranges(store, ranges) == [CONTENT[start : start + 3] for start in range(60)]
    monkeypatch.setattr(remote, "CHUNK_BYTES", 300)
    assert store.read(url, 1) == CONTENT[1:]


@pytest.mark.parametrize(("start", "length", "left"), [(1020, 11, 4), (3000, 5, 0)])
def test_range_past_the_end_is_an_error(store, url, start, length, left):
    with pytest.raises(StorageError, match=f"{length} bytes were expected here and {left} are left"):
        store.read(url, start, length)


def test_missing_object_and_bucket(store, url):
    for path in (f"{url}.not", "s3://no-such-bucket/a"):
        for call in (store.stat, store.read):
            with pytest.raises(NoSuchFileError, match="no such file"):
                call(path)


def test_object_that_has_changed_is_an_error(store, s3):
    url = s3.put("changing", CONTENT)
    expected = store.stat(url)
    assert expected.num_bytes == len(CONTENT)
    assert store.read(url, 0, 5, expected=expected) == CONTENT[:5]
    s3.put("changing", CONTENT[::-1])
    with pytest.raises(StorageError, match="changed since it was indexed"):
        store.read(url, 0, 5, expected=expected)
    s3.put("changing", b"")
    with pytest.raises(StorageError, match="1024 bytes then, 0 now"):
        store.read(url, 0, 5, expected=expected)


def test_written_objects_are_found(store):
    for name in ("x-1.tar", "x-2.tar", "empty"):
        store.write(f"s3://bucket/new/{name}", name.encode() * (name != "empty"))
    assert store.read("s3://bucket/new/x-2.tar") == b"x-2.tar"
    assert store.read("s3://bucket/new/empty") == b""
    assert expand("s3://bucket/new/x-*.tar", store) == ["s3://bucket/new/x-1.tar", "s3://bucket/new/x-2.tar"]


def test_fork_connects_anew(store, url):
    assert_reads_in_a_fork(store, url, CONTENT)


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderServer]:
    """A GET of S3 is one of a web server."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket").mkdir()
    (folder / "bucket" / "a").write_bytes(CONTENT)
    with serve_folder(folder) as server:
        yield server


@pytest.fixture(scope="module")
def its_connections(misbehaving: FolderServer) -> Iterator[None]:
    with fresh_connections(misbehaving.url):
        open_store("s3://bucket/a", StoreSettings(cache_size=0)).stat("s3://bucket/a")  # imports take seconds
        yield


@pytest.fixture
def faulty(misbehaving: FolderServer, its_connections: None) -> Iterator[FolderServer]:
    misbehaving.requests.clear()
    yield misbehaving
    misbehaving.recover()


@pytest.mark.parametrize(
    ("fault", "match"),
    [(500, "status 500"), (503, "status 503"), ("close", "closed before"), ("cut", "received 45 of 90 bytes")],
)
def test_failures_pass_or_end_after_the_retries(faulty, fault, match):
    store = open_store(PATH, StoreSettings(deadline_s=60, retries=2, cache_size=0))
    faulty.fail(fault)
    assert store.read(PATH, 3, 90) == CONTENT[3:93]
    faulty.fail(fault, times=100)
    with pytest.raises(StorageError, match=f"{match}.*; tried 3 times.*storage.retries"):
        store.read(PATH, 3, 90)


@pytest.mark.parametrize("fault", ["drip", "hang", "hang in body"])
def test_silence_passes_or_ends_by_the_deadline(faulty, fault):
    faulty.fail(fault)
    assert open_store(PATH, StoreSettings(deadline_s=4, cache_size=0)).read(PATH, 3, 90) == CONTENT[3:93]
    faulty.fail(fault, times=100)
    started = time.monotonic()
    with pytest.raises(StorageError, match="no answer in time; tried"):
        open_store(PATH, StoreSettings(deadline_s=0.5, cache_size=0)).read(PATH, 3, 90)
    assert time.monotonic() - started < 0.5 + 2


def test_denied_says_how_to_renew(faulty):
    faulty.fail(403, times=100)
    with pytest.raises(StorageError, match=r"missing or has expired.*status 403.*aws sso login.*FSSPEC_S3_ANON"):
        open_store(PATH, StoreSettings(cache_size=0)).read(PATH, 3, 90)
    assert len(faulty.requests) == 2


def test_no_credentials(server, monkeypatch):
    with fresh_connections(server.url):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(StorageError, match=r"missing or has expired.*NoCredentialsError.*aws sso login"):
            open_store("s3://bucket/a", StoreSettings(cache_size=0)).read("s3://bucket/a", 3, 90)


def test_google_objects_are_read_like_files_of_a_web_server(server, monkeypatch):
    folder = server.folder / "download" / "storage" / "v1" / "b" / "bucket" / "o"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(CONTENT)
    with fresh_connections(server.url):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        store = open_store("gs://bucket/a", StoreSettings(deadline_s=20, cache_size=0))
        assert store.read("gs://bucket/a", 3, 90) == CONTENT[3:93]
        assert store.stat("gs://bucket/a").num_bytes == len(CONTENT)
        server.fail(401, times=9)
        with pytest.raises(StorageError, match="gcloud auth application-default login"):
            store.read("gs://bucket/a", 3, 90)


def test_hub_files_are_read_like_files_of_a_web_server(server, monkeypatch):
    folder = server.folder / "datasets" / "org" / "name" / "resolve" / "main"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(CONTENT)
    (server.folder / "api" / "datasets" / "org").mkdir(parents=True)
    (server.folder / "api" / "datasets" / "org" / "name").write_text(json.dumps({"id": "org/name", "sha": "0" * 40}))
    with fresh_connections(server.url):
        monkeypatch.setenv("HF_TOKEN", "secret-token")
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
        path = "hf://datasets/org/name/a"
        store = open_store(path, StoreSettings(deadline_s=20, cache_size=0))
        assert store.read(path, 3, 90) == CONTENT[3:93]
        assert store.stat(path).num_bytes == len(CONTENT)
        assert server.requests[-1].headers["authorization"] == "Bearer secret-token"
        server.fail(401, times=9)
        with pytest.raises(StorageError, match="hf auth login") as caught:
            store.read(path, 3, 90)
        assert "secret-token" not in str(caught.value)
