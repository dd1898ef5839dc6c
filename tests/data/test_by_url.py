"""Images by URL, in lists and folders: the stream of the same files on a disk, what fails and how, and no credential in
what is shown or kept."""

import json
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import FileList, FolderMasks, ImageFolder, ListMasks, Source, open_source
from kd_pipeline.data.sources.base import FileListSettings
from kd_pipeline.data.sources.files import remote_files
from kd_pipeline.errors import BadSampleError, DataError, StorageError
from kd_pipeline.loader.given import open_given_source
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.storage import StoreSettings
from tests.data.sources.helpers import error_of
from tests.http_server import FolderServer, serve_folder
from tests.mask_files import save_pair, some_masks
from tests.s3_server import S3Server, serve_s3
from tests.streams import TRAIN, Fields, assert_same, conv_teacher, run, state_after

FEW_TRIES = StoreSettings(deadline_s=2, retries=1)
SECRETS = ("abc123", "pass-word", "me-user")


@pytest.fixture(scope="module")
def web(photo_folder: Path) -> Iterator[FolderServer]:
    """The photographs."""
    with serve_folder(photo_folder) as server:
        yield server


@pytest.fixture
def server(web: FolderServer) -> Iterator[FolderServer]:
    yield web
    web.recover()
    web.requests.clear()


@pytest.fixture(scope="module")
def names(photo_folder: Path) -> list[str]:
    """Of the photographs, in the order of the folder, as `class/file`."""
    files = ImageFolder(photo_folder)
    return [os.path.relpath(files.name(index), photo_folder) for index in range(len(files))]


@pytest.fixture(scope="module")
def wanted(photo_folder: Path) -> list[Fields]:
    """The stream of the folder."""
    return stream(ImageFolder(photo_folder))


def stream(source: Source, **options: object) -> list[Fields]:
    with load(source, **options) as loader:
        return run(loader, 2)


def load(source: Source, **options: object) -> KDDataLoader:
    return KDDataLoader(source, TRAIN, conv_teacher(), **{"batch_size": 8, "seed": 5, **options})  # type: ignore[arg-type]


def write_list(folder: Path, names: list[str], prefix: Callable[[int], str] = lambda _: "", suffix: str = "") -> Path:
    """A list of the photographs with a path each, labels from their folders."""
    lines = [
        json.dumps({"path": f"{prefix(number)}{name}{suffix}", "label": name.partition("/")[0]})
        for number, name in enumerate(names)
    ]
    path = folder / "list.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def by_urls(server: FolderServer, folder: Path, photos: Path, names: list[str]) -> FileList:
    return FileList(write_list(folder, names, lambda _: f"{server.url}/"))


def by_root(server: FolderServer, folder: Path, photos: Path, names: list[str]) -> FileList:
    return FileList(write_list(folder, names), root=server.url)


def mixed(server: FolderServer, folder: Path, photos: Path, names: list[str]) -> FileList:
    """Every third one by its URL."""
    return FileList(write_list(folder, names, lambda number: f"{server.url}/" if number % 3 == 0 else ""), root=photos)


WAYS = {"URLs": by_urls, "root": by_root, "mixed": mixed}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_stream_is_that_of_the_folder(server, tmp_path, photo_folder, names, wanted, way):
    source = way(server, tmp_path, photo_folder, names)
    assert source.stores == "bytes" and source.classes == ImageFolder(photo_folder).classes
    assert_same(stream(source), wanted)


def test_list_itself_by_url(server, tmp_path, photo_folder, names):
    write_list(tmp_path, ["photos/" + name for name in names])
    (tmp_path / "photos").symlink_to(photo_folder)
    with serve_folder(tmp_path) as other:
        source = FileList(f"{other.url}/list.jsonl?token=abc123")
        local = FileList(tmp_path / "list.jsonl")
        assert open_given_source(f"{other.url}/list.jsonl?token=abc123").name(5) == source.name(5)
        assert source.read(np.array([5]))[0].tobytes() == Path(local.name(5)).read_bytes()
        assert source.fingerprint == local.fingerprint
    assert source.classes == local.classes and (source.labels == local.labels).all()


