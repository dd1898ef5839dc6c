"""Images in tar shards are samples as in WebDataset, and what is odd, damaged or ambiguous is reported."""

import gzip
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources import ImageFolder, Tar, open_source
from kd_pipeline.data.sources.base import TarSettings
from kd_pipeline.errors import DataError, StorageError
from tests.data.sources.helpers import error_of
from tests.tar_files import folder_as_shards, write_tar

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kd_pipeline/index"


def samples(*keys: str, extension: str = "jpg", label: str = "cls") -> Files:
    """An image and a label for each key; labels count from 0."""
    return {
        f"{key}.{end}": content
        for number, key in enumerate(keys)
        for end, content in ((extension, key.encode()), (label, str(number).encode()))
    }


def shard(folder: Path, files: Files, name: str = "a.tar") -> Path:
    folder.mkdir(exist_ok=True)
    return write_tar(folder / name, files)


def contents(source: Tar) -> list[bytes]:
    return [image.tobytes() for image in source.read(np.arange(len(source)))]


def keys(source: Tar) -> list[str]:
    return [source.name(index).partition("::")[2] for index in range(len(source))]


def summary(source: Tar) -> tuple[object, ...]:
    labels = None if source.labels is None else source.labels.tolist()
    return (keys(source), contents(source), labels, source.classes, source.num_classes, source.warnings)


def test_samples_in_the_order_of_shards(tmp_path):
    shard(tmp_path, samples("x/1", "x/2"), "train-0.tar")
    shard(tmp_path, samples("y/1"), "train-1.tar")
    source = Tar(tmp_path / "train-{0..1}.tar")
    assert [source.name(index) for index in range(3)] == [
        "train-0.tar::x/1.jpg", "train-0.tar::x/2.jpg", "train-1.tar::y/1.jpg",
    ]  # fmt: skip
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 1, 0]
    assert (source.classes, source.num_classes, source.stores, source.warnings) == (None, 2, "bytes", ())
    assert source.shard_ends.tolist() == [0, 2, 3] and len(source) == 3
    assert contents(source) == [b"x/1", b"x/2", b"y/1"]
    assert contents(Tar([tmp_path / "train-1.tar", tmp_path / "train-0.tar"])) == [b"y/1", b"x/1", b"x/2"]
    assert repr(source) == "Tar(3 images, 2 classes)"


def test_any_order_and_repeats_are_read(tmp_path):
    rng = np.random.default_rng(0)
    wanted = []
    for number in range(3):
        images = {f"{number}{at:02}.png": rng.bytes(int(rng.integers(0, 3000))) for at in range(20)}
        wanted += images.values()
        shard(tmp_path, images, f"{number}.tar")
    source = Tar(tmp_path / "*.tar", label="none")
    for size in (1, 7, 100):
        indices = rng.integers(0, 60, size)
        assert [image.tobytes() for image in source.read(indices)] == [wanted[index] for index in indices]
    assert source.read(np.zeros(0, np.int64)) == []


@pytest.mark.parametrize("label", ["cls", "txt", "folder"])
def test_folder_and_its_shards_are_the_same_data(photo_folder, tmp_path, label):
    folder, source = (
        ImageFolder(photo_folder),
        Tar(folder_as_shards(photo_folder, tmp_path, per_shard=8, label=label), label=label),
    )
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.classes == (None if label == "cls" else folder.classes)
    assert contents(source) == [Path(folder.name(index)).read_bytes() for index in range(len(folder))]


