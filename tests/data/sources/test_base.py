"""Settings become sources, and validation data shares the classes of the training data."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from kd_pipeline.data.sources import Arrays, Cifar, FileList, ImageFolder, open_source, save_classes
from kd_pipeline.data.sources.base import (
    ArraysSettings,
    Cifar10Settings,
    Cifar100Settings,
    FileListSettings,
    ImageFolderSettings,
    SourceSettings,
)
from kd_pipeline.data.sources.pixels import cifar
from kd_pipeline.errors import DataError
from tests.cifar_files import CIFAR10, NUM_IMAGES, content, write
from tests.data.sources.helpers import error_of, make_files, write_list


def test_open_source_follows_settings(tmp_path, pixels):
    root = make_files(tmp_path / "root", "cat/1.jpg", "dog/1.jpg")
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


def test_validation_shares_training_classes(tmp_path):
    root = make_files(tmp_path / "val", "cat/1.jpg", "eel/1.jpg")
    source = open_source(ImageFolderSettings(root=root), classes=("ant", "cat", "dog", "eel"))
    assert source.labels.tolist() == [1, 3] and source.num_classes == 4
    path = write_list(tmp_path, "val/eel/1.jpg,eel\n")
    assert open_source(FileListSettings(path=path), classes=("ant", "cat", "dog", "eel")).labels.tolist() == [3]
    message = error_of(open_source, ImageFolderSettings(root=root), classes=("ant", "dog", "eels"))
    assert "not among the 3 classes: cat, eel;" in message


def test_different_validation_classes_are_refused(tmp_path):
    root = make_files(tmp_path, "cat/1.jpg", "dog/1.jpg")
    settings = ImageFolderSettings(root=root, classes=("cat", "dog"))
    assert open_source(settings, classes=["cat", "dog"]).labels.tolist() == [0, 1]
    assert "class 0 is 'cat' in this source and 'dog' in the training data" in error_of(
        open_source, settings, classes=("dog", "cat")
    )
    assert "class 2 is None in this source and 'eel' in the training data (2 and 3 classes)" in error_of(
        open_source, settings, classes=("cat", "dog", "eel")
    )


@pytest.fixture
def cifar_roots(tmp_path, monkeypatch) -> dict[str, Path]:
    monkeypatch.setattr(cifar, "_NUM_IMAGES", NUM_IMAGES)
    return {dataset: write(dataset, "binary", tmp_path / dataset) for dataset in ("cifar10", "cifar100")}


def test_open_source_reads_cifar(cifar_roots):
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
def test_unknown_cifar10_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(SourceSettings).validate_python({"kind": "cifar10", "root": "data", **settings})


def test_cifar_must_share_training_classes(cifar_roots):
    settings = Cifar10Settings(root=cifar_roots["cifar10"], split="test")
    assert open_source(settings, classes=CIFAR10).classes == tuple(CIFAR10)
    message = error_of(open_source, settings, classes=["airplane", "car", *CIFAR10[2:]])
    assert message.startswith("class 1 is 'automobile' in this source and 'car' in the training data (10 and 10 ")
    hundred = Cifar100Settings(root=cifar_roots["cifar100"], split="test")
    coarse = open_source(hundred.model_copy(update={"labels": "coarse"})).classes
    message = error_of(open_source, hundred, classes=coarse)
    assert message.endswith("(100 and 20 classes); take the same dataset and kind of labels for both")
