"""Class names and the files that hold them."""

import json
import os
import random

import pytest

from kd_pipeline.data.sources import Arrays, FileList, ImageFolder, load_classes, save_classes
from kd_pipeline.data.sources.labels import name_warnings
from kd_pipeline.errors import DataError
from tests.data.sources.helpers import error_of, make_files, write_list


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


def test_random_damage_is_read_or_names_the_file(tmp_path):
    generator = random.Random(0)
    path = tmp_path / "classes.json"
    good = [
        b'["cat", "dog", "b\\u0061t"]',
        b'{"id2label": {"0": "cat", "1": "dog"}}',
        b'{"cat": 1, "dog": 0, "bat": 2}',
    ]
    damage = [
        b"",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"-",
        b"1e999",
        b"null",
        b"NaN",
        b"\xff",
        b"\0",
        b"[" * 2000,
    ]
    num_read = 0
    for number in range(200):
        raw = bytearray(good[number % 3])
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(raw))
            raw[at : at + generator.randint(0, 4)] = generator.choice(damage)
        path.write_bytes(raw)
        try:
            assert all(load_classes(path))
            num_read += 1
        except DataError as error:
            assert str(path) in str(error) and str(error).isprintable()
    assert 0 < num_read < 100


def test_text_with_a_name_per_line_is_understood(tmp_path):
    assert load_classes(write_list(tmp_path, "cat\r\nhot dog\n\n", "classes.txt")) == ("cat", "hot dog")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_classes(tmp_path / "classes.json", ("a", "b"))
    assert load_classes("~/classes.json") == ("a", "b")


def test_numbers_in_names_are_compared_whatever_their_length():
    long = "9" * 500
    for ordered in (["x2", "x10"], [f"x{long}", f"x1{long}"], ["x007", "x8"], ["x1", "x٢", "x3"], [f"{long}", "x"]):
        assert not name_warnings(ordered)
        assert "are in text order" in name_warnings(ordered[::-1])[0]


HOSTILE = {
    "number as label": ('{"' + "9" * 5000 + '": "a"}', "expected a JSON list of class names"),
    "number": ("[" + "9" * 5000 + "]", "cannot be read as a JSON list of class names (Exceeds the limit"),
    "long name": ('["' + "x" * 1001 + '"]', "a name of 1001 characters; write at most 1000"),
    "long name twice": (json.dumps(["x" * 1000] * 2), "is class 0 and class 1; remove one of them"),
    "NaN": ("[NaN]", "class 0 is nan"),
    "nested": ('{"id2label": ' * 50_000, "cannot be read as a JSON list of class names"),
    "long list": ("[" + "0," * 50_000 + "0]", "class 0 is 0"),
    "odd characters": (json.dumps(["\x1b]0;evil\x07", "\x1b]0;evil\x07"]), r"'\x1b]0;evil\x07' is class 0 and class 1"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_class_file_is_refused_in_few_words(tmp_path, text, words):
    path = write_list(tmp_path, text, "classes.json")
    message = error_of(load_classes, path)
    assert message.startswith(f"{path}: ") and words in message and len(message) < 600


def test_huge_class_file_is_not_read(tmp_path):
    path = write_list(tmp_path, '["a"]', "classes.json")
    os.truncate(path, 2**40)
    assert "(it has 1099511627776 bytes, and at most 4194304 are read)" in error_of(load_classes, path)


def test_names_are_written_through_no_link_and_to_no_pipe(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link.json").symlink_to(tmp_path / "victim")
    save_classes(tmp_path / "link.json", ["cat"])
    assert load_classes(tmp_path / "link.json") == ("cat",) and (tmp_path / "victim").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe.json")
    assert "pipe.json cannot be written: this is a pipe" in error_of(save_classes, tmp_path / "pipe.json", ["cat"])


def test_warnings_have_no_control_characters(tmp_path, caplog):
    make_files(
        tmp_path, "\x1b]0;evil\x07\nok/1.jpg", "\x1b]0;EVIL\x07\nok/1.jpg", "\x1b[2J/1.jpg", "b/\x1b[2J.txt", "b/1.jpg"
    )
    warnings = ImageFolder(tmp_path).warnings
    assert len(warnings) == 2 and r"\x1b" in "".join(warnings)
    assert "\x1b" not in "".join(warnings) and "\n" not in "".join(warnings) and "\x1b" not in caplog.text


def test_errors_have_no_control_characters(tmp_path):
    evil = "\x1b]0;evil\x07\n"
    root = make_files(tmp_path / "root", f"cat{evil}/", f"cat{evil}/in{evil}/{evil}.txt", "dog/1.jpg")
    messages = [
        error_of(ImageFolder, root),
        error_of(ImageFolder, root, classes=("cat", "dog")),
        error_of(
            FileList, write_list(tmp_path, json.dumps({"path": f"1{evil}.jpg"}) + '\n{"path": "2"}', "list.jsonl")
        ),
    ]
    make_files(root / f"cat{evil}", f"data{evil}.tar")
    messages.append(error_of(ImageFolder, root))
    for message in messages:
        assert r"\x1b]0;evil\x07\n" in message and not set(message) & set(evil[:1] + evil[-2:])