LABELS: dict[str, tuple[str, Files, list[int], tuple[str, ...] | None]] = {
    "cls by itself": ("auto", {"a.jpg": b"", "a.cls": b"3\n", "b.cls": b"0", "b.jpg": b""}, [3, 0], None),
    "names in cls": ("cls", {"a.jpg": b"", "a.cls": b"dog", "b.jpg": b"", "b.cls": b"cat\n"}, [1, 0], ("cat", "dog")),
    "txt": ("txt", {"a.jpg": b"", "a.txt": b"\xef\xbb\xbfdog ", "b.jpg": b"", "b.txt": b"cat"}, [1, 0], ("cat", "dog")),
    "numbers in txt": ("txt", {"a.jpg": b"", "a.txt": b"10", "b.jpg": b"", "b.txt": b"9"}, [10, 9], None),
    "json": ("json:id", {"a.jpg": b"", "a.json": b'{"id": 5}', "b.jpg": b"", "b.json": b'{"id": 4}'}, [5, 4], None),
    "json names": (
        "json:id",
        {"a.jpg": b"", "a.json": b'{"id": "10"}', "b.jpg": b"", "b.json": b'{"id": "9"}'},
        [0, 1],
        ("10", "9"),
    ),
    "several dots": (
        "meta.json:y",
        {"a.jpg": b"", "a.meta.json": b'{"y": 1}', "b.jpg": b"", "b.meta.json": b'{"y": 0}'},
        [1, 0],
        None,
    ),
    "folder": ("folder", {"x/dog/a.jpg": b"", "x/cat/a.jpg": b""}, [1, 0], ("cat", "dog")),
    "case": (".CLS", {"a.JPG": b"", "a.Cls": b"1", "b.jpg": b"", "b.cls": b"0"}, [1, 0], None),
}


@pytest.mark.parametrize(("label", "files", "labels", "classes"), LABELS.values(), ids=LABELS)
def test_labels(tmp_path, label, files, labels, classes):
    for _ in range(2):
        source = Tar(shard(tmp_path, files), label=label)
        assert (source.labels.tolist(), source.classes) == (labels, classes)


def test_no_labels(tmp_path):
    for files, label in (({"a.jpg": b"", "b.png": b""}, "auto"), (samples("a", "b"), "none")):
        source = Tar(shard(tmp_path, files), label=label)
        assert (len(source), source.labels, source.num_classes) == (2, None, None)
        assert Tar(shard(tmp_path, files), label=label, classes=("x", "y")).classes == ("x", "y")


def test_empty_first_shard_says_nothing_about_labels(tmp_path):
    shard(tmp_path, {}, "0.tar"), shard(tmp_path, samples("a", "b"), "1.tar")
    source = Tar(tmp_path / "*.tar")
    assert source.labels.tolist() == [0, 1] and source.shard_ends.tolist() == [0, 0, 2]
    assert source.name(0) == "1.tar::a.jpg" and contents(source) == [b"a", b"b"]


def test_names_of_several_shards_and_given_classes(tmp_path):
    shard(tmp_path, {"a.jpg": b"", "a.txt": b"dog", "b.jpg": b"", "b.txt": b"ant"}, "0.tar")
    shard(tmp_path, {"c.jpg": b"", "c.txt": b"cat", "d.jpg": b"", "d.txt": b"dog"}, "1.tar")
    path = str(tmp_path / "*.tar")
    for _ in range(2):
        source = Tar(path, label="txt")
        assert source.classes == ("ant", "cat", "dog") and source.labels.tolist() == [2, 0, 1, 2]
        source = Tar(path, label="txt", classes=("dog", "fox", "cat", "ant"))
        assert source.labels.tolist() == [0, 3, 2, 0] and source.num_classes == 4
        assert source.warnings == (f"{path}: no samples for 1 of the 4 classes: fox",)
    message = error_of(Tar, path, label="txt", classes=("dog", "fox", "ant"))
    assert message.startswith(f"{path}: label(s) that are not among the 3 classes: cat; add them to `classes`")


def test_given_classes_of_indices(tmp_path):
    path = shard(tmp_path, {"a.jpg": b"", "a.cls": b"2"})
    source = Tar(path, classes=("x", "y", "z"))
    assert source.classes == ("x", "y", "z") and "no samples for 2 of 3 classes: x, y" in source.warnings[0]
    assert "the label 2 is not a class index from 0 to 1" in error_of(Tar, path, classes=("x", "y"))


SKIPPED: dict[str, tuple[Files, str]] = {
    "no image": (
        samples("a", "b") | {"c.cls": b"0"},
        "1 sample(s) without an image, which are skipped; such as {shard}::c",
    ),
    "no label": (
        samples("a", "b") | {"c.jpg": b""},
        "1 image(s) without a label (cls), which are skipped; such as {shard}::c.jpg",
    ),
    "empty label": (samples("a", "b") | {"c.jpg": b"", "c.cls": b" \n"}, "1 image(s) without a label (cls)"),
    "hidden": (
        samples("a", "b") | {"._a.jpg": b"", "README": b""},
        "2 file(s) that are hidden or have no extension, which are skipped; such as {shard}::._a.jpg",
    ),
}


