"""Files in the authors' formats, with a few random images."""

import gzip
import hashlib
import io
import os
import tarfile
import threading
import tracemalloc
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from torchvision import datasets

from kd_pipeline.data.sources.pixels import cifar
from kd_pipeline.data.sources.pixels.cifar import Cifar
from kd_pipeline.errors import DataError
from tests.cifar_files import (
    ARCHIVES,
    CIFAR10,
    COARSE,
    FINE,
    FOLDERS,
    NUM_IMAGES,
    batch,
    class_names,
    content,
    meta,
    pack,
    pickled,
    write,
)

VERSIONS = list(FOLDERS)
PIXELS = np.arange(10 * 3072, dtype=np.uint64).astype(np.uint8).reshape(10, 3072)


@pytest.fixture
def few(monkeypatch):
    """50 and 10 images where the real files have 50,000 and 10,000."""
    monkeypatch.setattr(cifar, "_NUM_IMAGES", NUM_IMAGES)


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as info:
        Cifar(*args, **kwargs)
    return str(info.value)


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


# What is read


@pytest.mark.parametrize(("dataset", "version"), VERSIONS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_all_versions_and_places_read_the_same(tmp_path, few, dataset, version, split):
    folder = write(dataset, version, tmp_path / "unpacked" / FOLDERS[dataset, version])
    (tmp_path / "packed").mkdir()
    archive = pack(folder, tmp_path / "packed" / ARCHIVES[dataset, version])
    images, labels = content(dataset, split)
    for kind in ("fine", "coarse") if dataset == "cifar100" else ("fine",):
        expected = labels["labels" if dataset == "cifar10" else f"{kind}_labels"]
        names = CIFAR10 if dataset == "cifar10" else {"fine": FINE, "coarse": COARSE}[kind]
        for root in (folder, folder.parent, str(archive), archive.parent):
            source = Cifar(dataset, root, split=split, labels=kind)
            assert len(source) == NUM_IMAGES[split] and source.classes == tuple(names)
            assert source.num_classes == len(names) and source.stores == "pixels"
            assert source.labels.dtype == np.int64 and source.labels.tolist() == expected.tolist()
            order = np.random.default_rng(0).permutation(len(source))
            np.testing.assert_array_equal(source.read(order), images[order])


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_fingerprint_depends_on_content_only(tmp_path, few, dataset):
    prints = []
    for version in ("binary", "python"):
        root = write(dataset, version, tmp_path / version)
        prints.append([Cifar(dataset, root, split=split).fingerprint for split in ("train", "test")])
        if dataset == "cifar100":
            prints[-1].append(Cifar(dataset, root, split="test", labels="coarse").fingerprint)
    assert prints[0] == prints[1] and len(set(prints[0])) == len(prints[0])


@pytest.mark.parametrize(("split", "num", "last"), [("train", 50_000, "train.bin"), ("test", 10_000, "test.bin")])
def test_cifar_100_sizes(tmp_path, split, num, last):
    write("cifar100", "binary", tmp_path)
    (tmp_path / last).write_bytes(b"")
    os.truncate(tmp_path / last, num * 3074)  # zeros that take no space on the disk
    source = Cifar("cifar100", tmp_path, split=split)
    assert len(source) == num and source.name(num - 1) == f"{tmp_path}/{last}[{num - 1}]"


@pytest.mark.parametrize(
    ("split", "num", "last"), [("train", 50_000, "data_batch_5.bin"), ("test", 10_000, "test_batch.bin")]
)
def test_cifar_10_sizes_and_memory(tmp_path, split, num, last):
    write("cifar10", "binary", tmp_path)
    for path in tmp_path.glob("*.bin"):
        path.write_bytes(b"")
        os.truncate(path, 10_000 * 3073)
    tracemalloc.start()
    source = Cifar("cifar10", tmp_path, split=split)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == num and source.name(num - 1) == f"{tmp_path}/{last}[9999]"
    assert held < num * 3072 + 2**20


def test_reads_fortran_order(tmp_path, few):
    write("cifar10", "python", tmp_path)
    (tmp_path / "test_batch").write_bytes(pickled(batch(np.asfortranarray(PIXELS), {"labels": range(10)})))
    images = PIXELS.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(Cifar("cifar10", tmp_path, split="test").read(np.arange(10)), images)


def test_name_is_file_and_position(tmp_path, few, monkeypatch):
    write("cifar10", "python", tmp_path / "cifar-10-batches-py")
    monkeypatch.chdir(tmp_path)
    source = Cifar("cifar10", "cifar-10-batches-py", split="train")
    assert source.name(0) == "cifar-10-batches-py/data_batch_1[0]"
    assert source.name(29) == "cifar-10-batches-py/data_batch_3[9]"
    pack(tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz")
    source = Cifar("cifar10", "cifar-10-python.tar.gz", split="test")
    assert source.name(3) == "cifar-10-python.tar.gz/test_batch[3]"


def test_prefers_folders_and_binary_version(tmp_path, few):
    places = []
    for version in ("python", "binary"):
        folder = write("cifar10", version, tmp_path / "elsewhere" / FOLDERS["cifar10", version])
        pack(folder, tmp_path / ARCHIVES["cifar10", version])
        places.append(Cifar("cifar10", tmp_path, split="test").name(0))
    for version in ("python", "binary"):
        write("cifar10", version, tmp_path / FOLDERS["cifar10", version])
        places.append(Cifar("cifar10", tmp_path, split="test").name(0))
    assert [place.removeprefix(f"{tmp_path}/") for place in places] == [
        "cifar-10-python.tar.gz/test_batch[0]",
        "cifar-10-binary.tar.gz/test_batch.bin[0]",
        "cifar-10-batches-py/test_batch[0]",
        "cifar-10-batches-bin/test_batch.bin[0]",
    ]


def test_one_folder_can_hold_both_datasets(tmp_path, few):
    for dataset, version in VERSIONS:
        write(dataset, version, tmp_path / FOLDERS[dataset, version])
    assert Cifar("cifar10", tmp_path, split="test").num_classes == 10
    assert Cifar("cifar100", tmp_path, split="test").num_classes == 100


# What is refused


@pytest.mark.parametrize("version", ["binary", "python"])
def test_missing_dataset_says_what_to_put_where(tmp_path, few, version):
    write("cifar100", version, tmp_path / FOLDERS["cifar100", version])
    (tmp_path / "none/train").mkdir(parents=True)  # a folder of images, not a file with that name
    message = refusal("cifar10", tmp_path, split="train")
    assert message.startswith(f"{tmp_path}: no cifar10 here, none of cifar-10-batches-bin, cifar-10-binary.tar.gz,")
    assert "put https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz there, or set download: true" in message
    assert "set kind: cifar100, which is here, or put https" in message
    message = refusal("cifar100", tmp_path / "none", split="train")
    assert "no cifar100 here" in message and f"set root: {tmp_path}, where it is, or put https" in message


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("binary", "data_batch_4.bin"),
        ("binary", "batches.meta.txt"),
        ("python", "data_batch_4"),
        ("python", "batches.meta"),
    ],
)
def test_missing_file_is_named(tmp_path, few, version, name):
    folder = write("cifar10", version, tmp_path / FOLDERS["cifar10", version])
    (folder / name).unlink()
    assert f"{folder / name}" in refusal("cifar10", folder, split="train")
    archive = pack(folder, tmp_path / ARCHIVES["cifar10", version])
    assert refusal("cifar10", archive, split="train").startswith(f"{archive}: has no {name} in {folder.name}/")


