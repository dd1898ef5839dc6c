"""An engine is read only if its manifest proves that this user built it and that it is unchanged since."""

import hashlib
import itertools
import json
import os
import random
import re
import shlex
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from pydantic import ValidationError

from kd_pipeline._core.files import NotAFileError
from kd_pipeline.errors import ConfigError, EngineError
from kd_pipeline.teachers.tensorrt.manifest import (
    EngineManifest,
    OutputParity,
    Parity,
    Profile,
    Recipe,
    TensorIO,
    changed_fields,
    manifest_path,
    read_engine,
    read_manifest,
    write_manifest,
)
from tests._core.test_files import give_away
from tests.teachers.tensorrt.special_files import SPECIAL_FILES

CONTENT = b"an engine"
MANIFEST = EngineManifest(
    onnx_sha256="a" * 64,
    input_adapter={"mean": [0.5, 0.5, 0.5]},
    extra_outputs=("block",),
    classes=("cat", "dog"),
    precision="fp16",
    half_io=False,
    calibration_sha256=None,
    converter=1,
    image_shape=(3, 8, 8),
    profiles=(Profile(min=1, opt=4, max=8),),
    runtime="tensorrt_rtx",
    runtime_version="1.7.1.116",
    gpu="any",
    compute_capability=("8.9", "12.0"),
    workspace=None,
    builder_optimization_level=3,
    version_compatible=False,
    hardware_compatible=False,
    plugins=(),
    engine_sha256=hashlib.sha256(CONTENT).hexdigest(),
    engine_bytes=len(CONTENT),
    image=TensorIO(name="images", shape=(None, 3, 8, 8), dtype="float32"),
    outputs={"logits": TensorIO(name="logits", shape=(None, 2), dtype="float32")},
    kept_float32=("node",),
    parity=Parity(
        measured_on="onnx",
        images="generated",
        num_images=64,
        batch_sizes=(1, 4, 8),
        outputs={"logits": OutputParity(cosine=0.99999, norm_ratio=1.001, top1_agreement=1.0, kl=1e-7)},
        tensors_sha256="b" * 64,
    ),
    onnx="/models/teacher.onnx",
    arguments=("--onnx", "/models/teacher.onnx"),
    build_s=1.5,
)
OTHER = {
    "input_adapter": None,
    "calibration_sha256": "c" * 64,
    "precision": "bf16",
    "runtime": "tensorrt",
    "profiles": [{"min": 1, "opt": 4, "max": 16}],
    "image": {"name": "images", "shape": [None, 3, 16, 16], "dtype": "float32"},
    "outputs": {"logits": {"name": "logits", "shape": [None, 3], "dtype": "float32"}},
    "workspace": 64,
    "image_shape": [3, 16, 16],
    "manifest_version": 2,
}
"""Different values for fields for which `changed` cannot make one."""


def changed(name: str, value: object) -> object:
    """A different value that the field `name` could have."""
    match value:
        case _ if name in OTHER:
            return OTHER[name]
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "0"
        case list():
            return [*value, "9.0"]
        case dict():
            return {**value, next(iter(value)): changed("", value[next(iter(value))])}
    raise AssertionError(f"no other value for {name}: {value!r}")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.engine"
    path.write_bytes(CONTENT)
    write_manifest(path, MANIFEST)
    return path


def test_manifest_round_trip(engine: Path) -> None:
    found = read_engine(engine)
    assert (found.path, found.content) == (engine, CONTENT)
    assert found.manifest is not None
    assert found.manifest.model_copy(update={"seal": {}}) == MANIFEST


@pytest.mark.parametrize("name", [name for name in EngineManifest.model_fields if name != "seal"])
def test_changed_field_is_named(engine: Path, name: str) -> None:
    path = manifest_path(engine)
    content = json.loads(path.read_bytes())
    content[name] = changed(name, content[name])
    path.write_text(json.dumps(content))
    with pytest.raises(EngineError, match=rf"teacher.engine.json: {name}\b"):
        read_engine(engine)


def test_changed_seal_is_refused(engine: Path) -> None:
    path = manifest_path(engine)
    content = json.loads(path.read_bytes())
    for seal in ({}, content["seal"] | {"more": "0"}, content["seal"] | {"precision": "0" * 16}):
        path.write_text(json.dumps(content | {"seal": seal}))
        with pytest.raises(EngineError, match="seal"):
            read_engine(engine)


@pytest.mark.parametrize("name", list(EngineManifest.model_fields))
def test_missing_field_is_named(engine: Path, name: str) -> None:
    path = manifest_path(engine)
    content = json.loads(path.read_bytes())
    del content[name]
    path.write_text(json.dumps(content))
    if name == "manifest_version":  # defaults to this version
        assert read_engine(engine).manifest is not None
        return
    with pytest.raises(EngineError, match=name):
        read_engine(engine)


