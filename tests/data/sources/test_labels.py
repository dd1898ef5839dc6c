"""Class names and the files that hold them."""

import json

import pytest

from kd_pipeline.data.sources import Arrays, load_classes, save_classes
from tests.data.sources.helpers import error_of, write_list


def test_class_names_round_trip(tmp_path):
    names = ("dog", "猫", 'a "b"', "10", "\udcff")
    save_classes(tmp_path / "classes.json", names)
    assert load_classes(tmp_path / "classes.json") == names
    assert json.loads((tmp_path / "classes.json").read_text()) == list(names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], "'a' is class 0 and class 2"),
        (["a", 3], "class 1 is 3"),
        (["a", None], "class 1 is None"),
        (["a", ""], "class 1 is ''"),
        ([], "no class names"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, pixels, names, words):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(names))
    message = error_of(load_classes, path)
    assert message.startswith(f"{path}: ") and words in message
    assert words in error_of(save_classes, tmp_path / "other.json", names)
    assert words in error_of(Arrays, pixels, classes=names)
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "expected a JSON list"), ('{"cat": 0, "dog": 2}', "expected a JSON list"),
        ('{"0": ["n01440764", "tench"]}', "class 0 is ['n01440764', 'tench']"), ('{"0": "a", "x": "b"}', "expected"),
        ('"cat"', "expected a JSON list"), ("[cat]", "cannot be read as a JSON list"),
        (b"\xff", "cannot be read as a JSON list"), ("[" * 100_000, "cannot be read as a JSON list"),
    ],
)  # fmt: skip
def test_bad_class_file_is_refused(tmp_path, text, words):
    path = write_list(tmp_path, text, "classes.json")
    assert error_of(load_classes, path).startswith(f"{path}: {words}")
    assert "none.json: cannot be read" in error_of(load_classes, tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        {"dog": 1, "cat": 0, "eel": 2},  # torchvision's class_to_idx
        {"2": "eel", "0": "cat", "1": "dog"},  # Hugging Face's id2label
        {"model_type": "vit", "id2label": {"0": "cat", "1": "dog", "2": "eel"}, "label2id": {}},  # and its config.json
        {"class_to_idx": {"cat": 0, "dog": 1, "eel": 2}},
    ],
)
def test_objects_with_labels_are_understood(tmp_path, content):
    path = write_list(tmp_path, json.dumps(content), "classes.json")
    assert load_classes(path) == ("cat", "dog", "eel")


def test_text_with_a_name_per_line_is_understood(tmp_path):
    assert load_classes(write_list(tmp_path, "cat\r\nhot dog\n\n", "classes.txt")) == ("cat", "hot dog")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_classes(tmp_path / "classes.json", ("a", "b"))
    assert load_classes("~/classes.json") == ("a", "b")