def test_resumed_at_every_batch(server, tmp_path, photo_folder, names, wanted):
    source = by_root(server, tmp_path, photo_folder, names)
    for number in range(len(wanted) // 2 + 1):
        with load(source) as loader:
            state = state_after(loader, number) if number else loader.state_dict()
            loader.load_state_dict(state)
            assert_same(run(loader, 2), wanted[number:])


def test_odd_names_are_found(photo_folder, names, tmp_path):
    content = (photo_folder / names[0]).read_bytes()
    odd = ["a b.png", "c#d.png", "e?f.png", "g%20h.png", "ä+é.png"]
    for name in odd:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "list.txt").write_text("\n".join(["path", *odd]) + "\n")
    with serve_folder(tmp_path) as server:
        source = FileList(tmp_path / "list.txt", root=server.url)
        assert [image.tobytes() for image in source.read(np.arange(len(odd)))] == [content] * len(odd)


def test_urls_with_queries_need_no_header(server, tmp_path, names):
    lines = [f"{server.url}/{name}?sig=abc123,{name.partition('/')[0]}" for name in names]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    source = FileList(path)
    assert len(source) == len(names) and source.num_classes == 3


# Failures


def substitutes(source: Source) -> tuple[list[Fields], list[tuple[int, str, int | None, str]]]:
    with load(source, on_bad_sample="substitute", max_bad_fraction=0.2) as loader:
        found = run(loader, 2)
        return found, [(bad.index, bad.path, bad.num_bytes, bad.reason) for bad in loader.bad_samples]


def test_missing_image_is_a_bad_sample(server, tmp_path, photo_folder, names):
    listed = list(names)
    listed[5] = listed[5].replace("/", "/not-there-")
    local = FileList(write_list(tmp_path, listed), root=photo_folder)
    source = FileList(tmp_path / "list.jsonl", root=server.url)
    with pytest.raises(BadSampleError, match=r"sample 5 .*\(no such file\): the file does not exist"):
        stream(source)
    found, bad = substitutes(source)
    wanted, local_bad = substitutes(local)
    assert_same(found, wanted)
    assert bad == [(5, f"{server.url}/{listed[5]}", None, "the file does not exist")]
    assert [each[0] for each in local_bad] == [5]


def test_all_missing_is_an_error_of_the_list(server, tmp_path, names):
    path = write_list(tmp_path, ["not-there/" + name for name in names])
    message = error_of(FileList, path, root=f"{server.url.replace('//', '//me-user:pass-word@')}?token=abc123")
    assert "looked-for files exists" in message and "set root to the folder" in message
    assert not any(secret in message for secret in SECRETS)


@pytest.mark.parametrize("fault", [500, 403, "hang"])
def test_store_that_fails_is_no_bad_sample(server, tmp_path, names, fault):
    path = write_list(tmp_path, names)
    source = FileList(path, root=server.url, storage=FEW_TRIES)
    server.fail(fault, times=100, path=names[5])
    with load(source, shuffle=False, on_bad_sample="substitute") as loader:
        started = time.monotonic()
        with pytest.raises(StorageError, match=names[5]):
            run(loader, 1)
        assert time.monotonic() - started < 10
        assert loader.bad_samples == ()
        server.recover()
        state = loader.state_dict()
        loader.load_state_dict(state)
        assert len(run(loader, 1)) == len(loader)


def test_failure_that_passes_is_not_seen(server, tmp_path, photo_folder, names, wanted):
    source = by_root(server, tmp_path, photo_folder, names)
    for fault in (500, "cut", "close"):
        server.fail(fault, path=".jpg")
    assert_same(stream(source), wanted)


def test_huge_file_is_not_downloaded(server, tmp_path, names, monkeypatch):
    source = FileList(write_list(tmp_path, names), root=server.url)
    monkeypatch.setattr(remote_files, "MAX_IMAGE_BYTES", 1000)
    (found,) = source.read(np.array([1]))
    assert "bytes, and at most 1000 are read" in str(found)