@pytest.mark.parametrize("name", list(Recipe.model_fields))
def test_every_recipe_field_changes_key(name: str) -> None:
    recipe = Recipe(**{field: getattr(MANIFEST, field) for field in Recipe.model_fields})
    fields = recipe.model_dump(mode="json")
    other = Recipe.model_validate(fields | {name: changed(name, fields[name])})
    assert other.key != recipe.key
    assert Recipe.model_validate(fields).key == recipe.key
    (line,) = changed_fields(MANIFEST, other.model_dump(mode="json"))
    assert line.startswith(f"{name}: found {json.dumps(fields[name])}, wanted ")
    assert line.endswith(json.dumps(other.model_dump(mode="json")[name]))


@pytest.mark.parametrize("position", range(len(CONTENT)))
def test_flipped_bit_is_refused(engine: Path, position: int) -> None:
    content = bytearray(CONTENT)
    content[position] ^= 1
    engine.write_bytes(content)
    with pytest.raises(EngineError, match="engine_sha256: found") as error:
        read_engine(engine)
    assert hashlib.sha256(content).hexdigest() in str(error.value) and MANIFEST.engine_sha256 in str(error.value)
    assert "build it again: kd-pipeline build-engine --onnx /models/teacher.onnx" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "the whole file"),
        (b"null", "the whole file"),
        (b'{"precision": "fp64"}', "teacher.engine.json"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_invalid_manifest_is_error_with_path(engine: Path, content: bytes, message: str) -> None:
    manifest_path(engine).write_bytes(content)
    with pytest.raises(EngineError, match=message) as error:
        read_engine(engine)
    assert str(manifest_path(engine)) in str(error.value)


def test_unknown_field_is_refused(engine: Path) -> None:
    path = manifest_path(engine)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"host_code": True}))
    with pytest.raises(EngineError, match="host_code"):
        read_engine(engine)


def test_missing_files_say_what_to_do(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"other.engine cannot be read: No such file.*build-engine"):
        read_engine(engine.with_name("other.engine"))
    manifest_path(engine).unlink()
    with pytest.raises(EngineError, match=r"has no manifest teacher.engine.json beside it.*--trust-engine DIGEST"):
        read_engine(engine)


# What others could write


def part(engine: Path, name: str) -> Path:
    """One of the things that decide what runs."""
    return {
        "engine": engine,
        "manifest": manifest_path(engine),
        "folder": engine.parent,
        "folder above": engine.parent.parent,
    }[name]


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """An engine in a folder of a folder."""
    path = tmp_path / "above" / "below" / "teacher.engine"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    write_manifest(path, MANIFEST)
    return path


@pytest.mark.parametrize("name", ["engine", "manifest", "folder", "folder above"])
@pytest.mark.parametrize(("bits", "who"), [(0o020, "group"), (0o002, "others"), (0o022, "group and others")])
def test_what_others_can_write_is_refused(nested: Path, name: str, bits: int, who: str) -> None:
    path = part(nested, name)
    path.chmod(path.stat().st_mode | bits)
    with pytest.raises(
        EngineError, match=f"is not trusted: {who} may write to {path}; .*--trust-engine DIGEST"
    ) as error:
        read_engine(nested)
    (advice,) = re.findall("if nobody did, (chmod [^;]*);", str(error.value))
    assert read_engine(nested, trust_engines=[MANIFEST.engine_sha256]).content == CONTENT
    assert os.system(advice) == 0
    assert read_engine(nested).content == CONTENT


