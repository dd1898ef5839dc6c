"""Image folders against torchvision's `ImageFolder`, and the warnings and errors of bad ones."""

import logging
import os
import shutil
import socket
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder as TorchvisionFolder

from kd_pipeline.data.sources import ImageFolder, save_classes
from tests.data.sources.helpers import error_of, make_files, relative_names

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
def test_order_matches_torchvision(tmp_path, tree):
    make_files(tmp_path, *tree)
    source, theirs = ImageFolder(tmp_path), TorchvisionFolder(str(tmp_path))
    assert source.classes == tuple(theirs.classes) and source.num_classes == len(theirs.classes)
    assert [(source.name(i), source.labels[i]) for i in range(len(source))] == theirs.samples
    assert source.labels.dtype == np.int64


def test_links_are_followed_like_torchvision(tmp_path):
    make_files(tmp_path, "shared/pets/1.jpg", "root/cat/0.jpg", "root/dog/1.jpg")
    (tmp_path / "root/cat/more").symlink_to(tmp_path / "shared")
    (tmp_path / "root/zebra").symlink_to(tmp_path / "shared")
    (tmp_path / "root/dog/2.jpg").symlink_to(tmp_path / "shared/pets/1.jpg")
    (tmp_path / "root/dog/3.jpg").symlink_to("nowhere.jpg")
    source = ImageFolder(tmp_path / "root")
    theirs = TorchvisionFolder(str(tmp_path / "root"), is_valid_file=lambda path: path.endswith(".jpg"))
    assert [(source.name(i), source.labels[i]) for i in range(len(source))] == theirs.samples
    assert source.warnings == ()


def test_link_cycles_are_skipped_with_warning(tmp_path):
    root = make_files(tmp_path / "root", "cat/1.jpg", "cat/in/2.jpg", "dog/1.jpg")
    (root / "cat/in/self").symlink_to(root / "cat")
    (root / "cat/in/top").symlink_to(root)
    (root / "dog/knot").symlink_to("knot")
    source = ImageFolder(root)
    assert relative_names(source, root) == ["cat/1.jpg", "cat/in/2.jpg", "dog/1.jpg"]
    (warning,) = source.warnings
    assert (
        "2 links back to a parent folder (cat/in/" in warning
        and "1 without an extension that is read (dog/knot)" in warning
    )


def test_skipped_files_are_counted_and_logged_once(tmp_path, caplog):
    make_files(tmp_path, "cat/1.jpg", "cat/a.gif", "cat/b.gif", "cat/c.txt", "cat/d", "cat/.e.jpg", "cat/.thumbs/1.jpg")
    make_files(tmp_path, ".git/1.jpg", "README.md", "loose.jpg", "dog/1.jpg", "dog/jpg")
    os.mkfifo(tmp_path / "dog/pipe.jpg")
    (tmp_path / "dog/to_the_pipe.jpg").symlink_to(tmp_path / "dog/pipe.jpg")
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        source = ImageFolder(tmp_path)
    assert relative_names(source, tmp_path) == ["cat/1.jpg", "dog/1.jpg"] and source.classes == ("cat", "dog")
    (warning,) = source.warnings
    assert warning.startswith(f"{tmp_path}: skipped ")
    for counted in (
        "3 hidden",
        "2 outside the class folders",
        "5 without an extension that is read",
        "2 that are not regular",
    ):
        assert counted in warning
    assert " and 2 more)" in warning
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("kd_pipeline", warning)]


def test_clean_folder_has_no_warnings(tmp_path, caplog):
    assert ImageFolder(make_files(tmp_path, "1/1.jpg", "2/1.jpg")).warnings == () and not caplog.records


@pytest.mark.parametrize(
    "ending", ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "pnm", "ppm", "pgm", "pbm", "jp2", "JPG"]
)
def test_known_extensions(tmp_path, ending):
    assert len(ImageFolder(make_files(tmp_path, f"cat/1.{ending}"))) == 1


def test_warns_about_numbers_in_text_order(tmp_path):
    source = ImageFolder(make_files(tmp_path, *(f"{digit}/1.jpg" for digit in range(1, 13))))
    assert "(0: 1, 1: 10, 2: 11, 3: 12, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7, ...)" in source.warnings[0]
    assert "`classes`" in source.warnings[0]
    chosen = ImageFolder(tmp_path, classes=[str(digit) for digit in range(1, 13)])
    assert chosen.warnings == () and chosen.labels.tolist() == [0, 9, 10, 11, 1, 2, 3, 4, 5, 6, 7, 8]


def test_warns_about_nearly_equal_classes(tmp_path):
    names = ("Cat", "cat", "caf\u00e9", "cafe\u0301", "dog")
    source = ImageFolder(make_files(tmp_path, *(f"{name}/1.jpg" for name in names)))
    assert "'Cat' and 'cat'" in source.warnings[0] and "'cafe\u0301' and 'caf\u00e9'" in source.warnings[0]