@pytest.mark.parametrize("size", [0, 3073 * 9, 3073 * 10 - 1, 3073 * 10 + 1, 3073 * 20])
def test_wrong_binary_size_names_both_sizes(tmp_path, few, size):
    write("cifar10", "binary", tmp_path)
    os.truncate(tmp_path / "data_batch_2.bin", size)
    message = refusal("cifar10", tmp_path, split="train")
    found = size if size < 30730 else "more"
    assert message.startswith(f"{tmp_path}/data_batch_2.bin: has {found} bytes, expected 30730 for 10 images")


BATCHES = {
    "images": (batch(PIXELS[:9], {"labels": range(10)}), "has 9 images and 10 labels, expected 10"),
    "labels": (batch(PIXELS, {"labels": range(9)}), "has 10 images and 9 labels, expected 10"),
    "both": (batch(PIXELS[:9], {"labels": range(9)}), "has 9 images and 9 labels, expected 10"),
    "no labels": (batch(PIXELS, {}), "no uint8 array data [10, 3072] with a list labels"),
    "other labels": (batch(PIXELS, {"fine_labels": range(10)}), "with a list labels"),
    "no data": ({b"labels": [0] * 10}, "no uint8 array data"),
    "data of another kind": ({b"labels": [0] * 10, b"data": [0]}, "no uint8 array data"),
    "other dtype": (batch(PIXELS.view(np.int8), {"labels": range(10)}), "no uint8 array data"),
    "wider dtype": (batch(PIXELS.astype(np.uint16), {"labels": range(10)}), "no uint8 array data"),
    "other shape": (batch(PIXELS[:, :3071], {"labels": range(10)}), "no uint8 array data"),
    "other size": (batch(PIXELS.reshape(5, 6144), {"labels": range(10)}), "no uint8 array data"),
    "no dict": ([1], "no uint8 array data"),
}