def test_scheme_that_nothing_reads(tmp_path):
    (tmp_path / "list.csv").write_text("a.jpg,1\nftp://host/b.jpg,1\n")
    message = error_of(FileList, tmp_path / "list.csv")
    assert f"{tmp_path / 'list.csv'}:2: nothing here reads ftp:// URLs" in message


def test_web_servers_are_not_listed(server):
    with pytest.raises(StorageError, match="web servers do not list their files; write a list of them"):
        ImageFolder(server.url)


# Credentials


def test_masks_by_url_in_a_list(tmp_path):
    pairs = some_masks(4)
    for number, mask in enumerate(pairs):
        save_pair(tmp_path / "images", tmp_path / "masks", f"{number}", mask)
    with serve_folder(tmp_path) as server:
        rows = [f"images/{number}.jpg,{server.url}/masks/{number}.png?token=abc123" for number in range(4)]
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["image,mask", *rows]))
        source = FileList(path, masks=ListMasks(num_classes=4), storage=StoreSettings(cache_size=0))
        assert all(map(np.array_equal, source.masks.read(np.arange(4)), pairs))
        assert source.stores == "files" and source.masks.name(2) == f"{server.url}/masks/2.png"
        (tmp_path / "masks/1.png").unlink()
        missing = source.masks.read(np.arange(2))[1]
    assert str(missing) == f"its mask {server.url}/masks/1.png: the file does not exist"


def test_credentials_are_shown_and_kept_nowhere(server, tmp_path, photo_folder, names, caplog):
    caplog.set_level(logging.DEBUG)
    host = server.url.replace("//", "//me-user:pass-word@")
    listed = list(names)
    listed[7] = "cat/gone.jpg"
    path = write_list(tmp_path, listed, lambda _: f"{host}/", "?token=abc123")
    settings = FileListSettings(path=path, root=f"{host}/x?token=abc123")
    source = open_source(settings)
    _, bad = substitutes(source)
    server.fail(403, times=100)
    with pytest.raises(StorageError) as failed:
        stream(source)
    server.recover()
    with load(source) as loader:
        state = loader.state_dict()
    with pytest.raises(BadSampleError) as missing:
        stream(source)
    kept = [repr(settings), repr(source), source.name(0), source.warnings, bad, caplog.text, state]
    kept += [failed.value, failed.value.path, missing.value, *source.read(np.array([7]))]
    assert not [each for each in kept for secret in SECRETS if secret in str(each) or secret in repr(each)]
    assert source.name(0) == f"{server.url}/{names[0]}"
    assert server.requests and all("token=abc123" in request.path for request in server.requests)


def test_fingerprint_depends_neither_on_credentials_nor_on_the_place(server, tmp_path, photo_folder, names):
    wanted = FileList(write_list(tmp_path, names), root=photo_folder).fingerprint
    host = server.url.replace("//", "//me-user:pass-word@")
    for root in (server.url, f"{host}/?token=abc123"):
        assert FileList(tmp_path / "list.jsonl", root=root).fingerprint == wanted
    found = {
        FileList(write_list(tmp_path, names, lambda _: f"{host}/", f"?token={token}")).fingerprint for token in "ab"
    }
    assert len(found) == 1
    (changed := tmp_path / "changed").mkdir()
    for number, name in enumerate(names):
        (changed / name).parent.mkdir(exist_ok=True)
        (changed / name).write_bytes((photo_folder / name).read_bytes() + b"x" * (number == 9))
    path = write_list(tmp_path, names)
    with serve_folder(changed) as other:
        assert FileList(path, root=other.url).fingerprint != wanted