@pytest.mark.parametrize(("files", "warning"), SKIPPED.values(), ids=SKIPPED)
def test_skipped_samples_are_counted(tmp_path, caplog, files, warning):
    path = shard(tmp_path, files)
    for _ in range(2):
        source = Tar(path)
        assert keys(source) == ["a.jpg", "b.jpg"]
        assert source.warnings[0].startswith(f"{path}: {warning.format(shard=path)}")
    assert source.warnings[0] in caplog.messages


def test_key_that_is_there_again_is_a_sample_of_its_own(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*samples("a", "b").items(), *samples("a").items()])
    source = Tar(path)
    assert keys(source) == ["a.jpg", "b.jpg", "a.jpg"] and "1 key(s) that are there again" in source.warnings[0]


def test_extension_of_the_image(tmp_path):
    files = {"a.jpg": b"1", "a.seg.png": b"2", "a.cls": b"0"}
    path = shard(tmp_path, files)
    assert "a.jpg and a.seg.png are both images of one sample" in error_of(Tar, path)
    assert "set image: jpg or image: seg.png for one of them" in error_of(Tar, path)
    assert contents(Tar(path, image="jpg")) == [b"1"]
    assert contents(Tar(path, image=".seg.PNG")) == [b"2"]
    assert contents(Tar(path, image=("webp", "seg.png", "jpg"))) == [b"2"]
    assert contents(Tar(shard(tmp_path, {"a.x.jpg": b"1", "a.cls": b"0"}))) == [b"1"]