@pytest.mark.parametrize(("value", "words"), BATCHES.values(), ids=BATCHES)
def test_wrong_pickle_content_is_described(tmp_path, few, value, words):
    write("cifar10", "python", tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickled(value))
    message = refusal("cifar10", tmp_path, split="train")
    assert message.startswith(f"{tmp_path}/data_batch_2: has ") and words in message


def test_short_array_is_refused(tmp_path, few):
    write("cifar10", "python", tmp_path)
    data = pickled(batch(PIXELS, {"labels": range(10)}))
    short = data.replace(b"T" + (30720).to_bytes(4, "little") + b"\0", b"T" + (30719).to_bytes(4, "little"))
    assert len(short) == len(data) - 1
    (tmp_path / "test_batch").write_bytes(short)
    assert "test_batch: has no uint8 array data" in refusal("cifar10", tmp_path, split="test")


@pytest.mark.parametrize("label", [10, -1, 255, 2**31 - 1])
def test_label_out_of_range_is_located(tmp_path, few, label):
    write("cifar10", "python", tmp_path / "python")
    (tmp_path / "python/data_batch_3").write_bytes(pickled(batch(PIXELS, {"labels": [0] * 7 + [label] * 3})))
    message = f"data_batch_3[7]: the label {label} is not a class index from 0 to 9"
    assert message in refusal("cifar10", tmp_path / "python", split="train")
    if 0 <= label < 256:
        path = write("cifar10", "binary", tmp_path / "binary") / "test_batch.bin"
        data = bytearray(path.read_bytes())
        data[9 * 3073] = label
        path.write_bytes(data)
        assert f"test_batch.bin[9]: the label {label} is" in refusal("cifar10", tmp_path / "binary", split="test")


@pytest.mark.parametrize(("kind", "at", "limit"), [("coarse", 0, 20), ("fine", 1, 100)])
def test_each_kind_of_label_has_its_own_range(tmp_path, few, kind, at, limit):
    path = write("cifar100", "binary", tmp_path) / "test.bin"
    data = bytearray(path.read_bytes())
    data[5 * 3074 + at] = limit
    path.write_bytes(data)
    message = refusal("cifar100", tmp_path, split="test", labels=kind)
    assert f"test.bin[5]: the label {limit} is not a class index from 0 to {limit - 1}" in message
    Cifar("cifar100", tmp_path, split="test", labels="coarse" if kind == "fine" else "fine")


def test_non_integer_label_is_refused(tmp_path, few):
    write("cifar10", "python", tmp_path)
    (tmp_path / "test_batch").write_bytes(pickled({**batch(PIXELS, {}), b"labels": [0] * 9 + [b"cat"]}))
    assert "test_batch[9]: the label of type bytes is not" in refusal("cifar10", tmp_path, split="test")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**meta(), b"label_names": [b"cat"] * 9}, "has 9 class names, expected 10"),
        ({**meta(), b"label_names": [1] * 10}, "has 10 class names, expected 10 texts"),
        ({b"num_vis": 3072}, "has no list called label_names"),
        ([b"cat"] * 10, "has no list called label_names"),
    ],
)
def test_invalid_class_names_are_refused(tmp_path, few, value, words):
    write("cifar10", "python", tmp_path)
    (tmp_path / "batches.meta").write_bytes(pickled(value))
    message = refusal("cifar10", tmp_path, split="test")
    assert message.startswith(f"{tmp_path}/batches.meta: ") and words in message


def test_wrong_number_of_class_names_is_refused(tmp_path, few):
    write("cifar100", "binary", tmp_path)
    (tmp_path / "fine_label_names.txt").write_bytes(class_names("cifar100", "binary")["coarse_label_names.txt"])
    assert "fine_label_names.txt: has 20 class names, expected 100" in refusal("cifar100", tmp_path, split="test")


def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, few):
    marker = tmp_path / "owned"
    path = str(marker).encode()
    trap = b"cos\nmkdir\nU%c" % len(path) + path + b"\x85R"
    for name in ("data_batch_5", "batches.meta"):
        folder = write("cifar10", "python", tmp_path / name / "cifar-10-batches-py")
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:5] + b"(U\x04trap" + trap + b"u" + data[5:])
        for root in (folder, pack(folder, tmp_path / name / "cifar-10-python.tar.gz")):
            message = refusal("cifar10", root, split="train")
            assert message.startswith(f"{root}/{name}: not a Python 2 pickle") and "'os mkdir'" in message
    assert not marker.exists()