def test_lists_with_credentials_are_not_cached(server, tmp_path, names, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("kd_pipeline.data.sources.files.index_cache._MIN_LIST_BYTES", 1)
    path = write_list(tmp_path, names, lambda _: f"{server.url}/", "?token=abc123")
    FileList(path)
    cache = tmp_path / "cache/kd_pipeline/index"
    assert not cache.exists() or not list(cache.iterdir())
    sources = [FileList(write_list(tmp_path, names, lambda _: f"{server.url}/")) for _ in range(2)]
    assert len(list(cache.iterdir())) == 1
    assert sources[0].fingerprint == sources[1].fingerprint and sources[1].stores == "bytes"


# Folders in a store


@pytest.fixture(scope="module")
def s3(photo_folder: Path) -> Iterator[S3Server]:
    with serve_s3() as server:
        for path in photo_folder.rglob("*.*"):
            server.put(f"photos/{path.relative_to(photo_folder)}", path.read_bytes())
        yield server


@pytest.mark.slow
def test_folder_on_s3_is_that_on_a_disk(s3, photo_folder, wanted, tmp_path):
    source, local = ImageFolder("s3://bucket/photos"), ImageFolder(photo_folder)
    assert source.classes == local.classes and (source.labels == local.labels).all()
    assert source.fingerprint == local.fingerprint
    assert source.name(3) == local.name(3).replace(str(photo_folder), "s3://bucket/photos")
    assert_same(stream(source), wanted)
    assert len(ImageFolder("s3://bucket", labeled=False)) == len(local)


@pytest.mark.slow
def test_same_order_and_warnings_as_on_a_disk(s3, tmp_path):
    names = [
        *("b/2.jpg", "b/10.jpg", "b/1.JPG", "a/x/1.png", "a/x.png", "a/x-1/2.png", "a/.hidden/1.jpg", "a/notes.txt"),
        *("__pycache__/c.pyc", ".git/x", "list.csv", "b/a.doc", "b/c.doc", "b/b.doc", "b/d.doc"),
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        s3.put(f"odd/{name}", b"x")
    source, local = ImageFolder("s3://bucket/odd/"), ImageFolder(tmp_path)
    assert [source.name(index) for index in range(len(source))] == [
        local.name(index).replace(str(tmp_path), "s3://bucket/odd") for index in range(len(local))
    ]
    assert list(source.warnings) == [each.replace(str(tmp_path), "s3://bucket/odd") for each in local.warnings]
    assert source.warnings and source.fingerprint == local.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("root", ["s3://bucket/not-there", "s3://bucket/photos/list.csv", "s3://no-such-bucket"])
def test_folder_that_is_not_there(s3, root):
    with pytest.raises(DataError, match=f"{root}: there is no such folder, or nothing in it"):
        ImageFolder(root)


@pytest.mark.slow
def test_masks_in_a_store_are_those_on_a_disk(s3, tmp_path):
    pairs = some_masks(6)
    for number, mask in enumerate(pairs):
        save_pair(tmp_path / "images", tmp_path / "masks", f"{'ab'[number % 2]}/{number}", mask)
    for path in tmp_path.rglob("*.*"):
        s3.put(f"pairs/{path.relative_to(tmp_path)}", path.read_bytes())
    local, both, alone = (
        ImageFolder(f"{images}/images", masks=FolderMasks(root=f"{masks}/masks", num_classes=4))
        for images, masks in ((tmp_path, tmp_path), ("s3://bucket/pairs",) * 2, (tmp_path, "s3://bucket/pairs"))
    )
    for source in (both, alone, pickle.loads(pickle.dumps(both))):
        assert source.fingerprint == local.fingerprint
        assert source.masks.name(3) == local.masks.name(3).replace(str(tmp_path), "s3://bucket/pairs")
        assert all(map(np.array_equal, source.masks.read(np.arange(6)), local.masks.read(np.arange(6))))
    s3.put("pairs/images/c/9.jpg", b"x")
    with pytest.raises(DataError, match="s3://bucket/pairs/masks: no masks for 1 of 7 images: c/9"):
        ImageFolder("s3://bucket/pairs/images", masks=FolderMasks(root="s3://bucket/pairs/masks", num_classes=4))


@pytest.mark.slow
def test_source_by_url_can_be_pickled(s3):
    source = ImageFolder("s3://bucket/photos")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(np.array([0]))[0].tobytes() == source.read(np.array([0]))[0].tobytes()
