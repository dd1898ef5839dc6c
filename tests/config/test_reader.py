import os
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.cli import main
from kd_pipeline.config.reader import read_config, read_values
from kd_pipeline.errors import ConfigError
from kd_pipeline.storage import Location
from tests.no_files import NO_FILES


class Folder(Settings):
    kind: Literal["folder"] = "folder"
    root: Path
    classes: tuple[str, ...] | Path | None = None


class Listing(Settings):
    kind: Literal["listing"] = "listing"
    path: Path
    columns: tuple[int, int] = (0, 1)

    @model_validator(mode="after")
    def _two_columns(self) -> "Listing":
        if self.columns[0] == self.columns[1]:
            raise ValueError("columns must differ")
        return self


class Crop(Settings):
    op: Literal["crop"] = "crop"
    size: int = Field(gt=0)
    area: tuple[float, float] = (0.08, 1.0)


class Flip(Settings):
    op: Literal["flip"] = "flip"
    probability: float = 0.5

    @field_validator("probability")
    @classmethod
    def _is_a_probability(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError("a probability lies between 0 and 1")
        return value


class Data(Settings):
    source: Annotated[Folder | Listing, Field(discriminator="kind")] | None = None
    batch_size: int = 64
    ops: tuple[Annotated[Crop | Flip, Field(discriminator="op")], ...] = ()


class Train(Settings):
    lr: float = 0.1
    epochs: int = 1
    compile: bool | Literal["auto"] = False


class Config(Settings):
    seed: int = 17
    name: str = "run"
    run_dir: Path = Path("runs")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    data: Data = Data()
    train: Train = Train()
    weights: dict[str, float] = Field(default_factory=dict)
    ema: Flip | None = None


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes `c.yaml` into an empty working directory, so that messages begin with `c.yaml:`."""
    monkeypatch.chdir(tmp_path)

    def put(text: str | bytes) -> str:
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "c.yaml"

    return put


def complaint(path: str, overrides: tuple[str, ...] = (), model: Any = Config) -> str:
    with pytest.raises(ConfigError) as info:
        read_config(model, path, overrides)
    message = str(info.value)
    assert "pydantic" not in message and "http" not in message and "Traceback" not in message
    return message


GOOD = """\
# a run
seed: 3
name: no
run_dir: runs/a
precision: bf16
data:
  batch_size: 32
  source: {kind: folder, root: images, classes: [cat, "1", 2020-01-01, on]}
  ops:
    - {op: crop, size: 32, area: [0.5, 1]}
    - {op: flip, probability: 1e-1}
train: {lr: 1e-3, compile: auto}
weights:
  a: 1
"""


def test_valid_file_becomes_the_model(write):
    config = read_config(Config, write(GOOD))
    assert config == Config(
        seed=3,
        name="no",
        run_dir=Path("runs/a"),
        precision="bf16",
        data=Data(
            batch_size=32,
            source=Folder(root=Path("images"), classes=("cat", "1", "2020-01-01", "on")),
            ops=(Crop(size=32, area=(0.5, 1.0)), Flip(probability=0.1)),
        ),
        train=Train(lr=1e-3, compile="auto"),
        weights={"a": 1.0},
    )


@pytest.mark.parametrize("spelling", [GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, "---\n" + GOOD + "...\n"])
def test_ignores_crlf_bom_and_document_marks(write, spelling):
    assert read_config(Config, write(spelling)) == read_config(Config, write(GOOD))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("+.5", 0.5), ("3", 3.0), ("-2.", -2.0), ("6.02e+23", 6.02e23),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(write, written, meant):
    assert read_config(Config, write(f"train: {{lr: {written}}}")).train.lr == meant


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "y", "2020-01-01", "010", "1:30", "0x10", "0o7", "1_000", "1e", "<<", "=", "12a"]
)
def test_yaml_1_1_special_words_stay_text(write, text):
    assert read_config(Config, write(f"name: {text}")).name == text


@pytest.mark.parametrize("text", ['"no"', '"true"', '"12"', "'~'", "|-\n  1.5"])
def test_quoted_values_are_text(write, text):
    assert read_config(Config, write(f"name: {text}")).name == text.strip("\"'").removeprefix("|-\n  ")


# Each: the file, the line, the key, and words that the message must have.
BAD = {
    "unknown key": ("seed: 1\ndata:\n  batch_sise: 3\n", 3, "data.batch_sise", "did you mean 'batch_size'?"),
    "unknown key, nothing like it": ("seed: 1\n\nzzz: 3\n", 3, "zzz", "known keys: seed, name, run_dir"),
    "unknown key in a union": (
        "data:\n  source:\n    kind: folder\n    root: x\n    clases: y\n",
        5,
        "data.source.clases",
        "mean 'classes'?",
    ),
    "unknown key in a list of unions": (
        "data:\n  ops:\n    - op: flip\n    - op: crop\n      sise: 3\n      size: 2\n",
        5,
        "data.ops.1.sise",
        "'size'?",
    ),
    "unknown key in an optional section": ("ema:\n  probabilty: 1\n", 2, "ema.probabilty", "mean 'probability'?"),
    "wrong value in an optional section": ("ema:\n\n  probability: a\n", 3, "ema.probability", "should be a number"),
    "missing key": ("data:\n  batch_size: 2\n  source:\n    kind: folder\n", 3, "data.source.root", "missing"),
    "wrong word": (
        "precision: fb16\n",
        1,
        "precision",
        "should be 'fp32', 'bf16' or 'fp16', found the text 'fb16'; did ",
    ),
    "wrong tag": ("data:\n  source:\n    path: x\n    kind: foldr\n", 4, "data.source.kind", "did you mean 'folder'?"),
    "no tag": (
        "data:\n  source:\n    root: x\n",
        2,
        "data.source",
        "has no kind; should be one of 'folder', 'listing'",
    ),
    "tag is null": ("data:\n  source: {kind: }\n", 2, "data.source.kind", "found nothing"),
    "tag is a number": (
        "data:\n  source:\n    kind: 3\n",
        3,
        "data.source.kind",
        "one of 'folder', 'listing', found 3",
    ),
    "text for a section": ("seed: 1\ndata: folder\n", 2, "data", "should be a mapping, found the text 'folder'"),
    "text for a union": ("data:\n  source: folder\n", 2, "data.source", "should be a mapping, found the text 'folder'"),
    "list for a section": ("train: [1, 2]\n", 1, "train", "should be a mapping, found a list of 2"),
    "null for a section": ("seed: 1\ntrain:\n", 2, "train", "should be a mapping, found nothing"),
    "text for a number": ("\nseed: many\n", 2, "seed", "should be a whole number, found the text 'many'"),
    "quoted number": ('seed: "12"\n', 1, "seed", "found the text '12'; write decimal digits, without quotes"),
    "octal": ("seed: 010\n", 1, "seed", "found the text '010'; write decimal digits, without quotes or leading zeros"),
    "sexagesimal": ("seed: 1:30\n", 1, "seed", "found the text '1:30'"),
    "underscores": ("seed: 1_000\n", 1, "seed", "found the text '1_000'"),
    "huge number": (f"seed: {'9' * 5000}\n", 1, "seed", "found the text '999"),
    "float for an integer": ("train:\n  epochs: 5.0\n", 2, "train.epochs", "should be a whole number, found 5.0"),
    "bool for an integer": ("seed: true\n", 1, "seed", "should be a whole number, found true"),
    "bool for text": ("name: true\n", 1, "name", "should be text, found true; put it in quotes"),
    "number for text": ("name: 12\n", 1, "name", "should be text, found 12; put it in quotes"),
    "number in a list of texts": (
        "data:\n  source:\n    kind: folder\n    root: x\n    classes:\n    - a\n    - 7\n",
        7,
        "data.source.classes.1",
        "should be text, found 7; put it in quotes",
    ),
    "number for a list or path": (
        "data:\n  source:\n    kind: folder\n    classes: 3\n    root: x\n",
        4,
        "data.source.classes",
        "should be a list or text, found 3",
    ),
    "no for a bool": (
        "train:\n  compile: no\n",
        2,
        "train.compile",
        "should be true or false or 'auto', found the text",
    ),
    "not a number": ("train: {lr: .nan}\n", 1, "train.lr", "should be a number, found the text '.nan'"),
    "infinite": ("train: {lr: 1e999}\n", 1, "train.lr", "should be a finite number, found Infinity"),
    "number for a path": ("run_dir: 3\n", 1, "run_dir", "should be text, found 3"),
    "too small": ("data:\n  ops: [{op: crop, size: 0}]\n", 2, "data.ops.0.size", "should be greater than 0, found 0"),
    "too many": (
        "data:\n  ops:\n  - {op: crop, size: 1,\n     area: [0, 1, 2]}\n",
        4,
        "data.ops.0.area",
        "at most 2 items",
    ),
    "too few": ("data:\n  ops: [{op: crop, size: 1, area: [0]}]\n", 2, "data.ops.0.area.1", "missing"),
    "a rule of one key": (
        "data:\n  ops:\n    - op: flip\n      probability: 2\n",
        4,
        "data.ops.0.probability",
        "between 0 and",
    ),
    "a rule of a section": (
        "data:\n  source: {kind: listing, path: x,\n    columns: [1, 1]}\n",
        2,
        "data.source",
        "columns must differ",
    ),
    "text in a mapping of numbers": (
        "weights:\n  a: 1\n  b: x\n",
        3,
        "weights.b",
        "should be a number, found the text 'x'",
    ),
    "duplicate key": ("seed: 1\nname: x\nseed: 2\n", 3, "seed", "duplicate key, first at c.yaml:1"),
    "duplicate key below": (
        "data:\n  batch_size: 1\n  batch_size: 1\n",
        3,
        "data.batch_size",
        "duplicate key, first at c.yaml:2",
    ),
    "key is a number": ("weights:\n  1: 2.0\n", 2, "weights.1", 'put it in quotes: "1"'),
    "key is true": ("weights:\n  true: 2.0\n", 2, "weights.true", 'put it in quotes: "true"'),
    "key is a list": ("weights:\n  ? [a, b]\n  : 1\n", 2, "weights", "a key must be text, not a list"),
    "python object": (
        "seed: 1\nname: !!python/object/apply:os.system ['touch owned']\n",
        2,
        "name",
        "tags (tag:yaml.org,2002:python/object",
    ),
    "python name": (
        "name: !!python/name:os.system\n",
        1,
        "name",
        "tags (tag:yaml.org,2002:python/name:os.system) are not",
    ),
    "own tag": ("data: !include other.yaml\n", 1, "data", "tags (!include) are not supported"),
    "alias": ("train: &t {lr: 1}\ndata: *t\n", 2, "data", "aliases (*t) are not supported"),
    "merge key": ("train: &t {lr: 1}\ndata:\n  <<: *t\n", 3, "data.<<", "aliases (*t) are not supported"),
    "billion laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        2,
        "b.0",
        "aliases (*a) are not supported",
    ),
    "deep list": ("seed: 1\nname: " + "[" * 100_000, 2, "name.0.0", "nested more than 32 levels deep"),
    "deep mapping": ("seed: 1\nname: " + "{a: " * 50_000, 2, "name.a.a", "nested more than 32 levels deep"),
    "deep block": ("seed: 1\nname:\n" + "- " * 50_000, 3, "name.0.0", "nested more than 32 levels deep"),
    "tab": ("data:\n\tbatch_size: 3\n", 2, "after data", "indent with spaces"),
    "unclosed bracket": ("seed: 1\nname: [a, b\ndata: {}\n", 3, "after name", "not YAML"),
    "unclosed quote": ('seed: 1\nname: "abc\n', 3, "after name", "not YAML"),
    "bad indent": ("data:\n   batch_size: 1\n  source: x\n", 3, "after data.batch_size", "not YAML"),
    "colon in text": ("seed: 1\nname: a: b\n", 2, "after name", "mapping values are not allowed here"),
    "at sign": ("seed: 1\nname: @x\n", 2, "after name", "not YAML"),
    "control character": ("seed: 1\nname: a\0b\n", 2, "", "'\\x00' is not allowed"),
    "half a character in a key": ('seed: 1\n"\\ud800": x\n', 2, r"'\ud800'", "not valid Unicode"),
    "tagged key": ("seed: 1\n!!str name: x\n", 2, "name", "tags (tag:yaml.org,2002:str) are not supported"),
    "key of two lines": ('seed: 1\n"a\\nb": x\n', 2, r"'a\nb'", "unknown key"),
    "bad escape": ('seed: 1\nname: "\\UFFFFFFFF"\n', 2, "after name", "not YAML"),
    "half a character": ('seed: 1\nname: "\\ud800"\n', 2, "name", "not valid Unicode"),
    "not UTF-8": (b"seed: 1\nname: caf\xe9\n", 2, "", "not UTF-8 (byte 0xe9); save the file as UTF-8"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), 1, "", "not UTF-8 (byte 0xff)"),
    "too many values": ("seed: 1\nname:\n  [" + "1," * 50_000 + "]", 3, "name.29997", "more than 30000 values"),
    "too many lines": ("seed: 1\n" + "#\n" * 100_000, 100_001, "", "more than 100000 lines"),
    "characters that reorder": ("seed: 1\n'\u202egnal\u2066': 1\n", 2, r"'\u202egnal\u2066'", "unknown key"),
    "escape of a terminal": ('seed: 1\n"\\e]0;owned\\a": 1\n', 2, r"'\x1b]0;owned\x07'", "unknown key"),
    "value with an escape": ('seed: "\\e[2J"\n', 1, "seed", r"found the text '\x1b[2J'"),
    "tag with an escape": ("seed: !%1b%0ax 1\n", 1, "seed", r"tags (!\x1b\nx) are not supported"),
    "long tag": ("seed: !" + "x" * 100_000 + " 1\n", 1, "seed", "x" * 100 + "..."),
    "many digits": ("seed: " + "9" * 5000 + "\n", 1, "seed", "should be a whole number, found the text '99"),
    "NUL": ("seed: 1\nname: a\0b\n", 2, "", r"the character '\x00' is not allowed"),
    "two documents": ("seed: 1\n---\nseed: 2\n", 2, "", "a second document starts here"),
    "empty": ("", 1, "", "should be a mapping with keys of seed, name, run_dir"),
    "only comments": ("# seed: 1\n", 1, "", "found nothing"),
    "top level null": ("~\n", 1, "", "found nothing"),
    "top level list": ("- seed: 1\n", 1, "", "train, weights, ema, found a list of 1"),
    "top level text": ("seed=1\n", 1, "", "train, weights, ema, found the text 'seed=1'"),
}


@pytest.mark.parametrize(("text", "line", "key", "words"), BAD.values(), ids=BAD)
def test_invalid_file_names_line_and_key(write, text, line, key, words):
    message = complaint(write(text))
    assert any(
        report.startswith(f"c.yaml:{line}: {key}: " if key else f"c.yaml:{line}: ") and words in report
        for report in message.splitlines()
    ), message
    assert not Path("owned").exists()


def test_problems_are_in_file_order(write):
    path = write("train:\n  lr: x\ndata:\n  ops: 3\n  batch_size: a\nsed: 1\nseed: true\n")
    places = [
        re.match(r"(c\.yaml:\d+|override 'name=3'): ([\w.]+):", line)
        for line in complaint(path, ("name=3",)).split("\n")
    ]
    assert [place and place.groups() for place in places] == [
        ("c.yaml:2", "train.lr"), ("c.yaml:4", "data.ops"), ("c.yaml:5", "data.batch_size"), ("c.yaml:6", "sed"),
        ("c.yaml:7", "seed"), ("override 'name=3'", "name"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "report"),
    [
        ("3", "found 3; put it in quotes"),
        ("", "found nothing"),
        ("[a]", "found a list of 1"),
        ("{a: b}", "found a mapping"),
    ],
)
def test_hint_to_quote_only_where_it_helps(write, value, report):
    assert complaint(write(f"name: {value}")) == f"c.yaml:1: name: should be text, {report}"


def test_only_chosen_union_member_is_reported(write):
    text = "data:\n  source: {kind: folder, root: x, classes: [a, 1]}\n"
    assert complaint(write(text)).count("\n") == 0


class Timm(Settings):
    timm: str
    num_classes: int = 10


class Torchvision(Settings):
    torchvision: str


def first_key(value: Any) -> Any:
    return next(iter(value), None) if isinstance(value, dict) else None


def as_timm(value: Any) -> str:
    return "Timm"


class Student(Settings):
    by_key: (
        Annotated[Annotated[Timm, Tag("timm")] | Annotated[Torchvision, Tag("torchvision")], Discriminator(first_key)]
        | None
    ) = None
    untagged: Timm | Torchvision | None = None
    size: (
        int
        | tuple[int, int]
        | Annotated[Annotated[Timm, Tag("Timm")] | Annotated[Torchvision, Tag("Torchvision")], Discriminator(as_timm)]
    ) = 0


@pytest.mark.parametrize(
    ("text", "reports"),
    [
        ("by_key:\n  timm: x\n  num_classes: y\n", ["c.yaml:3: by_key.num_classes: should be a whole number, found"]),
        (
            "by_key:\n  tim: x\n",
            ["c.yaml:1: by_key: Input tag 'tim' found using first_key() does not match any of the"],
        ),
        ("by_key: {}\n", ["c.yaml:1: by_key: Unable to extract tag using discriminator first_key()"]),
        ("by_key:\n  timm: x\n  bad: 3\n", ["c.yaml:3: by_key.bad: Extra inputs are not permitted"]),
        (
            "untagged:\n  num_classes: y\n  timm: x\n",
            [
                "c.yaml:1: untagged.torchvision: missing",
                "c.yaml:2: untagged.num_classes: unknown key; known keys: torchvision",
                "c.yaml:2: untagged.num_classes: should be a whole number, found the text 'y'",
                "c.yaml:3: untagged.timm: unknown key; known keys: torchvision",
            ],
        ),
        ("untagged: 3\n", ["c.yaml:1: untagged: should be a mapping, found 3"]),
        ("size: x\n", ["c.yaml:1: size: should be a whole number or a list or a mapping, found the text 'x'"]),
        ("size:\n  timm: x\n  nm: 3\n", ["c.yaml:3: size.nm: unknown key; known keys: timm, num_classes"]),
    ],
)
def test_unions_map_to_their_lines(write, text, reports):
    found = complaint(write(text), model=Student).splitlines()
    assert len(found) == len(reports) and all(a.startswith(b) for a, b in zip(found, reports, strict=True)), found


def test_refuses_files_above_one_mebibyte(write):
    path = write("seed: 1\n")
    os.truncate(path, 100 * 2**20)
    assert complaint(path) == (
        "c.yaml: cannot be read (it has 104857600 bytes, and at most 1048576 are read); is this a config file?"
    )


def test_missing_file_and_folder_are_named(write, tmp_path):
    assert complaint("none.yaml") == "none.yaml: cannot be read (No such file or directory); check the path"
    assert complaint(str(tmp_path)).startswith(f"{tmp_path}: cannot be read (this is a directory and no file)")


@pytest.mark.parametrize("kind", NO_FILES)
def test_special_file_is_refused_at_once(tmp_path, kind, capsys):
    make, reason = NO_FILES[kind]
    make(tmp_path / "c.yaml")
    assert complaint(str(tmp_path / "c.yaml")) == f"{tmp_path}/c.yaml: cannot be read ({reason}); check the path"
    for command in (["check"], ["train"], ["record"], ["eval"], ["bench", "step"]):
        assert main([*command, "-c", str(tmp_path / "c.yaml")]) == 1
        assert capsys.readouterr().err.splitlines()[1:] == [
            f"kd-pipeline: {tmp_path}/c.yaml: cannot be read ({reason}); check the path"
        ]


@pytest.mark.parametrize(
    "unit",
    ["a: 1\n", "? a\n", "'': 1\n", "- a\n", "- - a\n", "- *a\n", "- !!str a\n", "- {}\n", "<<: {a: 1}\n", "~:\n"],
)
def test_values_of_every_kind_are_counted(write, monkeypatch, unit):
    monkeypatch.setattr("kd_pipeline.config.yaml._MAX_VALUES", 100)
    assert "more than 100 values; is this a config file?" in complaint(write(unit * 1000))


def test_errors_of_every_value_are_twenty_lines(write, monkeypatch):
    monkeypatch.setattr("kd_pipeline.config.reader._MAX_ERRORS", 50)
    lines = complaint(write("".join(f"k{number}: 1\n" for number in range(100)))).splitlines()
    assert lines[0].startswith("c.yaml:1: k0: unknown key") and lines[20:] == ["and 30 more problems"]


@pytest.mark.parametrize(
    ("overrides", "get", "value"),
    [
        (["seed=5"], lambda c: c.seed, 5),
        (["seed=5", "seed=6"], lambda c: c.seed, 6),
        (["train.lr=1e-4"], lambda c: c.train.lr, 1e-4),
        (["name=a=b"], lambda c: c.name, "a=b"),
        (["name=on"], lambda c: c.name, "on"),
        (["data.source.root=elsewhere"], lambda c: c.data.source.root, Path("elsewhere")),
        (["data.source.classes=[x, y]"], lambda c: c.data.source.classes, ("x", "y")),
        (["data.source={kind: listing, path: a.csv}"], lambda c: c.data.source, Listing(path=Path("a.csv"))),
        (["data.source=null"], lambda c: c.data.source, None),
        (["name=runs/a#1"], lambda c: c.name, "runs/a#1"),
        (["name=runs/a #1"], lambda c: c.name, "runs/a #1"),
        (["name='a #1'"], lambda c: c.name, "a #1"),
        (["name= a "], lambda c: c.name, "a"),
        (["name=#1"], lambda c: c.name, "#1"),
        (["name=a: b"], lambda c: c.name, "a: b"),
        (["name=C:\\x"], lambda c: c.name, "C:\\x"),
        (["name=*a"], lambda c: c.name, "*a"),
        (["name=!!python/name:os.system"], lambda c: c.name, "!!python/name:os.system"),
        (["name=- a"], lambda c: c.name, "- a"),
        (["name=it's"], lambda c: c.name, "it's"),
        (["name='None'"], lambda c: c.name, "None"),
        (["data.source.classes=[x, y,]"], lambda c: c.data.source.classes, ("x", "y")),
        (["data.source.classes=[no, '#1']"], lambda c: c.data.source.classes, ("no", "#1")),
        (["data.source.root=~/x"], lambda c: c.data.source.root, Path.home() / "x"),
        (["data.ops.0.size=8"], lambda c: c.data.ops[0].size, 8),
        (["data.ops.1={op: crop, size: 4}"], lambda c: c.data.ops[1], Crop(size=4)),
        (["weights.b=2"], lambda c: c.weights, {"a": 1.0, "b": 2.0}),
    ],
)
def test_override_changes_one_value(write, overrides, get, value):
    path = write(GOOD)
    assert get(read_config(Config, path, overrides)) == value != get(read_config(Config, path))


def test_override_creates_missing_sections(write):
    assert read_config(Config, write("seed: 1\ntrain:\n"), ["train.epochs=3", "data.batch_size=2"]) == Config(
        seed=1, train=Train(epochs=3), data=Data(batch_size=2)
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_sise=3", "data.batch_sise: unknown key; did you mean 'batch_size'?"),
        ("dat.batch_size=3", "dat: unknown key; did you mean 'data'?"),
        ("data.batch_size=many", "data.batch_size: should be a whole number, found the text 'many'"),
        (
            "data.source.kind=foldr",
            "data.source.kind: should be one of 'folder', 'listing', found the text 'foldr'; did you",
        ),
        ("data.source={kind: folder}", "data.source.root: missing"),
        ("data.ops.1.probability=3", "data.ops.1.probability: a probability lies between 0 and 1"),
        ("data.ops.7.size=3", "data.ops: has no '7' in it, found a list of 2"),
        ("data.ops.-1.size=3", "data.ops: has no '-1' in it"),
        ("seed.deep=3", "seed: has no 'deep' in it, found 3"),
        ("seed", "should be key.path=value, such as data.batch_size=64"),
        ("=3", "should be key.path=value"),
        ("data.=3", "should be key.path=value"),
        ("", "should be key.path=value"),
        ("seed=[1", "after seed: not YAML"),
        ("name='a' # b", "name: '# b' is a comment; put the whole text in quotes"),
        ("data.source.classes=[a, b] # c", "data.source.classes: '# c' is a comment"),
        ("data.source.classes=[a, b #c]", "a # after a space starts a comment: put the text in quotes"),
        ("data.source=None", "data.source: None is a text in YAML; write null for nothing"),
        ("data.source.root=none", "the path 'none' stands for no path: write null"),
        ("data.source.classes=[*a]", "aliases (*a) are not supported"),
        ("data.source.classes=[!!str a]", "tags (tag:yaml.org,2002:str) are not supported"),
        ("name=None", "name: None is a text in YAML; write null for nothing"),
        ("name=", "name: has no value (an unset variable?); write null for none"),
        ('name=""', "name: an empty text; leave the key out, or write null"),
        ("name=~", "name: ~ alone is null in YAML"),
        ("name=\udce9", "not valid Unicode"),
        ("seed=0o17", "seed: should be a whole number, found the text '0o17'"),
        ("seed=12:30", "seed: should be a whole number, found the text '12:30'"),
        ("seed=1_000", "seed: should be a whole number, found the text '1_000'"),
        ("seed=5,", "seed: should be a whole number, found the text '5,'"),
        ("train.lr=1e400", "train.lr: should be a finite number"),
        ("data.source.root=$DATA/x", "the path '$DATA/x' has the variable $DATA, and only ~ is expanded"),
        ("data.source.classes=s3://b/x", "s3://b/x is a URL, and here only files on a local or mounted disk are read"),
        ("data={batch_size: 1, batch_size: 2}", "data.batch_size: duplicate key, first at override"),
        ("name=a\0b", "'\\x00' is not allowed"),
        ("name=" + "[" * 100, "nested more than 32 levels deep"),
    ],
)
def test_invalid_override_is_named(write, override, words):
    message = complaint(write(GOOD), (override,))
    assert message.startswith(f"override {override!r}: ") and words in message and "\n" not in message


def test_no_error_shows_the_credentials_of_a_url(write):
    url = "s3://me:abc123@host/x?token=abc123"
    for text, overrides in ((f"seed: {url}", ()), (GOOD, (f"seed={url}",)), (GOOD, (f"dat={url}",))):
        message = complaint(write(text), overrides)
        assert "s3://***@host/x?token=***" in message and "abc123" not in message


def test_override_replaces_invalid_value(write):
    path = write("data:\n  source: {kind: folder, rot: x}\n")
    assert "c.yaml:2" in complaint(path)
    assert read_config(Config, path, ["data.source={kind: folder, root: x}"]).data.source == Folder(root=Path("x"))


def test_random_damage_is_read_or_names_the_file(write):
    generator = random.Random(0)
    damage = b'/\t/{/]/"/\n/: /- /&a/*a/!/|/%/\xff/\0/? '.split(b"/")
    for _ in range(300):
        raw = bytearray(GOOD.encode())
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(raw))
            raw[at : at + generator.randint(0, 3)] = generator.choice(damage)
        try:
            read_config(Config, write(bytes(raw)))
        except ConfigError as error:
            assert all(line.startswith("c.yaml:") for line in str(error).splitlines()), bytes(raw)


@pytest.mark.parametrize("typed", ["2024", "1e3", "true"])
def test_advice_to_quote_survives_the_shell(write, typed):
    message = complaint(write(GOOD), (f"name={typed}",))
    quoted = message.rpartition("quotes that the shell keeps: ")[2]
    (override,) = shlex.split(quoted)
    assert read_config(Config, write(GOOD), [override]).name == typed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name: ""', "name: an empty text; leave the key out"),
        ("data: None", "data: should be a mapping, found the text 'None'; write null for nothing"),
        ("run_dir: None", "run_dir: the path 'None' stands for no path: write null"),
        ("run_dir: $HOME/x", "run_dir: the path '$HOME/x' has the variable $HOME"),
        ("run_dir: file:///x", "run_dir: file:/x is a URL; write the path alone: /x"),
    ],
)
def test_text_that_is_never_meant_is_refused(write, text, words):
    assert complaint(write(text)).startswith(f"c.yaml:1: {words}")


def test_home_is_expanded_in_every_kind_of_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write("run_dir: ~/runs\ndata:\n  source: {kind: folder, root: ~/x, classes: ~/names.json}\n")
    config = read_config(Config, path, ["run_dir=~/more"])
    assert config.run_dir == Path("/home/me/more") and config.data.source == Folder(
        root=Path("/home/me/x"), classes=Path("/home/me/names.json")
    )
    assert read_config(Config, write("data: {source: {kind: folder, root: x, classes: [~/a]}}")).data.source == Folder(
        root=Path("x"), classes=("~/a",)
    )


def test_path_of_the_file_is_read_like_the_paths_in_it(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("seed: 5\n")
    assert read_config(Config, "~/c.yaml").seed == 5
    assert "has the variable $HOME" in complaint("$HOME/c.yaml")


def test_values_are_read_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("{size: 8, area: [0.5, 1.0]}")
    values = {"size": 8, "area": [0.5, 1.0]}
    assert read_values(Crop, values, ["size=9"], name="here") == read_config(Crop, path, ["size=9"])
    assert values == {"size": 8, "area": [0.5, 1.0]}


def test_wrong_value_names_where_it_is_from() -> None:
    with pytest.raises(ConfigError, match=r"^here: size: should be greater than 0, found 0$"):
        read_values(Crop, {"size": 0}, name="here")
    with pytest.raises(ConfigError, match=r"^override 'sise=3': sise: unknown key; did you mean 'size'"):
        read_values(Crop, {"size": 1}, ["sise=3"], name="here")


class Shards(Settings):
    """Where data is, in one place or several."""

    path: Location | tuple[Location, ...]


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "3": "path: should be text or a list, found 3; put it in quotes",
        "{a: b}": "path: should be text or a list, found a mapping",
        "[a.tar, 4]": "path.1: should be text, found 4; put it in quotes",
        "$DATA/a.tar": "path: the path '$DATA/a.tar' has the variable $DATA",
        "[a.tar, $DATA/a.tar]": "path.1: the path '$DATA/a.tar' has the variable $DATA",
        "s3:///a.tar": "path: s3:///a.tar is a URL without a host or bucket",
    }.items(),
    ids=str,
)
def test_wrong_place_of_data_is_one_message(write: Callable[[str], str], value: str, message: str) -> None:
    found = complaint(write(f"path: {value}\n"), model=Shards)
    assert found.startswith(f"c.yaml:1: {message}") and len(found.splitlines()) == 1
