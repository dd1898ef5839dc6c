import json
import logging
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from torchvision.datasets import ImageFolder as TorchvisionFolder

from kd_pipeline.data.sources import cifar
from kd_pipeline.data.sources import paths as files
from kd_pipeline.data.sources.base import (
    Arrays,
    ArraysSettings,
    Cifar,
    Cifar10Settings,
    Cifar100Settings,
    FileList,
    FileListSettings,
    ImageFolder,
    ImageFolderSettings,
    Source,
    SourceSettings,
    load_classes,
    open_source,
    save_classes,
)
from kd_pipeline.errors import DataError
from tests.cifar_files import CIFAR10, NUM_IMAGES, content, write


def grow(root: Path, *names: str) -> Path:
    """Make files that hold their own name; a name that ends in `/` makes an empty folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    return root


def names_of(source: Source, root: Path) -> list[str]:
    return [os.path.relpath(source.name(index), root) for index in range(len(source))]


def read_paths(source: Source, *indices: int) -> list[str]:
    rows = source.read(np.array(indices, dtype=np.int64))
    assert rows.dtype == np.uint8 and rows.ndim == 2 and len(rows) == len(indices)
    return [os.fsdecode(row.tobytes().rstrip(b"\0")) for row in rows]


def refusal(make, *args, **kwargs) -> str:
    with pytest.raises(DataError) as info:
        make(*args, **kwargs)
    return str(info.value)


# Image folders


TREES = {
    "plain": ["cat/1.jpg", "cat/2.png", "dog/1.jpeg"],
    "numbers": [f"{digit}/{image}.png" for digit in range(12) for image in (1, 10, 2)],
    "nested": ["cat/b/1.jpg", "cat/a/x/1.jpg", "cat/a/2.jpg", "cat/1.jpg", "dog/deep/er/1.jpg"],
    "sorted by the whole path": ["c/a b/1.jpg", "c/a/b/1.jpg", "c/a-b/1.jpg", "c/a.b/1.jpg", "c/aa/1.jpg", "c/z.jpg"],
    "same names": ["cat/1.jpg", "cat/cat/1.jpg", "dog/1.jpg", "dog/cat/1.jpg"],
    "upper and lower case": ["Cat/A.JPG", "cat/a.jpg", "Zebra/b.Png", "ant/B.PNG", "cat/_.jpg"],
    "unicode": ["猫/é.jpg", "猫/e\u0301.jpg", "ärger/ß.jpg", "zoo/😀.png", "ΑΒΓ/1.jpg"],
    "spaces": ["a cat/my photo 1.jpg", "a cat/ .jpg", " dog /x .png", "dog/1.jpg"],
    "dots": ["v1.10/a.b.jpg", "v1.2/a..png", "v1.2/a.jpg.png"],
    "one class": ["only/1.jpg"],
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_tree_is_read_as_torchvision_reads_it(tmp_path, tree):
    grow(tmp_path, *tree)
    source, theirs = ImageFolder(tmp_path), TorchvisionFolder(str(tmp_path))
    assert source.classes == tuple(theirs.classes) and source.num_classes == len(theirs.classes)
    assert [(source.name(i), source.labels[i]) for i in range(len(source))] == theirs.samples
    assert source.labels.dtype == np.int64


def test_linked_folders_and_files_are_followed_as_torchvision_does(tmp_path):
    grow(tmp_path, "shared/pets/1.jpg", "root/cat/0.jpg", "root/dog/1.jpg")
    (tmp_path / "root/cat/more").symlink_to(tmp_path / "shared")
    (tmp_path / "root/zebra").symlink_to(tmp_path / "shared")
    (tmp_path / "root/dog/2.jpg").symlink_to(tmp_path / "shared/pets/1.jpg")
    (tmp_path / "root/dog/3.jpg").symlink_to("nowhere.jpg")
    source = ImageFolder(tmp_path / "root")
    theirs = TorchvisionFolder(str(tmp_path / "root"), is_valid_file=lambda path: path.endswith(".jpg"))
    assert [(source.name(i), source.labels[i]) for i in range(len(source))] == theirs.samples
    assert source.reports == ()


def test_links_back_to_a_folder_above_end_and_are_reported(tmp_path):
    root = grow(tmp_path / "root", "cat/1.jpg", "cat/in/2.jpg", "dog/1.jpg")
    (root / "cat/in/self").symlink_to(root / "cat")
    (root / "cat/in/top").symlink_to(root)
    (root / "dog/knot").symlink_to("knot")
    source = ImageFolder(root)
    assert names_of(source, root) == ["cat/1.jpg", "cat/in/2.jpg", "dog/1.jpg"]
    (report,) = source.reports
    assert "2 links back to a folder above (cat/in/" in report and "1 without a known extension (dog/knot)" in report


def test_what_is_skipped_is_counted_shown_and_logged_once(tmp_path, caplog):
    grow(tmp_path, "cat/1.jpg", "cat/a.gif", "cat/b.gif", "cat/c.txt", "cat/d", "cat/.e.jpg", "cat/.thumbs/1.jpg")
    grow(tmp_path, ".git/1.jpg", "README.md", "loose.jpg", "dog/1.jpg", "dog/jpg")
    os.mkfifo(tmp_path / "dog/pipe.jpg")
    (tmp_path / "dog/to_the_pipe.jpg").symlink_to(tmp_path / "dog/pipe.jpg")
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        source = ImageFolder(tmp_path)
    assert names_of(source, tmp_path) == ["cat/1.jpg", "dog/1.jpg"] and source.classes == ("cat", "dog")
    (report,) = source.reports
    assert report.startswith(f"{tmp_path}: skipped ")
    for kind in (
        "3 hidden (",
        "2 outside the class folders (",
        "5 without a known extension (",
        "2 that are not regular files (dog/",
    ):
        assert kind in report
    assert " and 2 more)" in report
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("kd_pipeline", report)]


def test_a_clean_folder_has_nothing_to_report(tmp_path, caplog):
    assert ImageFolder(grow(tmp_path, "1/1.jpg", "2/1.jpg")).reports == () and not caplog.records


@pytest.mark.parametrize(
    "ending", ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "pnm", "ppm", "pgm", "pbm", "jp2", "JPG"]
)
def test_every_extension_that_dali_decodes_is_an_image(tmp_path, ending):
    assert len(ImageFolder(grow(tmp_path, f"cat/1.{ending}"))) == 1


def test_class_names_with_numbers_in_text_order_are_pointed_out_with_the_mapping(tmp_path):
    source = ImageFolder(grow(tmp_path, *(f"{digit}/1.jpg" for digit in range(1, 13))))
    assert "(0: 1, 1: 10, 2: 11, 3: 12, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7, ...)" in source.reports[0]
    assert "`classes`" in source.reports[0]
    chosen = ImageFolder(tmp_path, classes=[str(digit) for digit in range(1, 13)])
    assert chosen.reports == () and chosen.labels.tolist() == [0, 9, 10, 11, 1, 2, 3, 4, 5, 6, 7, 8]


def test_classes_that_differ_only_in_case_or_unicode_form_are_pointed_out(tmp_path):
    source = ImageFolder(grow(tmp_path, "Cat/1.jpg", "cat/1.jpg", "caf\u00e9/1.jpg", "cafe\u0301/1.jpg", "dog/1.jpg"))
    assert "'Cat' and 'cat'" in source.reports[0] and "'cafe\u0301' and 'caf\u00e9'" in source.reports[0]


def test_given_classes_fix_the_labels_and_not_the_order_of_samples(tmp_path):
    grow(tmp_path / "root", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    source = ImageFolder(tmp_path / "root", classes=("dog", "cat"))
    assert source.classes == ("dog", "cat") and source.labels.tolist() == [1, 1, 0]
    save_classes(tmp_path / "classes.json", ("dog", "cat"))
    assert ImageFolder(tmp_path / "root", classes=tmp_path / "classes.json").labels.tolist() == [1, 1, 0]


def test_a_class_without_a_folder_is_reported_and_keeps_its_label(tmp_path):
    source = ImageFolder(grow(tmp_path, "ant/1.jpg", "cat/1.jpg"), classes=("ant", "bee", "cat"))
    assert source.labels.tolist() == [0, 2] and source.num_classes == 3
    assert source.reports == (f"{tmp_path}: no folder for 1 of the 3 classes: bee",)


def test_a_folder_that_is_no_class_is_refused_with_the_nearest_class(tmp_path):
    message = refusal(ImageFolder, grow(tmp_path, "cat/1.jpg", "dgo/1.jpg"), classes=("cat", "dog"))
    assert message.startswith(f"{tmp_path}: folder(s) that are not among the 2 classes: dgo; ")
    assert message.endswith("did you mean 'dog'?")


@pytest.mark.parametrize("classes", [None, ("cat", "dog", "eel")])
def test_empty_class_folders_are_refused_by_name(tmp_path, classes):
    message = refusal(ImageFolder, grow(tmp_path, "cat/1.jpg", "dog/", "eel/1.gif"), classes=classes)
    assert message.startswith(f"{tmp_path}: empty class folder(s): dog, eel; add images or remove the folder")
    assert "eel/1.gif" in message


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([], "no class folders, 0 files"),
        (["1.jpg", "2.jpg"], "no class folders, 2 files; put the images"),
        ([".hidden/1.jpg"], "no class folders, 0 files"),
    ],
)
def test_a_folder_without_classes_is_refused(tmp_path, tree, words):
    assert f"{tmp_path}: {words}" in refusal(ImageFolder, grow(tmp_path, *tree))


def test_a_root_that_is_missing_or_a_file_is_refused_by_name(tmp_path):
    grow(tmp_path, "file")
    for labeled in (True, False):
        assert refusal(ImageFolder, tmp_path / "none", labeled=labeled).startswith(
            f"{tmp_path}/none: cannot be listed (No "
        )
        assert refusal(ImageFolder, tmp_path / "file", labeled=labeled).startswith(
            f"{tmp_path}/file: cannot be listed (Not"
        )


def test_a_folder_that_may_not_be_listed_is_refused_and_not_skipped(tmp_path, monkeypatch):
    grow(tmp_path, "cat/1.jpg", "cat/locked/2.jpg")
    scandir = os.scandir

    def refuse(path):  # root, as whom tests often run, may list everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path}/cat/locked: cannot be listed (Permission denied)" in refusal(ImageFolder, tmp_path)


def test_unlabeled_takes_every_image_below_the_root(tmp_path):
    source = ImageFolder(grow(tmp_path, "b/1.jpg", "2.jpg", "a/deep/1.jpg", "x.txt", ".h/1.jpg"), labeled=False)
    assert names_of(source, tmp_path) == ["2.jpg", "a/deep/1.jpg", "b/1.jpg"]
    assert source.labels is None and source.classes is None and source.num_classes is None
    assert "1 without a known extension (x.txt)" in source.reports[0]


def test_an_unlabeled_folder_without_images_is_refused(tmp_path):
    message = refusal(ImageFolder, grow(tmp_path, "a/x.gif"), labeled=False)
    assert message == f"{tmp_path}: no images at or below this folder; skipped 1 without a known extension (a/x.gif)"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_block_of_paths_is_what_each_is_alone(tmp_path, elsewhere):
    """Of all lengths, the longest last in the list, in any order and more than once; some of them below no root."""
    names = [f"{'long/' * (number % 5)}{'é' * (number % 3)}{number}.jpg" for number in range(40)] + ["last" * 40]
    if elsewhere:
        names[7] = "/somewhere/else.jpg"
    source = FileList(write_list(tmp_path, "".join(f"{name}\n" for name in names)))
    index = np.array([40, 0, 7, 7, *range(40), 39])
    for block in (index, index[:1], index[1:2], index[-1:], index[4:20]):
        rows = [os.fsdecode(row.tobytes().rstrip(b"\0")) for row in source.read(block)]
        assert rows == [source.name(position) for position in block.tolist()]
        assert source.read(block).shape[1] == max(len(os.fsencode(row)) for row in rows)


def test_relative_and_home_paths_become_absolute(tmp_path, monkeypatch):
    grow(tmp_path, "data/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("data", "./data/", "~/data", Path("data/../data")):
        assert ImageFolder(root).name(0) == str(tmp_path / "data/cat/1.jpg")


# What `read` returns


def test_paths_come_nul_padded_in_the_order_asked_for(tmp_path):
    root = grow(tmp_path, "cat/1.jpg", "cat/long name é.jpg", "dog/😀.png")
    source = ImageFolder(root)
    assert read_paths(source, 2, 0, 1, 0) == [source.name(i) for i in (2, 0, 1, 0)]
    assert read_paths(source) == []


def test_a_file_name_that_is_not_unicode_survives(tmp_path):
    grow(tmp_path, "cat/1.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff\xfe.jpg")).write_text("x")
    source = ImageFolder(tmp_path)
    row = source.read(np.array([1]))[0]
    assert row.tobytes() == os.fsencode(tmp_path) + b"/cat/\xff\xfe.jpg"
    assert len(source.fingerprint) == 64


def test_dali_reads_the_files_that_the_paths_name(tmp_path):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    source = ImageFolder(grow(tmp_path, "cat/1.jpg", "cat/long name é.jpg", "dog/😀.png"))

    @pipeline_def(batch_size=3, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        paths = fn.external_source(source=lambda: source.read(np.array([2, 0, 1])), batch=True)
        return fn.io.file.read(paths)

    pipeline = graph()
    pipeline.build()
    (files,) = pipeline.run()
    assert [bytes(np.array(file)).decode() for file in files] == ["dog/😀.png", "cat/1.jpg", "cat/long name é.jpg"]


def test_many_paths_need_little_more_memory_than_their_letters(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "list.csv").write_text("".join(f"class_{n % 100:03}/image_{n:08}.jpg\n" for n in range(50_000)))
    tracemalloc.start()
    try:
        source = FileList(tmp_path / "list.csv", root="/a/rather/long/root/folder/that/is/kept/only/once/and/for/all")
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(source) < len("class_000/image_00000000.jpg") + 20


# File lists


def write_list(tmp_path: Path, text: str | bytes, name: str = "list.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "samples", "labels", "classes"),
    [
        ("a.jpg,cat\nb.jpg,ant\nc.jpg,cat\n", ["a.jpg", "b.jpg", "c.jpg"], [1, 0, 1], ("ant", "cat")),
        ("path,label\na.jpg,cat\n", ["a.jpg"], [0], ("cat",)),
        ("Path, Label\r\na.jpg, cat\r\n\r\nb.jpg,cat", ["a.jpg", "b.jpg"], [0, 0], ("cat",)),
        ("\ufeffpath,label\na.jpg,3\nb.jpg,0\n", ["a.jpg", "b.jpg"], [3, 0], None),
        ('"a, ""b"".jpg",cat\n"two\nlines.jpg",cat\n', ['a, "b".jpg', "two\nlines.jpg"], [0, 0], ("cat",)),
        ('a.jpg, "x, y"\nb.jpg,cat \n', ["a.jpg", "b.jpg"], [1, 0], ("cat", "x, y")),
        ('"two\r\nlines.jpg",cat\r\n', ["two\r\nlines.jpg"], [0], ("cat",)),
        ("a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"], None, None),
        ("path\na.jpg\n", ["a.jpg"], None, None),
        ("a.jpg,cat\na.jpg,dog\n", ["a.jpg", "a.jpg"], [0, 1], ("cat", "dog")),
        ("a.jpg,01\nb.jpg,1a\n", ["a.jpg", "b.jpg"], [0, 1], ("01", "1a")),
        ("猫/é.jpg,猫\n", ["猫/é.jpg"], [0], ("猫",)),
    ],
)
def test_a_csv_list_is_read(tmp_path, text, samples, labels, classes):
    source = FileList(write_list(tmp_path, text))
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path}/{sample}" for sample in samples]
    assert (None if source.labels is None else source.labels.tolist()) == labels and source.classes == classes


@pytest.mark.parametrize(
    ("rows", "labels", "classes", "num_classes"),
    [
        ([{"path": "a", "label": "cat"}, {"path": "b", "label": "ant"}], [1, 0], ("ant", "cat"), 2),
        ([{"path": "a", "label": 3}, {"path": "b", "label": 0}], [3, 0], None, 4),
        ([{"path": "a", "label": "10"}, {"path": "b", "label": "9"}], [0, 1], ("10", "9"), 2),
        ([{"path": "a"}, {"path": "b", "label": None}], None, None, None),
    ],
)
def test_a_jsonl_list_is_read(tmp_path, rows, labels, classes, num_classes):
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in rows)
    source = FileList(write_list(tmp_path, text, "list.jsonl"))
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert (source.classes, source.num_classes) == (classes, num_classes)


def test_given_classes_fix_the_labels_of_a_list(tmp_path):
    names = write_list(tmp_path, "a.jpg,cat\nb.jpg,ant\n")
    assert FileList(names, classes=("cat", "bee", "ant")).labels.tolist() == [0, 2]
    indices = write_list(tmp_path, "a.jpg,2\nb.jpg,0\n")
    source = FileList(indices, classes=("cat", "bee", "ant"))
    assert source.labels.tolist() == [2, 0] and source.classes == ("cat", "bee", "ant") and source.num_classes == 3
    assert FileList(indices, classes=("0", "1", "2")).labels.tolist() == [2, 0]


def test_paths_of_a_list_are_relative_to_the_root_or_else_to_the_list(tmp_path, monkeypatch):
    path = write_list(tmp_path, f"a.jpg\n/abs/b.jpg\n{tmp_path}//c.jpg\n../d.jpg\n{tmp_path}/\n")
    assert read_paths(FileList(path), 0, 1, 2, 3, 4) == [
        f"{tmp_path}/a.jpg", "/abs/b.jpg", f"{tmp_path}/c.jpg", f"{tmp_path}/../d.jpg", f"{tmp_path}/",
    ]  # fmt: skip
    assert FileList(path, root="/data").name(0) == "/data/a.jpg"
    monkeypatch.chdir(tmp_path)
    assert FileList("list.csv").name(0) == f"{tmp_path}/a.jpg"


def test_names_in_a_list_are_pointed_out_where_their_order_is_odd(tmp_path):
    rows = "".join(json.dumps({"path": "a.jpg", "label": name}) + "\n" for name in ("1", "2", "10"))
    (report,) = FileList(write_list(tmp_path, rows, "list.jsonl")).reports
    assert "(0: 1, 1: 10, 2: 2)" in report


BAD_LISTS = {
    "mixed kinds": ("a,cat\nb,3\n", None, 2, "found a class index (3) where the lines above have a class name"),
    "mixed kinds, numbers first": ("a,3\n\nb,cat\n", None, 3, "found a class name ('cat') where the lines above"),
    "label missing": ("a,cat\nb\n", None, 2, "found 1 columns, expected 2"),
    "label empty": ("a,cat\nb,\n", None, 2, "the label '' is not a text of at least one character"),
    "label promised": ("path,label\na\n", None, 2, "found 1 columns, expected 2"),
    "too many columns": ("a.jpg,cat,3\n", None, 1, "found 3 columns, expected 2"),
    "path empty": ("a,cat\n,cat\n", None, 2, "the path '' is not a text"),
    "nul": ("a\0b,cat\n", None, 1, ""),
    "quote left open": ('a,cat\n"b,cat\n', None, 2, "unexpected end of data"),
    "not UTF-8": (b"a,cat\ncaf\xe9,cat\n", None, 2, "is not UTF-8; save the list as UTF-8"),
    "label not UTF-8": (b"a,cat\nb,caf\xe9\n", None, 2, "is not UTF-8"),
    "negative": ("a,0\nb,-1\n", None, 2, "the label -1 is not a class index from 0 to 2147483647"),
    "huge": (f"a,{10**25}\n", None, 1, "is not a class index from 0 to 2147483647"),
    "beyond huge": (f"a,{'9' * 5000}\n", None, 1, "limit"),
    "out of range": ("a,0\nb,2\n", ("x", "y"), 2, "the label 2 is not a class index from 0 to 1"),
    "unknown name": ("path,label\na,cat\nb,dgo\n", ("cat", "dog"), 3, "'dgo' is not among the 2 classes; did you mean"),
    "ambiguous": ("a,2\n", ("1", "10", "2"), 1, "the label 2 may be a class index or a name"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "classes", "line", "words"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_bad_csv_line_is_refused_by_number(tmp_path, text, classes, line, words):
    path = write_list(tmp_path, text)
    message = refusal(FileList, path, classes=classes)
    assert message.startswith(f"{path}:{line}: ") and words in message


BAD_JSON = {
    "not JSON": ("{path: 1}", "not JSON"),
    "no object": ('["a", "cat"]', "expected an object with the keys path and label"),
    "no path": ('{"label": 3}', "expected an object with the keys path and label"),
    "unknown key": ('{"path": "b", "lable": 3}', "expected an object with the keys path and label"),
    "path is a number": ('{"path": 3, "label": 3}', "the path 3 is not a text"),
    "label is a float": ('{"path": "b", "label": 3.0}', "the label 3.0 is neither an integer nor a text"),
    "label is a bool": ('{"path": "b", "label": true}', "the label True is neither an integer nor a text"),
    "label is a list": ('{"path": "b", "label": [1]}', "is neither an integer nor a text"),
    "no label": ('{"path": "b"}', "found no label (None) where the lines above have a class index"),
    "half a character": (r'{"path": "\ud800", "label": 3}', "is not UTF-8"),
    "nul": (r'{"path": "\u0000", "label": 3}', "is not a text"),
    "deep": ("[" * 100_000, ""),
    "long number": ('{"path": "b", "label": ' + "9" * 5000 + "}", "not JSON"),
    "big number": ('{"path": "b", "label": 9223372036854775808}', "is not a class index"),
}


@pytest.mark.parametrize(("row", "words"), BAD_JSON.values(), ids=BAD_JSON)
def test_a_bad_jsonl_line_is_refused_by_number(tmp_path, row, words):
    path = write_list(tmp_path, '{"path": "a", "label": 0}\n\n' + row + "\n", "list.jsonl")
    message = refusal(FileList, path)
    assert message.startswith(f"{path}:3: ") and words in message


@pytest.mark.parametrize("text", ["", "\n\n", "path,label\n"])
def test_an_empty_list_is_refused(tmp_path, text):
    path = write_list(tmp_path, text)
    assert refusal(FileList, path).startswith(f"{path}: lists no samples")


def test_a_list_that_is_missing_or_of_another_kind_is_refused_by_name(tmp_path):
    assert refusal(FileList, tmp_path / "none.csv").startswith(f"{tmp_path}/none.csv: cannot be read (No such file")
    path = write_list(tmp_path, "a\n", "list.txt")
    assert refusal(FileList, path).startswith(f"{path}: a list of files ends in .csv or .jsonl")


# Arrays


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(7, 4, 5, 3), dtype=np.uint8)


def test_arrays_in_memory_and_in_every_kind_of_file_are_the_same_source(tmp_path, pixels):
    labels = np.array([0, 1, 2, 0, 1, 2, 0], dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(pixels))
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "both.npz", images=pixels, labels=labels)
    np.savez_compressed(tmp_path / "alone.npz", whatever=pixels)
    np.savez(tmp_path / "more.npz", images=pixels, labels=labels[::-1], other=labels)
    sources = [
        Arrays(pixels, labels),
        Arrays(tmp_path / "images.npy", str(tmp_path / "labels.npy")),
        Arrays(tmp_path / "fortran.npy", labels.astype(np.int16)),
        Arrays(tmp_path / "both.npz"),
        Arrays(tmp_path / "both.npz", tmp_path / "both.npz"),
        Arrays(tmp_path / "alone.npz", labels),
        Arrays(tmp_path / "more.npz", labels),
    ]
    order = np.array([6, 0, 3, 3])
    for source in sources:
        assert len(source) == 7 and source.num_classes == 3 and source.classes is None
        assert source.labels.dtype == np.int64 and source.labels.tolist() == labels.tolist()
        images = source.read(order)
        assert images.flags.c_contiguous and np.array_equal(images, pixels[order])
        images[:] = 0
        assert np.array_equal(source.read(order), pixels[order])
    assert len({source.fingerprint for source in sources}) == 1


def test_gray_images_are_repeated_in_three_channels(pixels):
    gray = pixels[..., 0]
    for images in (gray, gray[..., None]):
        assert np.array_equal(Arrays(images).read(np.array([2, 1])), np.stack([gray[[2, 1]]] * 3, axis=-1))


def test_arrays_name_their_samples_by_file_and_position(tmp_path, pixels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", pixels)
    assert Arrays("images.npy").name(6) == "images.npy[6]" and Arrays(pixels).name(6) == "images[6]"


def test_arrays_without_labels_have_none(tmp_path, pixels):
    np.savez(tmp_path / "images.npz", images=pixels)
    for source in (Arrays(pixels), Arrays(tmp_path / "images.npz")):
        assert source.labels is None and source.num_classes is None
    assert Arrays(pixels, classes=("a", "b")).num_classes == 2


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (2, 4, 4, 3)), ("int8", (2, 4, 4, 3)), ("bool", (2, 4, 4)), ("uint16", (2, 4, 4)),
        ("uint8", (2, 3, 4, 4)), ("uint8", (4, 4)), ("uint8", (2, 4, 4, 4)),
        ("uint8", (0, 4, 4, 3)), ("uint8", (2, 0, 4, 3)),
    ],
)  # fmt: skip
def test_images_of_another_dtype_or_shape_are_refused_with_found_and_wanted(tmp_path, dtype, shape):
    message = refusal(Arrays, np.zeros(shape, dtype))
    assert f"found {dtype} {list(shape)}" in message and "expected uint8 images [N, H, W]" in message
    np.save(tmp_path / "images.npy", np.zeros(shape, dtype))
    assert str(tmp_path / "images.npy") in refusal(Arrays, tmp_path / "images.npy")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(6, np.int64), "labels: expected integer labels [7], one for each image, found int64 [6]"),
        (np.zeros((7, 1), np.int64), "found int64 [7, 1]"),
        (np.zeros(7), "found float64 [7]"),
        (np.zeros(7, bool), "found bool [7]"),
        (np.array([0, 0, 3, 0, 9, 0, 0]), "labels[2]: the label 3 is not a class index from 0 to 2 (2 labels are not)"),
        (np.array([0, 0, 0, 0, 0, 0, -1]), "labels[6]: the label -1 is not a class index from 0 to 2"),
        (np.full(7, 2**64 - 1, np.uint64), "labels[0]: the label 18446744073709551615 is not"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_position(pixels, labels, words):
    assert words in refusal(Arrays, pixels, labels, classes=("a", "b", "c"))


def test_files_that_are_no_plain_arrays_are_refused_and_never_unpickled(tmp_path, pixels):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    np.save(tmp_path / "pickled.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", images=np.array([Trap()], dtype=object))
    grow(tmp_path, "text.npy", "text.npz")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "whole.npy", pixels)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-10])
    np.savez(tmp_path / "whole.npz", images=pixels)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-10])
    names = ["pickled.npy", "pickled.npz", "text.npy", "text.npz", "empty.npy", "cut.npy", "cut.npz", "none.npy"]
    for name in names:
        for message in (refusal(Arrays, tmp_path / name), refusal(Arrays, pixels, tmp_path / name)):
            assert message.startswith(f"{tmp_path / name}: cannot be read as an .npy or .npz file"), message
            assert "unsafe" not in message
    assert not (tmp_path / "owned").exists()


def test_an_npz_without_the_wanted_array_is_refused_with_what_it_has(tmp_path, pixels):
    np.savez(tmp_path / "mnist.npz", x_train=pixels, y_train=np.zeros(7, int))
    assert "no array named 'images' among ['x_train', 'y_train']" in refusal(Arrays, tmp_path / "mnist.npz")
    assert "no array named 'labels' among ['x_train', 'y_train']" in refusal(Arrays, pixels, tmp_path / "mnist.npz")


# Fingerprints


def twenty_files(root: Path) -> Path:
    return grow(root, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(10)))


def test_a_copy_elsewhere_with_other_file_times_has_the_same_fingerprint(tmp_path):
    twenty_files(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there/below")
    for path in (tmp_path / "there/below").rglob("*.jpg"):
        os.utime(path, (1, 1))
    assert ImageFolder(tmp_path / "here").fingerprint == ImageFolder(tmp_path / "there/below").fingerprint
    for folder, absolute in (("here", False), ("there/below", True)):
        rows = [str(tmp_path / folder / "cat/1.jpg") if absolute else "cat/1.jpg"]
        write_list(tmp_path / folder, "\n".join(rows))
    assert FileList(tmp_path / "here/list.csv").fingerprint == FileList(tmp_path / "there/below/list.csv").fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "cat/3.jpg").write_text("CAT/3.jpg"),
        lambda root: (root / "dog/9.jpg").write_text("dog/9.jpg "),
        lambda root: (root / "cat/3.jpg").rename(root / "cat/33.jpg"),
        lambda root: (root / "dog/9.jpg").rename(root / "dog/X.jpg"),
        lambda root: (root / "cat/3.jpg").rename(root / "dog/33.jpg"),
        lambda root: (root / "cat").rename(root / "caty"),
        lambda root: (root / "cat/3.jpg").unlink(),
        lambda root: grow(root, "cat/new.jpg"),
    ],
)
def test_every_change_of_a_small_folder_changes_the_fingerprint(tmp_path, change):
    before = ImageFolder(twenty_files(tmp_path)).fingerprint
    change(tmp_path)
    assert ImageFolder(tmp_path).fingerprint != before


def test_labels_and_class_names_are_part_of_the_fingerprint(tmp_path, pixels):
    twenty_files(tmp_path)
    prints = [
        ImageFolder(tmp_path).fingerprint,
        ImageFolder(tmp_path, classes=("dog", "cat")).fingerprint,
        ImageFolder(tmp_path, classes=("cat", "dog", "eel")).fingerprint,
        ImageFolder(tmp_path, labeled=False).fingerprint,
        Arrays(pixels).fingerprint,
        Arrays(pixels, np.zeros(7, int)).fingerprint,
        Arrays(pixels, np.ones(7, int)).fingerprint,
        Arrays(pixels, np.ones(7, int), classes=("a", "b")).fingerprint,
        Arrays(pixels[::-1], np.ones(7, int)).fingerprint,
        Arrays(pixels.reshape(7, 5, 4, 3), np.ones(7, int)).fingerprint,
        Arrays(pixels[:6], np.ones(6, int)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_a_huge_dataset_is_sampled_by_content_and_covered_by_size(tmp_path):
    names = [f"cat/{number}.jpg" for number in range(4)]
    grow(tmp_path, *names)
    for name in names:  # 4 x 40 MiB without using the disk: every third file is read
        os.truncate(tmp_path / name, 40 * 2**20)
    before = ImageFolder(tmp_path).fingerprint

    def changed(name: str) -> bool:
        with (tmp_path / name).open("r+b") as file:
            file.write(b"X")
        return ImageFolder(tmp_path).fingerprint != before

    assert not changed("cat/1.jpg") and not changed("cat/2.jpg")
    os.truncate(tmp_path / "cat/1.jpg", 40 * 2**20 + 1)
    assert changed("cat/1.jpg")
    os.truncate(tmp_path / "cat/1.jpg", 40 * 2**20)
    assert not changed("cat/1.jpg") and changed("cat/3.jpg")


def test_of_very_many_files_some_sizes_are_looked_at_and_all_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_SIZES", 8)  # of 20 files, so every third
    before = ImageFolder(twenty_files(tmp_path)).fingerprint

    def changed(name: str) -> bool:
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content + " longer")
        after = ImageFolder(tmp_path).fingerprint
        (tmp_path / name).write_text(content)
        return after != before

    assert [number for number in range(10) if changed(f"cat/{number}.jpg")] == [0, 3, 6, 9]
    (tmp_path / "cat/1.jpg").rename(tmp_path / "cat/1.jpeg")
    assert ImageFolder(tmp_path).fingerprint != before


def test_a_huge_array_is_sampled_evenly():
    images = np.zeros((160, 1024, 1024), np.uint8)  # 160 MiB: every third image is read
    before = Arrays(images).fingerprint
    images[1] = 1
    assert Arrays(images).fingerprint == before
    images[159, -1, -1] = 1
    assert Arrays(images).fingerprint != before


def test_missing_and_unreadable_files_count_and_do_not_break_the_fingerprint(tmp_path):
    grow(tmp_path, "cat/1.jpg", "cat/2.jpg")
    path = write_list(tmp_path, "cat/1.jpg\ncat/2.jpg\ncat/3.jpg\ncat\npipe\n")
    os.mkfifo(tmp_path / "pipe")
    before = FileList(path).fingerprint
    assert FileList(path).fingerprint == before
    grow(tmp_path, "cat/3.jpg")
    assert FileList(path).fingerprint != before
    (tmp_path / "cat/3.jpg").unlink()
    assert FileList(path).fingerprint == before
    (tmp_path / "cat/3.jpg").touch()
    assert FileList(path).fingerprint != before


def test_a_file_that_cannot_be_opened_counts_as_missing(tmp_path, monkeypatch):
    grow(tmp_path, "cat/1.jpg", "cat/2.jpg")
    path = write_list(tmp_path, "cat/1.jpg\ncat/2.jpg\n")
    real = open

    def refuse(name, *args, **kwargs):  # root, as whom tests often run, may read everything
        if os.fsdecode(name).endswith("2.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(name, *args, **kwargs)

    source = FileList(path)
    monkeypatch.setattr("builtins.open", refuse)
    unreadable = source.fingerprint
    monkeypatch.undo()
    (tmp_path / "cat/2.jpg").unlink()
    assert FileList(path).fingerprint == unreadable


def test_nothing_is_ever_written_to_the_data(tmp_path):
    twenty_files(tmp_path)
    write_list(tmp_path, "cat/1.jpg,cat\n")

    def listing() -> list[tuple[str, int, int]]:
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*"))

    before = listing()
    for source in (ImageFolder(tmp_path), FileList(tmp_path / "list.csv")):
        source.read(np.arange(len(source)))
        assert source.fingerprint
    assert listing() == before


# Class names


def test_class_names_survive_a_file(tmp_path):
    names = ("dog", "猫", 'a "b"', "10", "\udcff")
    save_classes(tmp_path / "classes.json", names)
    assert load_classes(tmp_path / "classes.json") == names
    assert json.loads((tmp_path / "classes.json").read_text()) == list(names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], "'a' is there twice, as class 0 and class 2"),
        (["a", 3], "class 1 is 3"),
        (["a", None], "class 1 is None"),
        (["a", ""], "class 1 is ''"),
        ([], "no class names"),
    ],
)
def test_class_names_that_are_no_names_are_refused_everywhere(tmp_path, pixels, names, words):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(names))
    message = refusal(load_classes, path)
    assert message.startswith(f"{path}: ") and words in message
    assert words in refusal(save_classes, tmp_path / "other.json", names)
    assert words in refusal(Arrays, pixels, classes=names)
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "expected a JSON list"), ('"cat"', "expected a JSON list"), ("[cat]", "cannot be read as a JSON list"),
        (b"\xff", "cannot be read as a JSON list"), ("[" * 100_000, "cannot be read as a JSON list"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_names_is_refused_by_name(tmp_path, text, words):
    path = write_list(tmp_path, text, "classes.json")
    assert refusal(load_classes, path).startswith(f"{path}: {words}")
    assert "none.json: cannot be read" in refusal(load_classes, tmp_path / "none.json")


# Settings


def test_open_source_makes_what_the_settings_say(tmp_path, pixels):
    root = grow(tmp_path / "root", "cat/1.jpg", "dog/1.jpg")
    path = write_list(tmp_path, "cat/1.jpg,1\n")
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.ones(7, int))
    np.save(tmp_path / "labels.npy", np.zeros(7, int))
    save_classes(tmp_path / "classes.json", ("dog", "cat"))
    read = TypeAdapter(SourceSettings).validate_python

    folder = open_source(read({"kind": "image_folder", "root": root, "classes": tmp_path / "classes.json"}))
    assert isinstance(folder, ImageFolder) and folder.labels.tolist() == [1, 0] and folder.stores == "files"
    unlabeled = open_source(read({"kind": "image_folder", "root": root, "labeled": False}))
    assert unlabeled.labels is None and len(unlabeled) == 2
    listed = open_source(read({"kind": "file_list", "path": path, "root": root, "classes": ["dog", "cat"]}))
    assert (
        isinstance(listed, FileList) and listed.name(0) == str(root / "cat/1.jpg") and listed.classes == ("dog", "cat")
    )
    arrays = open_source(read({"kind": "arrays", "images": tmp_path / "images.npz"}))
    assert isinstance(arrays, Arrays) and arrays.labels.tolist() == [1] * 7 and arrays.stores == "pixels"
    arrays = open_source(ArraysSettings(images=tmp_path / "images.npz", labels=tmp_path / "labels.npy", classes=("a",)))
    assert arrays.labels.tolist() == [0] * 7 and arrays.classes == ("a",)


def test_validation_data_takes_the_training_mapping(tmp_path):
    root = grow(tmp_path / "val", "cat/1.jpg", "eel/1.jpg")
    source = open_source(ImageFolderSettings(root=root), classes=("ant", "cat", "dog", "eel"))
    assert source.labels.tolist() == [1, 3] and source.num_classes == 4
    path = write_list(tmp_path, "a.jpg,eel\n")
    assert open_source(FileListSettings(path=path), classes=("ant", "cat", "dog", "eel")).labels.tolist() == [3]
    message = refusal(open_source, ImageFolderSettings(root=root), classes=("ant", "dog", "eels"))
    assert "not among the 3 classes: cat, eel;" in message


def test_classes_of_validation_data_that_differ_from_the_training_mapping_are_refused(tmp_path):
    root = grow(tmp_path, "cat/1.jpg", "dog/1.jpg")
    settings = ImageFolderSettings(root=root, classes=("cat", "dog"))
    assert open_source(settings, classes=["cat", "dog"]).labels.tolist() == [0, 1]
    assert "class 0 is 'cat' in this source and 'dog' in the training data" in refusal(
        open_source, settings, classes=("dog", "cat")
    )
    assert "class 2 is None in this source and 'eel' in the training data (2 and 3 classes)" in refusal(
        open_source, settings, classes=("cat", "dog", "eel")
    )


@pytest.fixture
def cifar_roots(tmp_path, monkeypatch) -> dict[str, Path]:
    monkeypatch.setattr(cifar, "_NUM_IMAGES", NUM_IMAGES)
    return {dataset: write(dataset, "binary", tmp_path / dataset) for dataset in ("cifar10", "cifar100")}


def test_open_source_reads_cifar_as_the_settings_say(cifar_roots):
    read = TypeAdapter(SourceSettings).validate_python
    ten = open_source(read({"kind": "cifar10", "root": cifar_roots["cifar10"], "split": "train"}))
    assert isinstance(ten, Cifar) and len(ten) == 50 and ten.classes == tuple(CIFAR10)
    assert ten.labels.tolist() == content("cifar10", "train").labels["labels"].tolist()
    for extra, kind in (
        ({}, "fine_labels"),
        ({"labels": "fine"}, "fine_labels"),
        ({"labels": "coarse"}, "coarse_labels"),
    ):
        hundred = open_source(read({"kind": "cifar100", "root": cifar_roots["cifar100"], "split": "test", **extra}))
        assert hundred.labels.tolist() == content("cifar100", "test").labels[kind].tolist()
    with pytest.raises(DataError, match="cannot be downloaded"):
        root = cifar_roots["cifar10"] / "data_batch_1.bin"
        open_source(read({"kind": "cifar10", "root": root, "split": "test", "download": True}))


@pytest.mark.parametrize(
    "settings", [{}, {"split": "val"}, {"split": "test", "labels": "fine"}, {"split": "test", "classes": ["a"]}]
)
def test_settings_that_cifar_10_does_not_have_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(SourceSettings).validate_python({"kind": "cifar10", "root": "data", **settings})


def test_cifar_must_have_the_training_mapping_too(cifar_roots):
    settings = Cifar10Settings(root=cifar_roots["cifar10"], split="test")
    assert open_source(settings, classes=CIFAR10).classes == tuple(CIFAR10)
    message = refusal(open_source, settings, classes=["airplane", "car", *CIFAR10[2:]])
    assert message.startswith("class 1 is 'automobile' in this source and 'car' in the training data (10 and 10 ")
    hundred = Cifar100Settings(root=cifar_roots["cifar100"], split="test")
    coarse = open_source(hundred.model_copy(update={"labels": "coarse"})).classes
    message = refusal(open_source, hundred, classes=coarse)
    assert message.endswith("(100 and 20 classes); take the same dataset and kind of labels for both")