# Archives


def test_truncated_archive_is_refused(tmp_path, few):
    whole = pack(write("cifar10", "binary", tmp_path / "cifar-10-batches-bin"), tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "root").mkdir()
    archive = tmp_path / "root/cifar-10-binary.tar.gz"
    for data in [
        b"",
        b"text",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:2000] + bytes(100) + whole[2100:],
    ]:
        archive.write_bytes(data)
        message = refusal("cifar10", archive.parent, split="train")
        assert message.startswith(f"{archive}: ") and "cifar-10-binary.tar.gz again" in message


def test_damaged_archive_is_refused_or_identical(tmp_path, few):
    archive = tmp_path / "cifar-100-python.tar.gz"
    pack(write("cifar100", "python", tmp_path / "cifar-100-python"), archive)
    data, whole = archive.read_bytes(), Cifar("cifar100", archive, split="test").fingerprint
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        archive.write_bytes(damaged)
        try:
            assert Cifar("cifar100", archive, split="test").fingerprint == whole
        except DataError as exc:
            assert str(exc).startswith(str(archive))
            refused += 1
    assert refused > 90


def test_archive_is_never_unpacked(tmp_path, few):
    folder = write("cifar10", "binary", tmp_path / "made/cifar-10-batches-bin")
    root = tmp_path / "a/b/root"
    root.mkdir(parents=True)
    archive = root / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../../evil", "/tmp/kd_pipeline_evil", "cifar-10-batches-bin/../../../evil"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        tar.add(folder, "cifar-10-batches-bin")
    before = names_in(tmp_path)
    assert len(Cifar("cifar10", root, split="test")) == 10
    assert names_in(tmp_path) == before and not os.path.exists("/tmp/kd_pipeline_evil")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_reads_only_regular_archive_members(tmp_path, few, kind):
    folder = write("cifar10", "binary", tmp_path / "cifar-10-batches-bin")
    secret = tmp_path / "secret"
    (folder / "test_batch.bin").rename(secret)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.type, member.linkname = kind, str(secret)
        tar.addfile(member)
        tar.add(folder, "cifar-10-batches-bin")
    message = refusal("cifar10", tmp_path / "cifar-10-binary.tar.gz", split="test")
    assert "has no test_batch.bin in cifar-10-batches-bin/" in message


