"""What is in tar shards is found out once, kept, and never used for other shards."""

import os
import threading
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import Tar, index_file
from kd_pipeline.data.sources.tar import index as tar_index
from kd_pipeline.data.sources.tar import table as tar_table
from kd_pipeline.data.sources.tar.index import dali_index
from kd_pipeline.data.sources.tar.members import Member
from kd_pipeline.errors import DataError, NoSuchFileError, StorageError
from kd_pipeline.storage import StoreSettings
from kd_pipeline.storage.local import LocalStore
from tests.data.sources.helpers import error_of
from tests.data.sources.tar.test_source import cache, contents, samples, shard, summary  # noqa: F401
from tests.http_server import serve_folder
from tests.tar_files import write_tar
from tests.waiting import wait_until


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose headers were read one after the other."""
    found: list[str] = []

    class Walked(tar_index.TarMembers):
        def __iter__(self):
            found.append(Path(self._read.__self__._path).name)
            return super().__iter__()

    monkeypatch.setattr(tar_index, "TarMembers", Walked)
    return found


def shards(folder: Path, num: int = 3) -> str:
    for number in range(num):
        shard(folder, samples(f"{number}a", f"{number}b"), f"{number}.tar")
    return str(folder / "*.tar")


def summary_without_cache(path: str) -> tuple[object, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_table, "load_index_file", lambda *arguments, **options: None)
        return summary(Tar(path, label="cls"))


def test_again_nothing_is_read(tmp_path, walked):
    path = shards(tmp_path)
    first, again = Tar(path, label="cls"), Tar(path, label="cls")
    assert sorted(walked) == ["0.tar", "1.tar", "2.tar"]
    assert summary(again) == summary(first) and again.fingerprint == first.fingerprint
    assert isinstance(again._table.names, memoryview) and not again._table.starts.flags.owndata, "mapped"


def test_only_new_and_changed_shards_are_read(tmp_path, walked):
    path = shards(tmp_path)
    Tar(path, label="cls")
    walked.clear()
    shard(tmp_path, samples("3a", "3b", "3c"), "3.tar")
    shard(tmp_path, samples("1x"), "1.tar")
    grown = Tar(path, label="cls")
    assert sorted(walked) == ["1.tar", "3.tar"]
    assert summary(grown) == summary_without_cache(path)
    walked.clear()
    (tmp_path / "0.tar").unlink()
    fewer = Tar(path, label="cls")
    assert walked == [] and len(fewer) == 6
    assert summary(fewer) == summary_without_cache(path)


def test_new_names_move_the_labels_of_known_shards(tmp_path, walked):
    shard(tmp_path, {"a.jpg": b"", "a.txt": b"dog", "b.jpg": b"", "b.txt": b"ant"}, "1.tar")
    assert Tar(tmp_path / "*.tar", label="txt").labels.tolist() == [1, 0]
    shard(tmp_path, {"c.jpg": b"", "c.txt": b"cat"}, "0.tar")
    source = Tar(tmp_path / "*.tar", label="txt")
    assert source.classes == ("ant", "cat", "dog") and source.labels.tolist() == [1, 2, 0]
    (tmp_path / "1.tar").unlink()
    source = Tar(tmp_path / "*.tar", label="txt")
    assert source.classes == ("cat",) and source.labels.tolist() == [0] and walked == ["1.tar", "0.tar"]


def test_settings_have_indexes_of_their_own(tmp_path):
    path = shard(tmp_path, {"a.jpg": b"1", "a.png": b"2", "a.cls": b"3", "a.json": b'{"x": 4}'})
    for _ in range(2):
        for image, data in (("jpg", b"1"), ("png", b"2")):
            for label, wanted in (("cls", 3), ("json:x", 4)):
                source = Tar(path, image=image, label=label)
                assert contents(source) == [data] and source.labels.tolist() == [wanted]


def test_labels_that_appear_are_found_in_shards_that_are_known(tmp_path):
    shard(tmp_path, {"a.jpg": b""}, "0.tar"), shard(tmp_path, samples("b", "c"), "1.tar")
    assert Tar(tmp_path / "*.tar").labels is None
    shard(tmp_path, samples("a"), "0.tar")
    assert Tar(tmp_path / "*.tar").labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("at", [0, 12, 45, 80, -1])
def test_damaged_index_is_made_again(tmp_path, cache, walked, at):  # noqa: F811
    path = shards(tmp_path, 1)
    wanted = summary(Tar(path))
    (file,) = cache.glob("*.index")
    content = bytearray(file.read_bytes())
    if at >= 0:
        content[at] ^= 1
    else:
        content = content[:-1]
    file.unlink()
    file.write_bytes(content)
    before = len(walked)
    assert summary(Tar(path)) == wanted and len(walked) > before
    before = len(walked)
    assert summary(Tar(path)) == wanted and len(walked) == before


def test_without_a_cache(tmp_path, monkeypatch, walked):
    def refuse(kind: str) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(index_file, "user_cache", refuse)
    path = shards(tmp_path, 1)
    assert summary(Tar(path)) == summary(Tar(path)) and len(walked) == 4


def test_one_of_several_openings_reads(tmp_path, walked):
    path = shards(tmp_path, 8)
    found = []
    threads = [threading.Thread(target=lambda: found.append(summary(Tar(path, label="cls")))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(walked) == 8 and found == found[:1] * 4


def test_error_in_one_of_many_shards_is_raised(tmp_path):
    path = shards(tmp_path, 8)
    (tmp_path / "5.tar").write_bytes(b"x" * 2000)
    assert error_of(Tar, path).startswith(f"{tmp_path}/5.tar: it is no tar archive")
    shards(tmp_path, 8)
    assert len(Tar(path)) == 16


def test_index_of_dali_is_used_and_the_same_is_written(tmp_path, walked):
    """`wds2idx` itself makes the one; `index: beside` the other."""
    files = samples("a", "x/b", "c", extension="jpeg") | {"._hidden.jpg": b"", "d.tar.cls": b"0"}
    path = shard(tmp_path, files)
    wanted = summary(Tar(path, label="cls", index="beside"))
    own = (tmp_path / "a.idx").read_bytes()
    creator = import_module("wds2idx").IndexCreator(str(path), str(tmp_path / "a.idx"), verbose=False)
    with creator:
        creator.create_index()
    assert own == (tmp_path / "a.idx").read_bytes()
    for file in tmp_path.glob("cache/kd_pipeline/index/*"):
        file.unlink()
    walked.clear()
    found = summary(Tar(path, label="cls"))
    assert walked == []
    hidden = [index for index, text in enumerate(wanted[-1]) if "hidden" in text]
    assert found[:-1] == wanted[:-1] and len(hidden) == 1, "hidden files are not in an index"


WRONG: dict[str, bytes] = {
    "empty": b"",
    "old version": b"v1.1 1\njpg 512 600\n",
    "text": b"hello\n",
    "columns": b"v1.2 1\njpg 512 600\n",
    "count": b"v1.2 2\njpg 512 1 a.jpg\n",
    "no samples": b"v1.2 0\n",
    "negative": b"v1.2 1\njpg -512 1 a.jpg\n",
    "long number": b"v1.2 1\njpg " + b"9" * 5000 + b" 1 a.jpg\n",
    "odd place": b"v1.2 1\njpg 513 1 a.jpg\n",
    "backward": b"v1.2 2\njpg 1536 1 b.jpg\njpg 512 1 a.jpg\n",
    "beyond": b"v1.2 1\njpg 1048576 1 a.jpg\n",
    "size": b"v1.2 1\njpg 512 7 a.jpg\n",
    "fewer files": b"v1.2 1\njpg 512 1 a.jpg cls 1536 1 a.cls\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_wrong_index_of_dali_is_not_used(tmp_path, caplog, walked, text):
    path = shard(tmp_path, samples("a", "b"))
    (tmp_path / "a.idx").write_bytes(text)
    source = Tar(path, label="cls")
    assert walked == ["a.tar"] and contents(source) == [b"a", b"b"]
    assert f"a.idx is not the index of {path}" in caplog.text and f"make it again: wds2idx {path}" in caplog.text
    assert (tmp_path / "a.idx").read_bytes() == text


def test_index_that_is_huge_or_no_file(tmp_path, walked):
    path = shard(tmp_path, samples("a"))
    with (tmp_path / "a.idx").open("wb") as file:
        file.truncate(2**36)
    assert len(Tar(path, label="cls")) == 1
    (tmp_path / "a.idx").unlink()
    os.mkfifo(tmp_path / "a.idx")
    os.utime(path, (1, 1))
    assert len(Tar(path, label="cls")) == 1 and walked == ["a.tar"] * 2


def test_index_that_lies_in_the_middle_is_an_error(tmp_path):
    path = shard(tmp_path, samples("a", "b", "c"))
    (tmp_path / "a.idx").write_bytes(
        b"v1.2 3\njpg 512 1 a.jpg cls 1536 1 a.cls\n"
        b"jpg 2560 5 b.jpg cls 3584 1 b.cls\njpg 4608 1 c.jpg cls 5632 1 c.cls\n"
    )
    source = Tar(path)
    with pytest.raises(DataError, match=r"a\.tar, sample b\.jpg, byte 2560: .* delete the index file beside the shard"):
        source.read(np.arange(3))


def test_beside_writes_into_the_cache_alone_where_it_must(tmp_path, caplog, walked):
    path = write_tar(tmp_path / "a.tar", samples("a b"))
    for _ in range(2):
        assert len(Tar(path, label="cls", index="beside")) == 1
    assert not (tmp_path / "a.idx").exists() and walked == ["a.tar"]
    assert "the name 'a b.jpg' has a space" in caplog.text
    assert dali_index([Member(b"a.jpg", 512, 1)]) == b"v1.2 1\njpg 512 1 a.jpg\n"


def test_shards_behind_urls(tmp_path, cache, walked):  # noqa: F811
    path = shards(tmp_path / "data")
    local = Tar(path, label="cls")
    with serve_folder(tmp_path / "data") as server:
        url = f"{server.url.replace('://', '://user:secret1@')}/{{0..2}}.tar?token=secret2"
        for _ in range(2):
            source = Tar(url, label="cls", storage=StoreSettings(cache_size=0))
            assert summary(source)[:5] == summary(local)[:5] and source.fingerprint == local.fingerprint
        assert len(walked) == 6 and source.name(0) == "0.tar::0a.jpg"
        for file in cache.iterdir():
            assert b"secret" not in file.read_bytes() and "secret" not in file.name
        server.etags["/1.tar?token=secret2"] = '"changed"'
        with pytest.raises(StorageError, match=rf"{server.url}/1\.tar, sample 1a\.jpg, byte 512: ") as info:
            source.read(np.array([2]))
        assert "secret" not in str(info.value) and "has changed" in str(info.value)
        server.fail(404, 99, "/2.tar")
        with pytest.raises(NoSuchFileError, match=r"/2\.tar"):
            Tar(url, label="cls")


def test_remote_indexes_and_lists_of_shards(tmp_path, walked):
    path = shards(tmp_path)
    wanted = summary(Tar(path, label="none", index="beside"))
    (tmp_path / "sizes.json").write_text('{"0.tar": 2, "1.tar": 2, "2.tar": 2}')
    walked.clear()
    with serve_folder(tmp_path) as server:
        found = summary(Tar(f"{server.url}/sizes.json", label="none"))
        assert found == wanted and walked == []
        assert sum(request.path.endswith(".tar") for request in server.requests) < 30


@pytest.mark.parametrize("is_label_first", [True, False])
def test_index_takes_one_read_for_each_sample(tmp_path, monkeypatch, is_label_first):
    pairs = [(f"{number:03}.jpg", bytes(20_000)) for number in range(50)]
    labels = [(f"{number:03}.cls", b"1") for number in range(50)]
    order = zip(labels, pairs, strict=True) if is_label_first else zip(pairs, labels, strict=True)
    path = write_tar(tmp_path / "a.tar", [file for sample in order for file in sample])
    reads = []
    read = LocalStore.read
    monkeypatch.setattr(
        LocalStore, "read", lambda self, *args, **kwargs: [reads.append(args), read(self, *args, **kwargs)][1]
    )
    assert len(Tar(path, label="cls")) == 50
    assert len(reads) < 60


def test_remote_shards_are_transferred_once(tmp_path):
    """The index reads them whole, so the cache of the store has them for the images."""
    path = shards(tmp_path)
    with serve_folder(tmp_path) as server:
        storage = StoreSettings(cache_dir=tmp_path / "kept")
        source = Tar(f"{server.url}/{{0..2}}.tar", label="cls", storage=storage)
        wait_until(lambda: not source._store._state.downloads.noted)  # they are written in the background
        server.requests.clear()
        assert contents(source) == contents(Tar(path, label="cls"))
        assert [request for request in server.requests if request.method == "GET"] == []