@pytest.mark.parametrize("name", ["engine", "manifest", "folder", "folder above"])
def test_what_belongs_to_others_is_refused(nested: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(part(nested, name), monkeypatch)
    with pytest.raises(EngineError, match=r"is not trusted: .* belongs to user .*--trust-engine DIGEST"):
        read_engine(nested)


def test_manifest_of_others_offers_no_command(engine: Path) -> None:
    write_manifest(engine, MANIFEST.model_copy(update={"engine_sha256": "0" * 64}))
    with pytest.raises(EngineError, match="build it again: kd-pipeline build-engine --onnx"):
        read_engine(engine)
    manifest_path(engine).chmod(0o664)
    with pytest.raises(EngineError) as error:
        read_engine(engine)
    assert "--onnx" not in str(error.value)


def test_sticky_folder_is_trusted(engine: Path) -> None:
    engine.parent.chmod(0o1777)
    assert read_engine(engine).content == CONTENT


@pytest.mark.parametrize("name", ["engine", "manifest"])
def test_link_is_refused(engine: Path, name: str) -> None:
    path, target = part(engine, name), engine.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    with pytest.raises(EngineError, match=f"{path} cannot be read: this is a link; give the file itself, {target}"):
        read_engine(engine)


def test_link_in_folder_of_others_is_refused(engine: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "mine").symlink_to(engine.parent)
    assert read_engine(shared / "mine" / engine.name).content == CONTENT
    shared.chmod(0o775)
    with pytest.raises(EngineError, match=f"group may write to {shared};"):
        read_engine(shared / "mine" / engine.name)


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["folder", "file"])
def test_what_moves_while_it_is_read_is_never_theirs(engine: Path, tmp_path: Path, moves: str) -> None:
    """Another user, whose files stand for those of all, swaps them with mine: by a link, or one by one."""
    mine, theirs, here = tmp_path / "mine", tmp_path / "theirs", tmp_path / "here"
    evil = b"their code"
    digest = hashlib.sha256(evil).hexdigest()
    mine.mkdir()
    theirs.mkdir()
    for folder, content, sha256 in ((mine, CONTENT, MANIFEST.engine_sha256), (theirs, evil, digest)):
        (folder / engine.name).write_bytes(content)
        changes = {"engine_sha256": sha256, "engine_bytes": len(content), "classes": ("a class",) * 30_000}
        write_manifest(folder / engine.name, MANIFEST.model_copy(update=changes))
    for path in theirs.iterdir():
        path.chmod(0o666)
    if moves == "folder":
        theirs.chmod(0o777)
    else:
        here.mkdir()
    is_over = threading.Event()

    def move() -> None:
        for number in itertools.count():
            if is_over.is_set():
                return
            source, new = (mine, theirs)[number % 2], tmp_path / "new"
            if moves == "folder":
                new.symlink_to(source)
                new.replace(here)
            else:
                for path in source.iterdir():
                    os.link(path, new)
                    new.replace(here / path.name)
            time.sleep(random.uniform(0, 0.02))

    mover = threading.Thread(target=move)
    mover.start()
    try:
        deadline, accepted, refused = time.monotonic() + 2, 0, 0
        while time.monotonic() < deadline:
            try:
                assert read_engine(here / engine.name).content == CONTENT
                accepted += 1
            except EngineError:
                refused += 1
    finally:
        is_over.set()
        mover.join()
    assert accepted and refused


# What is no engine and no manifest


@pytest.mark.parametrize("digests", [(), (MANIFEST.engine_sha256,)], ids=["own", "typed"])
@pytest.mark.parametrize("kind", list(SPECIAL_FILES))
def test_special_file_is_no_engine(
    engine: Path, kind: str, digests: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(engine.parent)  # the name of a socket has at most 108 bytes
    engine.unlink()
    SPECIAL_FILES[kind](Path(engine.name))
    with pytest.raises(EngineError, match=r"teacher.engine cannot be read: (this is|it has)") as error:
        read_engine(engine, trust_engines=digests)
    assert "--trust-engine" not in str(error.value)  # would not help


@pytest.mark.parametrize("kind", list(SPECIAL_FILES))
def test_special_file_is_no_manifest(
    engine: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(engine.parent)
    manifest_path(engine).unlink()
    SPECIAL_FILES[kind](Path(manifest_path(engine).name))
    message = r"teacher.engine.json cannot be read: (this is|it has) .*; delete it, and build the engine again"
    with pytest.raises(EngineError, match=message):
        read_engine(engine)
    assert read_engine(engine, trust_engines=[MANIFEST.engine_sha256]).manifest is None
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_adapter", '{"a": %s}' % ("[" * 300 + "]" * 300)),
        ("input_adapter", '{"a": %s}' % ("[" * 900 + "]" * 900)),
        ("input_adapter", '{"a": NaN}'),
        ("classes", "[" * 900 + "]" * 900),
        ("engine_bytes", "9" * 4000),
        ("engine_bytes", "9" * 5000),
        ("engine_bytes", "1e999"),
        ("build_s", "9" * 4000),
        ("build_s", "NaN"),
        ("runtime_version", '"\\ud800"'),
        ("outputs", "[]"),
        ("parity", "7"),
        ("seal", '{"a": {}}'),
        ("kept_float32", "[{}" + ",{}" * 30_000 + "]"),
        ("kept_float32", "[{}" + ",{}" * 1_000_000 + "]"),
    ],
    ids=range(15),
)
def test_hostile_manifest_is_one_short_error(engine: Path, field: str, value: str) -> None:
    path = manifest_path(engine)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {field: "HERE"}).replace('"HERE"', value))
    with pytest.raises(EngineError, match=r"teacher.engine.json") as error:
        read_engine(engine)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("shape", "number"), [((None, 8), 1), ((None, 8, 4), 8), ((None, 8, 4), -1), ((None, 3, 2, 2), 0)]
)
def test_prefix_tokens_that_an_output_cannot_have(shape: tuple[int | None, ...], number: int) -> None:
    assert TensorIO(name="a", shape=(None, 8, 4), dtype="float32", num_prefix_tokens=7).num_prefix_tokens == 7
    with pytest.raises(ValueError, match=r"prefix tokens|greater than or equal to 0"):
        TensorIO(name="a", shape=shape, dtype="float32", num_prefix_tokens=number)