def test_given_classes_set_labels_not_order(tmp_path):
    make_files(tmp_path / "root", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    source = ImageFolder(tmp_path / "root", classes=("dog", "cat"))
    assert source.classes == ("dog", "cat") and source.labels.tolist() == [1, 1, 0]
    save_classes(tmp_path / "classes.json", ("dog", "cat"))
    assert ImageFolder(tmp_path / "root", classes=tmp_path / "classes.json").labels.tolist() == [1, 1, 0]


def test_class_without_folder_keeps_its_label(tmp_path):
    source = ImageFolder(make_files(tmp_path, "ant/1.jpg", "cat/1.jpg"), classes=("ant", "bee", "cat"))
    assert source.labels.tolist() == [0, 2] and source.num_classes == 3
    assert source.warnings == (f"{tmp_path}: no folder for 1 of the 3 classes: bee",)


def test_unknown_folder_is_refused_with_suggestion(tmp_path):
    message = error_of(ImageFolder, make_files(tmp_path, "cat/1.jpg", "dgo/1.jpg"), classes=("cat", "dog"))
    assert message.startswith(f"{tmp_path}: folder(s) that are not among the 2 classes: dgo; ")
    assert message.endswith("did you mean 'dog'?")


@pytest.mark.parametrize("classes", [None, ("cat", "dog", "eel")])
def test_empty_class_folders_are_refused(tmp_path, classes):
    message = error_of(ImageFolder, make_files(tmp_path, "cat/1.jpg", "dog/", "eel/1.gif"), classes=classes)
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
def test_folder_without_classes_is_refused(tmp_path, tree, words):
    assert f"{tmp_path}: {words}" in error_of(ImageFolder, make_files(tmp_path, *tree))


def test_root_must_be_a_folder(tmp_path):
    make_files(tmp_path, "file")
    for labeled, (name, reason) in product((True, False), (("none", "No such"), ("file", "Not a directory"))):
        message = error_of(ImageFolder, tmp_path / name, labeled=labeled)
        assert message.startswith(f"{tmp_path / name}: cannot be listed ({reason}")


def test_unlistable_folder_is_refused_not_skipped(tmp_path, monkeypatch):
    make_files(tmp_path, "cat/1.jpg", "cat/locked/2.jpg")
    scandir = os.scandir

    def refuse(path):  # root, as whom tests often run, may list everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path}/cat/locked: cannot be listed (Permission denied)" in error_of(ImageFolder, tmp_path)


def test_unlabeled_takes_every_image(tmp_path):
    source = ImageFolder(make_files(tmp_path, "b/1.jpg", "2.jpg", "a/deep/1.jpg", "x.txt", ".h/1.jpg"), labeled=False)
    assert relative_names(source, tmp_path) == ["2.jpg", "a/deep/1.jpg", "b/1.jpg"]
    assert source.labels is None and source.classes is None and source.num_classes is None
    assert "1 without an extension that is read (x.txt)" in source.warnings[0]


def test_unlabeled_folder_without_images_is_refused(tmp_path):
    message = error_of(ImageFolder, make_files(tmp_path, "a/x.gif"), labeled=False)
    assert (
        message
        == f"{tmp_path}: no images in or below this folder; skipped 1 without an extension that is read (a/x.gif)"
    )


def test_paths_become_absolute(tmp_path, monkeypatch):
    make_files(tmp_path, "data/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("data", "./data/", "~/data", Path("data/../data")):
        assert ImageFolder(root).name(0) == str(tmp_path / "data/cat/1.jpg")


def test_folders_of_splits_are_refused(tmp_path):
    make_files(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "readme.txt")
    message = error_of(ImageFolder, tmp_path)
    assert f"the folders train, val are splits of a dataset, not classes; set root: {tmp_path}/train" in message
    assert error_of(ImageFolder, tmp_path, classes=("cat", "dog")) == message, "as for validation data"
    assert ImageFolder(tmp_path / "train").classes == ("cat", "dog")
    assert ImageFolder(tmp_path, classes=("train", "val")).labels.tolist() == [0, 0, 1]
    assert len(ImageFolder(tmp_path, labeled=False)) == 3


def test_only_training_split_is_refused(tmp_path):
    assert "set root:" in error_of(ImageFolder, make_files(tmp_path, "Train/cat/1.jpg", "Train/dog/1.jpg"))


def test_classes_called_like_splits_are_suspicious(tmp_path):
    (warning,) = ImageFolder(make_files(tmp_path, "train/1.jpg", "test/2.jpg")).warnings
    assert "the classes test, train are called like splits of a dataset" in warning
    assert ImageFolder(make_files(tmp_path, "bus/1.jpg")).warnings == (), "trains and buses are classes"


def test_root_one_folder_too_high_is_suspicious(tmp_path):
    (warning,) = ImageFolder(make_files(tmp_path, "pets/cat/1.jpg", "pets/dog/1.jpg")).warnings
    assert f"one class, 'pets', of 2 folders: cat, dog; set root: {tmp_path}/pets if these are the classes" in warning
    assert ImageFolder(tmp_path / "pets").classes == ("cat", "dog")


def test_folders_that_systems_make_are_no_classes(tmp_path):
    make_files(
        tmp_path,
        "cat/1.jpg",
        "__MACOSX/1.jpg",
        ".ipynb_checkpoints/1.jpg",
        "lost+found/",
        "dog/@eaDir/1.jpg",
        "dog/1.jpg",
    )
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat", "dog") and relative_names(source, tmp_path) == ["cat/1.jpg", "dog/1.jpg"]
    (warning,) = source.warnings
    assert "3 made by the system (" in warning and "1 hidden (.ipynb_checkpoints)" in warning


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0.tar", "0.tar is a tar archive and no folder of images: take kind: tar with path: '{root}/*.tar'"),
        (
            "0.tar.gz",
            "is a compressed tar archive and no folder of images: decompress it, as with gunzip {root}/0.tar.gz",
        ),
        ("images.zip", "is a ZIP archive and no folder of images: unpack it: unzip {root}/images.zip -d FOLDER"),
        (
            "train.parquet",
            "is a Parquet file and no folder of images: take kind: parquet with path: {root}/train.parquet",
        ),
        ("data.mdb", "is a database and no folder of images: write its images to files"),
        ("train.tfrecord", "is a database"),
        ("train.beton", "is a database"),
        ("train.h5", "is a database"),
    ],
)
def test_folder_of_archives_says_how_to_convert(tmp_path, name, words):
    make_files(tmp_path, name)
    for labeled in (True, False):
        message = error_of(ImageFolder, tmp_path, labeled=labeled)
        assert words.format(root=tmp_path) in message and "rename" not in message
    make_files(tmp_path, f"cat/{name}")
    assert words.format(root=f"{tmp_path}/cat") in error_of(ImageFolder, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.tar", "it is a tar archive: take kind: tar with path: {root}/a.tar"),
        (
            "a.tar.gz",
            "it is a compressed tar archive: decompress it, as with gunzip {root}/a.tar.gz, and take kind: tar",
        ),
        ("list.csv", "for a list of files take kind: file_list with path: {root}/list.csv"),
        ("1.jpg", "set root: {root}"),
    ],
)
def test_file_as_root_is_refused(tmp_path, name, words):
    make_files(tmp_path, name)
    assert words.format(root=tmp_path) in error_of(ImageFolder, tmp_path / name)