ERRORS: dict[str, tuple[Files, dict[str, object], str]] = {
    "ambiguous label": (
        {"x/a.jpg": b"", "x/a.txt": b"a cat", "x/a.json": b'{"id": 1, "url": ""}'},
        {},
        "it is not clear which labels the images have; set label: folder for folders such as x, label: txt for the "
        "text in .txt, label: json:KEY with one of the keys id, url, or label: none for images without labels",
    ),
    "no image at all": ({"a.cls": b"0", "b.cls": b"1"}, {}, "no sample has all it needs: 2 sample(s) without an image"),
    "no label at all": ({"a.jpg": b""}, {"label": "cls"}, "1 image(s) without a label (cls), which are skipped"),
    "not in a row": (
        {"a.jpg": b"", "b.jpg": b"", "a.cls": b"0", "b.cls": b"1"},
        {},
        "make the archive again with tar --sort=name",
    ),
    "nothing": ({}, {}, "there are no files in the shard(s)"),
    "index and name": (
        {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": b"cat"},
        {},
        "b.cls: found a class name, 'cat', where the samples before it have the other",
    ),
    "negative": ({"a.jpg": b"", "a.cls": b"-1"}, {}, "a.cls: the label -1 is no class index; classes count from 0"),
    "huge": (
        {"a.jpg": b"", "a.cls": b"99999999999999999999"},
        {},
        "a.cls: the label 99999999999999999999 is no class index",
    ),
    "fraction": ({"a.jpg": b"", "a.cls": b"3.0"}, {}, "a.cls: the label '3.0' is neither a class index nor a name"),
    "no text": ({"a.jpg": b"", "a.cls": b"\xff\xfe"}, {}, "a.cls: the label cannot be read, as it is no UTF-8"),
    "long": ({"a.jpg": b"", "a.cls": b"x" * 5000}, {}, "a.cls: a label of 5000 bytes; at most 4096 are read"),
    "caption": (
        {"a.jpg": b"", "a.txt": b"x" * 1001},
        {"label": "txt"},
        "a.txt: a class name of 1001 characters; is this a caption?",
    ),
    "no JSON": (
        {"a.jpg": b"", "a.json": b"{"},
        {"label": "json:id"},
        "a.json: the label cannot be read, as it is no JSON",
    ),
    "deep JSON": (
        {"a.jpg": b"", "a.json": b"[" * 100_000},
        {"label": "json:id"},
        "a.json: the label cannot be read, as it is no JSON",
    ),
    "JSON list": (
        {"a.jpg": b"", "a.json": b"[1]"},
        {"label": "json:id"},
        "a.json: this is no object of JSON, so it has no key 'id'",
    ),
    "JSON value": (
        {"a.jpg": b"", "a.json": b'{"id": [1], "y": 2}'},
        {"label": "json:id"},
        "a.json: 'id' is [1], and a label is a whole number or a text; take another key with one of the keys id, y",
    ),
    "two labels": ({"a.jpg": b"", "a.cls": b"0", "a.CLS": b"1"}, {}, "a.CLS is there twice in a row"),
    "one name": (
        {"img.1.jpg": b"", "img.2.jpg": b""},
        {"label": "none"},
        "as a sample is what has the same name up to the first dot",
    ),
}


@pytest.mark.parametrize(("files", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_shard_and_file(tmp_path, cache, files, options, message):
    path = shard(tmp_path, files)
    for _ in range(2):
        found = error_of(Tar, path, **options)
        assert found.startswith(f"{path}: ") and message in found


def test_duplicate_image(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("a.jpg", b""), ("a.cls", b"0")])
    assert f"{path}: a.jpg is there twice in a row; make the archive again with one of them" == error_of(Tar, path)


def test_indices_in_one_shard_and_names_in_another(tmp_path):
    shard(tmp_path, samples("a"), "0.tar"), shard(tmp_path, {"b.jpg": b"", "b.cls": b"cat"}, "1.tar")
    assert "0.tar are indices and in" in error_of(Tar, tmp_path / "*.tar")


def test_names_are_harmless(tmp_path):
    files = {"../../etc/a\n\x1b[2J.jpg": b"1", "../../etc/a\n\x1b[2J.cls": b"0", "/abs.jpg": b"2", "/abs.cls": b"1"}
    path = shard(tmp_path, files)
    with path.open("r+b") as file:  # bytes that are no UTF-8
        content = file.read()
    path.write_bytes(content)
    source = Tar(path)
    assert [source.name(0), source.name(1)] == [r"a.tar::../../etc/a\n\x1b[2J.jpg", "a.tar::/abs.jpg"]
    assert contents(source) == [b"1", b"2"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_headers(tmp_path, form):
    name = "d" * 90 + "/" + "n" * 90 + ("é" if form != tarfile.USTAR_FORMAT else "")
    source = Tar(write_tar(tmp_path / "a.tar", samples(name, "b"), format=form))
    assert keys(source) == [f"{name}.jpg", "b.jpg"] and contents(source) == [name.encode(), b"b"]


def test_image_that_is_cut_off(tmp_path):
    files = {"a.cls": b"0", "a.jpg": b"A" * 900, "b.cls": b"1", "b.jpg": b"B" * 900}
    path = shard(tmp_path, files)
    os.truncate(path, 8 * 512 + 100)  # within the last image
    for _ in range(2):
        source = Tar(path)
        first, second = source.read(np.arange(2))
        assert first.tobytes() == b"A" * 900 and isinstance(second, UnreadableFileError)
        assert str(second) == "the archive is cut off: 900 bytes should be at byte 4096, and 100 are left"
        assert source.warnings[0].startswith(f"{path}: 1 archive(s) cut off")
    assert source.fingerprint


def test_shard_that_changed_after_it_was_opened(tmp_path):
    path = shard(tmp_path, samples("a", "b"))
    Tar(path)
    source = Tar(path)
    shard(tmp_path, samples("a", "bb"))
    os.utime(path, (1, 1))
    with pytest.raises(
        StorageError, match=r"a\.tar, sample a\.jpg, byte 512: it has changed since it was indexed"
    ) as info:
        source.read(np.array([0]))
    assert (info.value.path, info.value.key, info.value.offset) == (str(path), "a.jpg", 512)
    assert keys(Tar(path)) == ["a.jpg", "bb.jpg"], "opened again, it is indexed again"


def test_index_that_lies_is_an_error(tmp_path):
    """Here of a shard with the size and time of another."""
    path = shard(tmp_path, {"a.jpg": b"A" * 600, "a.cls": b"0", "b.jpg": b"B" * 20, "b.cls": b"1"})
    status = path.stat()
    Tar(path)
    shard(tmp_path, {"a.jpg": b"A" * 20, "a.cls": b"0", "b.jpg": b"B" * 600, "b.cls": b"1"})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StorageError, match="by the index of the shard the image is here, and it is not"):
        Tar(path).read(np.array([1]))


def test_compressed_damaged_and_missing_shards(tmp_path):
    path = shard(tmp_path, samples("a", "b", "c"))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert "decompress it with gunzip" in error_of(Tar, tmp_path / "a.tar.gz")
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 1
    (tmp_path / "b.tar").write_bytes(content)
    assert error_of(Tar, tmp_path / "b.tar").startswith(f"{tmp_path}/b.tar: byte 1024: there is no header")
    (tmp_path / "c.tar").write_bytes(b"")
    assert "c.tar: it has 0 bytes" in error_of(Tar, tmp_path / "[ac].tar")
    assert error_of(Tar, tmp_path / "d.tar") == f"{tmp_path}/d.tar: no such file"
    assert error_of(Tar, tmp_path) == f"{tmp_path} is a folder; for the shards in it set path: {tmp_path}/*.tar"
    assert "no file matches" in error_of(Tar, tmp_path / "x*.tar")


def test_fingerprint_is_of_the_content(tmp_path):
    one = shard(tmp_path / "1", samples("a", "b", "c"))
    for name, files in (
        ("0.tar", samples("a")),
        ("1.tar", {"b.jpg": b"b", "b.cls": b"1", "c.jpg": b"c", "c.cls": b"2"}),
    ):
        shard(tmp_path / "2", files, name)
    same = Tar(one).fingerprint
    assert Tar(tmp_path / "2/*.tar").fingerprint == same, "in other shards elsewhere"
    changes = {"b.jpg": b"x", "b.cls": b"3"}
    for name, content in changes.items():
        assert Tar(shard(tmp_path / "3", samples("a", "b", "c") | {name: content})).fingerprint != same
    assert Tar(shard(tmp_path / "3", samples("a", "x", "c") | {"x.jpg": b"b"})).fingerprint != same
    assert Tar(one, classes=("x", "y", "z")).fingerprint != same


def test_expect_names_each_shard_once_in_order(tmp_path, monkeypatch):
    for number in range(3):
        shard(tmp_path, samples("a", "b"), f"{number}.tar")
    source, asked = Tar(tmp_path / "*.tar"), []
    monkeypatch.setattr(type(source._store), "prefetch", lambda self, paths: asked.extend(paths))
    source.expect(np.array([5, 1, 4, 0, 2]))
    assert asked == [str(tmp_path / f"{number}.tar") for number in (2, 0, 1)]


def test_open_source(tmp_path):
    path = shard(tmp_path, samples("a", "b"))
    settings = TarSettings.model_validate({"kind": "tar", "path": str(path), "classes": ["x", "y"]})
    source = open_source(settings, classes=("x", "y"))
    assert isinstance(source, Tar) and source.classes == ("x", "y")
    with pytest.raises(DataError, match="class 0 is 'x' in this source and 'z'"):
        open_source(settings, classes=("z", "y"))
    assert len(open_source(TarSettings(path=(str(path),), image=("jpg", "png"), label="cls"))) == 2


def test_lists_of_shards(tmp_path):
    shard(tmp_path, samples("a", "b"), "0.tar"), shard(tmp_path, samples("c"), "1.tar")
    lists = {
        "sizes.json": {"1.tar": 1, "0.tar": 2},
        "index.json": {"shardlist": [{"url": "1.tar", "nsamples": 1}, {"url": str(tmp_path / "0.tar")}]},
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(json.dumps(content))
        source = Tar(tmp_path / name)
        assert keys(source) == ["c.jpg", "a.jpg", "b.jpg"] and source.warnings == ()
    (tmp_path / "sizes.json").write_text(json.dumps({"1.tar": 1, "0.tar": 3}))
    assert f"such as {tmp_path}/0.tar: 3 by the list, and 2 found" in Tar(tmp_path / "sizes.json").warnings[0]


NO_LISTS = [
    "",
    "[]",
    "{}",
    '{"a.tar": "x"}',
    '{"shardlist": 3}',
    '{"shardlist": [{}]}',
    '{"s3://b/a.tar": 1}',
    "[" * 10**5,
]


@pytest.mark.parametrize("text", NO_LISTS)
def test_lists_that_are_none(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    assert "list.json: " in error_of(Tar, tmp_path / "list.json")


def test_paths_are_of_one_place_and_not_empty(tmp_path):
    assert "all shards must be in the same kind of place" in error_of(Tar, ["a.tar", "s3://b/a.tar"])
    assert "path is an empty list" in error_of(Tar, [])
    assert "has the variable $DATA" in error_of(Tar, "$DATA/a.tar")