def packed(path, *members):
    """An archive of members, each its header and the bytes after it."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(member.tobuf(tarfile.GNU_FORMAT) + content for member, content in members)))
    return path


def member(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


TEST_BATCH = "cifar-10-batches-bin/test_batch.bin"
BOMBS = {
    "content": [(member("bomb", 2**22), bytes(2**22))],
    "after the end": [(member("a", 0), bytes(2**22))],
    "claimed by a wanted file": [(member(TEST_BATCH, 2**60), b"")],
    "negative": [(member(TEST_BATCH, -512), b"")],
    "pax header": [(member("pax", 2**24, tarfile.XHDTYPE), bytes(2**24)), (member(TEST_BATCH, 3), b"")],
    "long name": [(member("name", 2**24, tarfile.GNUTYPE_LONGNAME), b"x" * 2**24)],
    "sparse": [(member(TEST_BATCH, 2**24, tarfile.GNUTYPE_SPARSE), bytes(2**24))],
    "many": [(member("", 0), b"")] * 10_000,
}


@pytest.mark.parametrize("members", BOMBS.values(), ids=BOMBS)
def test_archive_that_unpacks_to_more_than_a_dataset_is_refused(tmp_path, few, monkeypatch, members):
    monkeypatch.setattr(cifar, "_MAX_UNPACKED", 2**20)
    archive = packed(tmp_path / "root/cifar-10-binary.tar.gz", *members)
    tracemalloc.start()
    message = refusal("cifar10", archive, split="test")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.startswith(
        f"{archive}: unpacks to more than 1048576 bytes, and no version of the dataset does; get h"
    )
    assert most < 2**23


@pytest.mark.parametrize("name", ["test_batch.bin", "batches.meta.txt"])
def test_pipe_in_place_of_a_file_is_refused(tmp_path, few, name):
    folder = write("cifar10", "binary", tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    message = refusal("cifar10", folder, split="test")
    assert message.startswith(f"{folder / name}: cannot be read (this is a pipe and no file); get https")


def test_root_that_is_no_folder_is_refused(tmp_path, few):
    os.mkfifo(tmp_path / "cifar-10-binary.tar.gz")
    for root in (tmp_path, tmp_path / "cifar-10-binary.tar.gz", tmp_path / ("x" * 5000)):
        assert "no cifar10 here" in refusal("cifar10", root, split="test")


# Downloads


@pytest.fixture
def site(tmp_path, few, monkeypatch):
    """A folder in place of the authors' site, with a small archive of which they publish the right checksum."""
    folder = tmp_path / "site"
    archive = pack(write("cifar10", "binary", folder / "cifar-10-batches-bin"), folder / "cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar, "_SITE", f"{folder.as_uri()}/")
    binary, python = cifar._VERSIONS["cifar10"]
    fields = {name: getattr(binary, name) for name in binary.__dataclass_fields__}
    content = archive.read_bytes()
    fields |= {"archive_bytes": len(content), "archive_sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setitem(cifar._VERSIONS, "cifar10", (type(binary)(**fields), python))
    return archive


def test_download_is_kept_and_reused(tmp_path, site):
    root = tmp_path / "new/root"
    source = Cifar("cifar10", root, split="test", download=True)
    np.testing.assert_array_equal(source.read(np.arange(10)), content("cifar10", "test").images)
    assert names_in(root) == ["cifar-10-binary.tar.gz"]
    assert (root / "cifar-10-binary.tar.gz").stat().st_mode & 0o777 == site.stat().st_mode & 0o777
    site.unlink()
    for download in (True, False):
        assert Cifar("cifar10", root, split="train", download=download).fingerprint


def test_downloads_only_if_asked_and_missing(tmp_path, site, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("connected")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", never)
    assert "set download: true" in refusal("cifar10", tmp_path / "root", split="test")
    write("cifar10", "python", tmp_path / "root")
    Cifar("cifar10", tmp_path / "root", split="test", download=True)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:-1] + b"x", lambda data: data + b"xyz", lambda data: b""]
)
def test_download_with_wrong_checksum_leaves_nothing(tmp_path, site, change):
    whole = site.read_bytes()
    changed = change(whole)
    site.write_bytes(changed)
    message = refusal("cifar10", tmp_path / "root", split="test", download=True)
    size = len(changed) if len(changed) <= len(whole) else "more"
    read = changed[: len(whole) + 1]  # and no further
    found, expected = (hashlib.sha256(content).hexdigest() for content in (read, whole))
    assert message.startswith(f"{site.as_uri()}: the download has {size} bytes and SHA-256 {found}, expected ")
    assert f"expected {len(whole)} and {expected}" in message
    assert names_in(tmp_path / "root") == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/", "file:///nowhere/"])
def test_failed_download_says_what_to_put_where(tmp_path, few, monkeypatch, address):
    monkeypatch.setattr(cifar, "_SITE", address)
    message = refusal("cifar100", tmp_path / "root", split="test", download=True)
    assert message.startswith(f"{address}cifar-100-binary.tar.gz: cannot be downloaded (")
    assert f"download it on another machine and put it into {tmp_path}/root, packed or unpacked" in message
    assert names_in(tmp_path / "root") == []


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/evil.tar.gz", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_download_follows_redirects_to_https_alone(tmp_path, few, monkeypatch, target):
    asked = []

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *args):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(cifar, "_SITE", f"http://127.0.0.1:{server.server_port}/")
        try:
            message = refusal("cifar10", tmp_path / "root", split="test", download=True)
        finally:
            server.shutdown()
            thread.join()
    assert "cannot be downloaded (" in message and target in message
    assert asked == ["/cifar-10-binary.tar.gz"] and names_in(tmp_path / "root") == []


def test_downloads_come_from_https_and_have_a_size_and_a_sha_256():
    for binary, _ in cifar._VERSIONS.values():
        assert binary.url.startswith("https://") and 160 * 2**20 < binary.archive_bytes < cifar._MAX_UNPACKED
        assert len(bytes.fromhex(binary.archive_sha256)) == 32


def test_unwritable_root_is_refused(tmp_path, site):
    (tmp_path / "file").write_text("")
    assert "cannot be downloaded (" in refusal("cifar10", tmp_path / "file", split="test", download=True)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_names_match_torchvision(dataset):
    theirs = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    _, ours = cifar._VERSIONS[dataset]
    assert (ours.url, ours.folder) == (theirs.url, theirs.base_folder)
    assert ours.files == {
        "train": tuple(name for name, _ in theirs.train_list),
        "test": tuple(name for name, _ in theirs.test_list),
    }
    assert ours.names == theirs.meta["filename"]