@pytest.mark.parametrize("root", ["file:///train", "$DATA/train"])
def test_root_is_a_path(root):
    assert "is a URL" in error_of(ImageFolder, root) or "has the variable $DATA" in error_of(ImageFolder, root)


def test_what_is_no_file_is_skipped_or_counts_as_unreadable(tmp_path, monkeypatch):
    root = make_files(tmp_path / "root", "cat/1.jpg", "cat/folder.jpg/2.jpg")
    monkeypatch.chdir(root / "cat")
    os.mkfifo("pipe.jpg")
    os.symlink("/dev/zero", "device.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    os.symlink("knot.jpg", "knot.jpg")
    os.symlink("nowhere", "broken.jpg")
    os.symlink("/proc/self/mem/x", "not in a folder.jpg")
    source = ImageFolder(root)
    names = ["1.jpg", "broken.jpg", "knot.jpg", "not in a folder.jpg", "folder.jpg/2.jpg"]
    assert relative_names(source, root) == [f"cat/{name}" for name in names]
    (warning,) = source.warnings
    assert "3 that are not regular files (cat/" in warning
    assert len(source.fingerprint) == 64


def test_links_that_multiply_paths_are_refused(tmp_path):
    """Forty folders, each with two links to the next: as many paths as no disk can hold."""
    root = make_files(tmp_path / "root", "cat/0/1.jpg")
    for number in range(1, 30):
        (root / f"cat/{number}").mkdir()
        for name in ("a", "b"):
            (root / f"cat/{number}" / name).symlink_to(f"../{number - 1}")
    message = error_of(ImageFolder, root)
    assert "links lead to the same folders in more than 1000 ways, such as" in message
    for number in range(5, 30):
        shutil.rmtree(root / f"cat/{number}")
    assert len(ImageFolder(root)) == 1 + 2 + 4 + 8 + 16
