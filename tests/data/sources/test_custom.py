"""Sources of the user's own: what has to be written, what is added, and what is refused."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from kd_pipeline.data.bad_samples import BadSampleError
from kd_pipeline.data.sources import Arrays, BaseSource, ImageFolder, open_source
from kd_pipeline.data.sources.base import CustomSettings, SourceSettings
from kd_pipeline.data.sources.custom import check_source
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.loader.loader import KDDataLoader
from tests.data.sources import custom_sources
from tests.data.sources.custom_sources import Digits
from tests.data.sources.helpers import error_of, make_files, read_paths

PLUGIN = custom_sources.__name__


def settings(function: str, **kwargs) -> CustomSettings:
    return CustomSettings(factory=f"{PLUGIN}:{function}", kwargs=kwargs)


def test_listed_files_equal_image_folder(photo_folder):
    folder = ImageFolder(photo_folder)
    paths = [folder.name(index) for index in range(len(folder))]
    listed = BaseSource(paths, folder.labels.tolist(), classes=folder.classes)
    assert listed.fingerprint == folder.fingerprint and listed.stores == "files"
    assert (listed.labels == folder.labels).all() and listed.num_classes == len(folder.classes)
    assert read_paths(listed, 3, 0) == [paths[3], paths[0]] and listed.name(3) == paths[3]
    by_name = BaseSource(paths, [folder.classes[label] for label in folder.labels])
    assert by_name.classes == folder.classes and by_name.fingerprint == folder.fingerprint
    assert repr(listed) == f"BaseSource({len(folder)} files, 3 classes)"


def test_files_may_move(tmp_path):
    prints = []
    for name in ("here", "there"):
        root = make_files(tmp_path / name, "cat/1.jpg", "dog/1.jpg")
        prints.append(BaseSource([root / "cat/1.jpg", root / "dog/1.jpg"]).fingerprint)
        prints.append(BaseSource(["cat/1.jpg", "dog/1.jpg"], root=root).fingerprint)
    assert len(set(prints)) == 1
    (tmp_path / "there/cat/1.jpg").write_text("another")
    assert BaseSource(["cat/1.jpg", "dog/1.jpg"], root=tmp_path / "there").fingerprint != prints[0]


def test_pixels_equal_arrays():
    own = Digits()
    array = Arrays((own.stored * 255 / 16).round().astype(np.uint8), own.labels)
    index = np.array([5, 0, 90])
    assert (own.read(index) == array.read(index)).all() and own.read(index).shape == (3, 8, 8, 3)
    assert own.num_classes == 10 and own.stores == "pixels" and own.name(5) == "digits[5]"
    assert own.fingerprint == Digits().fingerprint != Digits(1).fingerprint
    assert own.fingerprint != Digits(classes=[f"class {number}" for number in range(10)]).fingerprint


def test_fingerprint_may_be_set():
    source = Digits()
    source.fingerprint = "version 3"
    assert check_source(source, "mine").fingerprint == "version 3"


def test_labels_of_any_kind():
    for labels in ([0, 2, 1], np.array([0, 2, 1], dtype=np.uint8), torch.tensor([0, 2, 1])):
        source = BaseSource(3, labels)
        assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 2, 1] and source.num_classes == 3
    named = BaseSource(3, ["dog", "cat", "dog"])
    assert named.labels.tolist() == [1, 0, 1] and named.classes == ("cat", "dog")
    ordered = BaseSource(3, ["dog", "cat", "dog"], classes=("dog", "cat"))
    assert ordered.labels.tolist() == [0, 1, 0]
    assert BaseSource(3).labels is None and BaseSource(3).num_classes is None


def test_wrong_lists_are_refused(tmp_path):
    cases = {
        ("there are no samples",): ([],),
        ("the path of sample 1 is relative: 'b.jpg'", "as root"): (["/a.jpg", "b.jpg"],),
        ("samples is the text '/a.jpg'",): ("/a.jpg",),
        ("a sample is no path",): ([1, 2],),
        ("labels are int64 [2]", "should be [3] integers"): (3, [0, 1]),
        ("labels are float64 [3]",): (3, [0.0, 1.0, 2.0]),
        ("the label -1 of sample 2 is not a class index",): (3, [0, 1, -1]),
    }
    for parts, arguments in cases.items():
        message = error_of(BaseSource, *arguments)
        assert all(part in message for part in parts), message
    assert "the label 2 of sample 0 is not a class index from 0 to 1" in error_of(
        BaseSource, 3, [2, 1, 0], classes=("a", "b")
    )
    assert "the label 'dgo' of sample 1 is no class; did you mean 'dog'?" in error_of(
        BaseSource, 2, ["cat", "dgo"], classes=("cat", "dog")
    )


class Shaped(BaseSource):
    def __init__(self, *images):
        super().__init__(len(images), name="shaped")
        self.images = images

    def pixels(self, index):
        return self.images[index]


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((4, 4, 3)), "float64 [4, 4, 3]"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 [3, 4, 5]"),
        (np.zeros((0, 4), np.uint8), "uint8 [0, 4]"),
        (torch.zeros(4, 4), "an object of type Tensor"),
        (None, "an object of type NoneType"),
    ],
)
def test_wrong_pixels_are_refused_at_open(image, part):
    message = error_of(check_source, Shaped(image), "mine")
    assert message.startswith("shaped[0]: pixels() returned") and part in message


def test_gray_and_color_and_one_size():
    gray, color = np.full((4, 5), 7, np.uint8), np.full((4, 5, 3), 7, np.uint8)
    rows = Shaped(gray, gray[..., None], color).read(np.arange(3))
    assert rows.shape == (3, 4, 5, 3) and (rows == 7).all()
    message = error_of(Shaped(color, color.transpose(1, 0, 2)).read, np.arange(2))
    assert message.startswith("shaped[1]: the image is 5 x 4, and others are 4 x 5")


def test_number_without_pixels_is_explained():
    with pytest.raises(NotImplementedError, match=r"define content\(self, index\)"):
        check_source(BaseSource(3), "mine")


class Foreign:
    """A source that derives from nothing."""

    stores = "pixels"
    warnings = ()
    classes = None
    num_classes = 2
    fingerprint = "1"

    def __init__(self, **changes):
        self.labels = np.array([0, 1])
        for name, value in changes.items():
            setattr(self, name, value)

    def __len__(self):
        return 2

    def read(self, indices):
        return np.zeros((len(indices), 4, 4, 3), np.uint8)

    def name(self, index):
        return str(index)


def test_any_object_with_the_protocol_is_a_source():
    source = Foreign()
    assert check_source(source, "mine") is source


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"labels": [0, 1]}, "labels are an object of type list"),
        ({"labels": np.zeros(2, np.int32)}, "labels are int32 [2]"),
        ({"labels": np.zeros(3, np.int64)}, "labels are int64 [3], and should be an int64 array [2]"),
        ({"labels": np.array([0, 2])}, "the label 2 of sample 1 is not a class index from 0 to 1"),
        ({"num_classes": None}, "num_classes is None"),
        ({"classes": ("a", "b", "c")}, "num_classes 2"),
        ({"classes": ["a", "b"]}, "give a tuple of names"),
        ({"stores": "pngs"}, "stores is 'pngs'"),
        ({"stores": "files"}, "it stores files, so return uint8 [n, L]"),
        ({"read": lambda indices: np.zeros((1, 3, 4, 4), np.uint8)}, "uint8 [1, 3, 4, 4]"),
        (
            {"stores": "files", "read": lambda indices: np.frombuffer(b"a.jpg", np.uint8)[None]},
            "the path of sample 0 is relative: 'a.jpg'",
        ),
    ],
)
def test_wrong_sources_are_refused(changes, part):
    message = error_of(check_source, Foreign(**changes), "mine")
    assert message.startswith("mine: ") and part in message


def test_what_is_missing_is_named():
    message = error_of(check_source, [1, 2], "mine")
    assert "no labels, classes" in message and "kd_pipeline.BaseSource" in message


def test_by_config():
    read = TypeAdapter(SourceSettings).validate_python
    found = open_source(
        read({"kind": "custom", "factory": f"{PLUGIN}:digits", "kwargs": {"first": 3, "count": 5}}), plugins=[PLUGIN]
    )
    assert isinstance(found, Digits) and len(found) == 5 and found.labels.tolist() == [3, 4, 5, 6, 7]
    with pytest.raises(ValidationError):
        read({"kind": "custom", "factory": "digits"})


def test_config_runs_no_code_unasked():
    with pytest.raises(ConfigError, match=f"would run code of the module {PLUGIN}; allow it with --plugin {PLUGIN}"):
        open_source(settings("digits", first=0, count=5))
    with pytest.raises(ConfigError, match="has no function called 'digit'"):
        open_source(settings("digit"), plugins=[PLUGIN])


def test_factory_that_fails_is_named():
    for function, part in {
        "failing": r"failed \(OSError: the database does not answer\)",
        "no_source": "an object of type list is no source",
        "digits": r"failed \(TypeError: .*missing 2 required",
    }.items():
        with pytest.raises(DataError, match=part):
            open_source(settings(function), plugins=[PLUGIN])


def test_validation_shares_training_classes():
    options = {"first": 40, "count": 9}
    names = open_source(settings("named_digits", **options), plugins=[PLUGIN]).classes
    assert names[0] == "zero"
    given = tuple(f"class {number}" for number in range(10))
    assert open_source(settings("named_digits", **options), classes=given, plugins=[PLUGIN]).classes == given
    for function, part in {
        "reversed_digits": "class 0 is 'nine' in this source",
        "digits": "and this source none",
    }.items():
        with pytest.raises(DataError, match=part) as info:
            open_source(settings(function, **options), classes=names, plugins=[PLUGIN])
        assert "take an argument `classes`" in str(info.value)


def test_missing_file_is_named_by_the_loader(photo_folder, tmp_path):
    there = shutil.copy(sorted(Path(photo_folder).rglob("*.jpg"))[0], tmp_path / "there.jpg")
    source = BaseSource([there, os.fspath(tmp_path / "gone.jpg")])
    loader = KDDataLoader(source, EvalTransform(size=8, resize=8), batch_size=2, device="cpu")
    with loader, pytest.raises(BadSampleError, match=r"gone\.jpg"):
        list(loader)


def test_error_of_pixels_reaches_the_loop():
    class Failing(Digits):
        def pixels(self, index):
            if index == 20:
                raise OSError("the store does not answer")
            return super().pixels(index)

    loader = KDDataLoader(Failing(), EvalTransform(size=8, resize=8), batch_size=8, device="cpu", shuffle=False)
    with loader, pytest.raises(OSError, match="the store does not answer") as info:
        list(loader)
    assert "digits[20]" in "".join(info.value.__notes__)
