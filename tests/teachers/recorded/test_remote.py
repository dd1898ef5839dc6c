"""A recording behind a URL replays what the folder does, reads what is needed, and verifies it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.errors import KDPipelineError, StorageError, TeacherError
from kd_pipeline.storage import StoreSettings
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.workflows import _record as workflow
from kd_pipeline.workflows._record import RecordSettings, record
from tests.http_server import FolderServer, serve_folder
from tests.recordings import (
    NUM_EPOCHS,
    PLUGINS,
    config,
    files_of,
    num_epochs_of,
    part_of,
    recorded,
    replayed,
    replaying,
)
from tests.s3_server import S3Server, serve_s3
from tests.streams import assert_same


@pytest.fixture(scope="module")
def plain(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in three parts each; do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "_MAX_PART_ROWS", 16)
        return recorded(photo_folder, tmp_path_factory.mktemp("plain") / "recording")


@pytest.fixture
def server(plain: Path, tmp_path: Path) -> Iterator[FolderServer]:
    """A web server of a copy of it."""
    shutil.copytree(plain, tmp_path / "served")
    with serve_folder(tmp_path / "served") as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


def fetched(server: FolderServer) -> set[str]:
    return {request.path for request in server.requests if request.path.endswith(".bin")}


def test_published_recording_trains_as_the_folder(photo_folder: Path, plain: Path, server: FolderServer) -> None:
    local = replayed(photo_folder, plain)
    assert_same(replayed(photo_folder, server.url), local)  # type: ignore[arg-type]
    assert len(fetched(server)) == 6
    server.requests.clear()
    assert_same(replayed(photo_folder, server.url), local)  # type: ignore[arg-type]
    assert not fetched(server)


def test_only_the_epochs_that_are_read_are_fetched(photo_folder: Path, server: FolderServer) -> None:
    with replaying(photo_folder, server.url, verify=0) as loader:  # type: ignore[arg-type]
        assert not fetched(server)
        next(iter(loader))
        assert fetched(server) <= {path for path in fetched(server) if path.startswith("/epoch-0001/")}
        loader.set_epoch(1)
        list(loader)
    assert {path for path in fetched(server) if path.startswith("/epoch-0002/")} > set()


def test_flipped_byte_is_named(server: FolderServer, cache: Path) -> None:
    recording = Recording(server.url)
    path = part_of(server.folder, epoch=1, start=16)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    recording.samples(1, np.arange(16))
    with pytest.raises(TeacherError) as caught:
        recording.samples(1, np.arange(16, 20))
    recording.close()
    message, digest = str(caught.value), path.stem.rpartition("-")[2]
    assert f"{server.url}/{path.relative_to(server.folder)} has the sha256 " in message
    assert f" instead of {digest}; upload this file again" in message
    assert not list(cache.rglob(digest))


def test_changed_file_in_the_cache_is_fetched_again(server: FolderServer, cache: Path) -> None:
    with_cache = Recording(server.url)
    wanted = with_cache.samples(0, np.arange(10)).tolist()
    with_cache.close()
    digest = part_of(server.folder).stem.rpartition("-")[2]
    (kept,) = cache.rglob(digest)
    kept.write_bytes(bytes(kept.stat().st_size))
    server.requests.clear()
    again = Recording(server.url)
    assert again.samples(0, np.arange(10)).tolist() == wanted
    assert any(digest in path for path in fetched(server))
    again.close()


def test_works_without_a_cache(server: FolderServer, cache: Path) -> None:
    recording = Recording(server.url, storage=StoreSettings(cache_size=0))
    recording.read(0, np.arange(37))
    recording.close()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_part_that_is_gone_is_named(server: FolderServer) -> None:
    recording = Recording(server.url)
    path = part_of(server.folder)
    path.unlink()
    with pytest.raises(StorageError, match=path.name):
        recording.samples(0, np.arange(2))
    recording.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{", "/manifest.json is damaged"),
        ("manifest.json", None, "holds no recording"),
        ("SHA256SUMS", b"0" * 64 + b"  ../../x\n", "/SHA256SUMS is damaged .line 1 is"),
        ("SHA256SUMS", b"\xff", "/SHA256SUMS is damaged"),
    ],
)
def test_damaged_folder_is_named(server: FolderServer, name: str, content: bytes | None, message: str) -> None:
    (server.folder / name).unlink()
    if content is not None:
        (server.folder / name).write_bytes(content)
    with pytest.raises(KDPipelineError, match=message):
        Recording(server.url)


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@pytest.mark.slow
def test_parts_are_recorded_into_a_bucket(
    photo_folder: Path, plain: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "_MAX_PART_ROWS", 16)
    url = "s3://bucket/recording"
    for part in ("2/2", "1/2"):
        assert record(config(photo_folder), RecordSettings(out=url, part=part), plugins=PLUGINS) == url
    listed = s3.client.list_objects_v2(Bucket="bucket", Prefix="recording/")["Contents"]
    assert {each["Key"].removeprefix("recording/") for each in listed} == set(files_of(plain))
    for name, content in files_of(plain).items():
        assert s3.client.get_object(Bucket="bucket", Key=f"recording/{name}")["Body"].read() == content
    assert num_epochs_of(plain) == Recording(url).num_epochs == NUM_EPOCHS
    assert_same(replayed(photo_folder, url), replayed(photo_folder, plain))  # type: ignore[arg-type]