def test_manifest_that_could_not_be_read_is_not_written(engine: Path) -> None:
    with pytest.raises(EngineError, match="too large, mostly for class names"):
        write_manifest(engine, MANIFEST.model_copy(update={"classes": ("a",) * 100_001}))
    assert read_engine(engine).content == CONTENT


def test_error_has_no_control_characters(engine: Path) -> None:
    path = manifest_path(engine)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"\x1b]0;evil\x07\n": "\x1b[2J"}))
    with pytest.raises(EngineError, match="Extra inputs are not permitted") as error:
        read_engine(engine)
    assert str(error.value).isprintable()


def test_command_is_quoted_and_always_build_engine() -> None:
    words = ("--onnx", "it's; touch marker", "$(touch marker)", "\x1b[2J\n`touch marker`")
    command = MANIFEST.model_copy(update={"arguments": words}).command
    assert command.isprintable()
    assert shlex.split(command)[:5] == ["kd-pipeline", "build-engine", *words[:3]]


# What the user trusts by its digest


def test_typed_digest_trusts_engine_of_others(
    engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine.write_bytes(b"a different engine")
    engine.chmod(0o666)
    engine.parent.chmod(0o777)
    give_away(engine, monkeypatch)
    digest = hashlib.sha256(b"a different engine").hexdigest()
    found = read_engine(engine, trust_engines=["0" * 64, digest.upper()])
    assert (found.content, found.manifest) == (b"a different engine", None)
    (record,) = caplog.records
    assert "is opened without a manifest, and its outputs were never compared" in record.getMessage()
    assert f"{manifest_path(engine)} is not trusted" in record.getMessage()
    manifest_path(engine).unlink()
    assert read_engine(engine, trust_engines=[digest]).manifest is None


def test_typed_digest_takes_manifest_that_is_trusted_and_names_it(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = [MANIFEST.engine_sha256]
    engine.chmod(0o666)
    assert read_engine(engine, trust_engines=digests).manifest is not None and not caplog.records
    manifest_path(engine).chmod(0o664)
    assert read_engine(engine, trust_engines=digests).manifest is None
    assert f"group may write to {manifest_path(engine)}" in caplog.text
    manifest_path(engine).chmod(0o644)
    write_manifest(engine, MANIFEST.model_copy(update={"engine_sha256": "0" * 64}))
    assert read_engine(engine, trust_engines=digests).manifest is None
    assert "is that of a different engine" in caplog.text


def test_other_digest_changes_nothing(engine: Path) -> None:
    assert read_engine(engine, trust_engines=["0" * 64]).content == CONTENT
    engine.chmod(0o664)
    message = f"group may write to .*its sha256 is {MANIFEST.engine_sha256}, which is none of those that you trust$"
    with pytest.raises(EngineError, match=message):
        read_engine(engine, trust_engines=["0" * 64])


@pytest.mark.parametrize("digests", [MANIFEST.engine_sha256, ["sha256"], [MANIFEST.engine_sha256 + "\n"]])
def test_wrong_digest_is_config_error(engine: Path, digests: object) -> None:
    with pytest.raises(ConfigError, match="trust_engines is a list of sha256 digests"):
        read_engine(engine, trust_engines=digests)


def test_engine_is_hashed_before_it_is_kept(engine: Path) -> None:
    with engine.open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(EngineError, match="engine_bytes: found 104857600, wanted 9"):
            read_engine(engine, trust_engines=["0" * 64])
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


# Writing


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_manifest_is_trusted_whatever_the_umask(engine: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_manifest(engine, MANIFEST)
    finally:
        os.umask(before)
    assert read_engine(engine).content == CONTENT


def test_manifest_is_replaced(engine: Path) -> None:
    write_manifest(engine, MANIFEST.model_copy(update={"build_s": 2.5}))
    assert read_manifest(engine).build_s == 2.5
    assert sorted(path.name for path in engine.parent.iterdir()) == ["teacher.engine", "teacher.engine.json"]


def test_failed_write_leaves_nothing(engine: Path) -> None:
    manifest_path(engine).unlink()
    manifest_path(engine).mkdir()
    with pytest.raises(NotAFileError, match="this is a directory"):
        write_manifest(engine, MANIFEST)
    assert sorted(path.name for path in engine.parent.iterdir()) == ["teacher.engine", "teacher.engine.json"]


@pytest.mark.parametrize(("low", "best", "high"), [(4, 2, 8), (1, 9, 8), (0, 1, 1)])
def test_profile_must_ascend(low: int, best: int, high: int) -> None:
    with pytest.raises(ValidationError):
        Profile(min=low, opt=best, max=high)
