"""The manifest of a recording from a stranger is read as what it should be, or refused in one line."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_pipeline.errors import KDPipelineError, TeacherError
from kd_pipeline.teachers.recorded.recording import Recording
from tests.no_files import NO_FILES, sparse
from tests.recordings import GOOD, part_of, small_recording

_BULK = 2**14


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recording of 40 images, made by hand."""
    return small_recording(tmp_path / "recording")


def of(name: str, shape: Any = (3,), **fields: Any) -> dict[str, Any]:
    """A manifest's field `outputs` with one output."""
    return {"outputs": {name: {"shape": list(shape), **fields}}}


def complaint(folder: Path) -> str:
    with pytest.raises(TeacherError) as caught:
        Recording(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/manifest.json ") and "\n" not in message and message.isprintable()
    return message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (of("logits", dtype="load"), "outputs.logits.dtype: Input should be 'float32', 'float16' or 'int8'"),
        (of("logits", dtype=3), "outputs.logits.dtype: Input should be 'float32', 'float16' or 'int8'"),
        ({"outputs": {}}, "outputs: Dictionary should have at least 1 item"),
        (of("logits", []), "outputs.logits.shape: Tuple should have at least 1 item"),
        (of("logits", [1, 2, 3, 4]), "outputs.logits.shape: Tuple should have at most 3 items"),
        (of("logits", [3, 4]), "the logits 'logits' should have one dimension or three, got [3, 4]"),
        (of("a.logits", [3, 4]), "the logits 'a.logits' should have one dimension or three, got [3, 4]"),
        (of("logits", [3, 4, 5], top_k=1), "top_k is for logits of an image, and 'logits' are of its pixels"),
        (of("logits", [-3]), "outputs.logits.shape.0: Input should be greater than or equal to 1"),
        (of("logits", [2**62]), "outputs.logits.shape.0: Input should be less than"),
        (of("map", [2**20, 2**20]), "bytes for an image"),
        (of("logits", [3.5]), "outputs.logits.shape.0: Input should be a valid integer"),
        (of("logits", ["3"]), "outputs.logits.shape.0: Input should be a valid integer"),
        (of("logits", [True]), "outputs.logits.shape.0: Input should be a valid integer"),
        ({"outputs": {"logits": [3]}}, "outputs.logits: Input should be an object"),
        (of("\x1b]0;owned\x07", [1]), r"the output name '\x1b]0;owned\x07' is"),
        (of("a" * 300, [1]), "is empty, too long or not printable"),
        (of("", [1]), "the output name '' is empty"),
        ({"outputs": [["logits", {"shape": [3]}]]}, "outputs: Input should be an object"),
        (of("logits", dtype="int8"), "the logits 'logits' are stored as float32 or float16, not as int8"),
        (of("logits", top_k=3), "top_k is 3 for 3 logits"),
        (of("logits", top_k=0), "outputs.logits.top_k: Input should be greater than or equal to 1"),
        (of("pooled", top_k=2), "top_k is for logits, and 'pooled' are none"),
        (of("spatial", [9, 4], num_prefix_tokens=9), "num_prefix_tokens is 9 for 'spatial' with the shape [9, 4]"),
        (of("spatial", [9, 4], num_prefix_tokens=-1), "outputs.spatial.num_prefix_tokens: Input should be greater"),
        (of("pooled", num_prefix_tokens=0), "num_prefix_tokens is 0 for 'pooled' with the shape [3]"),
        (of("map", [4, 3, 3], num_prefix_tokens=0), "num_prefix_tokens is 0 for 'map' with the shape [4, 3, 3]"),
        (of("pooled", teacher_grid=[2, 2]), "teacher_grid is for maps, and 'pooled' has the shape [3]"),
        (of("spatial", [9, 4], teacher_grid=[4, 4]), "teacher_grid is for maps, and 'spatial' has the shape [9, 4]"),
        (
            of("spatial", [9, 4], num_prefix_tokens=0, teacher_grid=[4]),
            "outputs.spatial.teacher_grid.1: Field required",
        ),
        ({"num_rows": 2**62}, "num_rows: Input should be less than"),
        ({"num_rows": -1}, "num_rows: Input should be greater than or equal to 1"),
        ({"num_rows": 2**39, "part_rows": 2**39, **of("map", [2**10, 2**10])}, "for an epoch, and at most"),
        ({"num_rows": 10**40}, "it has a number of 41 digits"),
        ({"num_rows": 2**39}, "part_rows is 25 for 549755813888 rows; at most 1048576 parts"),
        ({"part_rows": 0}, "part_rows: Input should be greater than or equal to 1"),
        ({"epochs": 1}, "epochs: Extra inputs are not permitted"),
        ({"stream": None}, "stream: Input should be an object"),
        ({"stream": {"a": float("nan")}}, "stream.a"),
        ({"stream": {"a": [[[[1]]]]}}, "stream.a"),
        ({"stream": {"a": {"b": {"c": {"d": 1}}}}}, "stream.a"),
        ({"stream": {"a\nseed: 1": 1}}, r"stream.a\nseed: 1.[key]: String should match pattern"),
        ({"stream": {"a": "x" * 2000}}, "stream.a"),
        ({"teacher": {**GOOD["teacher"], "classes": ["a"]}}, "there are 1 class names for 3 logits"),
        (
            {"teacher": {**GOOD["teacher"], "classes": ["a", "b", 3]}},
            "teacher.classes.2: Input should be a valid string",
        ),
        ({"teacher": {**GOOD["teacher"], "backend": "x\x1b[2J"}}, "teacher.backend: String should match pattern"),
        ({"teacher": {**GOOD["teacher"], "fingerprint": 3}}, "teacher.fingerprint: Input should be a valid string"),
        ({"teacher": "x"}, "teacher: Input should be an object"),
        ({"version": 2}, "version: Input should be 1"),
        ({"\x1b]0;owned\x07\nmore": 1}, r"\x1b]0;owned\x07\nmore: Extra inputs are not permitted"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_impossible_field_is_named(folder: Path, changes: dict[str, Any], reason: str) -> None:
    (folder / "manifest.json").write_text(json.dumps(GOOD | changes))
    assert reason in complaint(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b"9" * 100_000, "it has a number of 100000 digits"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"\0", "Expecting value"),
        (b'{"stream": "\\ud800"}', "Invalid JSON"),
        (b"[" + b"[]," * (_BULK // 3) + b"[]]", "more than 1000 values besides class names"),
        (b'{"outputs": {"logits": [' + b"[]," * (_BULK // 3) + b"[]]}}", "more than 1000 values"),
        (b'{"teacher": {"classes": [' + b"1," * (_BULK // 2) + b"1]}}", "more than 1000 values"),
        (b"{" + b",".join(b'"%d":1' % number for number in range(10_000)) + b"}", "more than 1000 values"),
    ],
    ids=range(10),
)
def test_hostile_json_is_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert reason in complaint(folder)


@pytest.mark.parametrize("kind", [*NO_FILES, "sparse"])
def test_special_file_as_manifest_is_refused(folder: Path, kind: str) -> None:
    make, reason = (NO_FILES | {"sparse": (sparse, "it has 1099511627776 bytes, and at most 8388608 are read")})[kind]
    (folder / "manifest.json").unlink()
    make(folder / "manifest.json")
    assert f"cannot be read: {reason}" in complaint(folder)


@pytest.mark.parametrize("kind", NO_FILES)
def test_special_file_as_part_is_refused(folder: Path, kind: str) -> None:
    make, reason = NO_FILES[kind]
    path = part_of(folder)
    path.unlink()
    make(path)
    with pytest.raises(TeacherError, match=rf"is damaged: {path} cannot be read: {reason}"):
        Recording(folder).samples(0, np.arange(1))


def test_random_damage_is_read_or_refused(folder: Path) -> None:
    generator = random.Random(0)
    good = json.dumps(GOOD).encode()
    damage = [b"", b"{", b"}", b"[", b"]", b'"', b",", b"-", b"1e999", b"null", b"NaN", b"\xff", b"\0", b"99999999999"]
    num_read = 0
    for _ in range(200):
        raw = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(raw))
            raw[at : at + generator.randint(0, 4)] = generator.choice(damage)
        (folder / "manifest.json").write_bytes(raw)
        try:
            Recording(folder).close()
            num_read += 1
        except KDPipelineError as error:
            assert str(error).isprintable()
    assert 0 < num_read < 100
