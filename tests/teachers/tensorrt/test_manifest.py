"""An engine is read only if its manifest proves that this user built it and that it is unchanged since."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.manifest import (
    EngineManifest,
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
        cosine=0.99999,
        top1_agreement=1.0,
        kl=1e-7,
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
    with pytest.raises(EngineError, match="cannot be read: Is a directory"):
        read_engine(engine.parent)
    manifest_path(engine).unlink()
    with pytest.raises(EngineError, match=r"has no manifest teacher.engine.json beside it.*trust_engine"):
        read_engine(engine)


@pytest.mark.parametrize("which", ["engine", "manifest", "folder"])
def test_world_writable_is_refused(engine: Path, which: str) -> None:
    path = {"engine": engine, "manifest": manifest_path(engine), "folder": engine.parent}[which]
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(EngineError, match=f"{path} is writable by every user of this machine; chmod o-w"):
        read_engine(engine)


def test_sticky_folder_is_trusted(engine: Path) -> None:
    engine.parent.chmod(0o1777)
    assert read_engine(engine).content == CONTENT


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["engine", "manifest", "folder"])
def test_foreign_owner_is_refused(engine: Path, which: str) -> None:
    path = {"engine": engine, "manifest": manifest_path(engine), "folder": engine.parent}[which]
    os.chown(path, 12345, -1)
    with pytest.raises(EngineError, match=f"{path} belongs to user 12345 and you are 0; .*trust_engine"):
        read_engine(engine)


def test_trust_engine_overrides_checks(engine: Path) -> None:
    engine.parent.chmod(0o777)
    engine.write_bytes(b"a different engine")
    digest = hashlib.sha256(b"a different engine").hexdigest()
    found = read_engine(engine, trust_engines=[digest.upper()])
    assert found.content == b"a different engine" and found.manifest is not None
    manifest_path(engine).unlink()
    assert read_engine(engine, trust_engines=[digest]).manifest is None


def test_trust_engine_must_match_digest(engine: Path) -> None:
    manifest_path(engine).unlink()
    with pytest.raises(EngineError, match="has no manifest"):
        read_engine(engine, trust_engines=["0" * 64])


def test_manifest_is_replaced(engine: Path) -> None:
    write_manifest(engine, MANIFEST.model_copy(update={"build_s": 2.5}))
    assert read_manifest(engine).build_s == 2.5
    assert sorted(path.name for path in engine.parent.iterdir()) == ["teacher.engine", "teacher.engine.json"]


def test_failed_write_leaves_nothing(engine: Path) -> None:
    manifest_path(engine).unlink()
    manifest_path(engine).mkdir()
    with pytest.raises(IsADirectoryError):
        write_manifest(engine, MANIFEST)
    assert sorted(path.name for path in engine.parent.iterdir()) == ["teacher.engine", "teacher.engine.json"]


@pytest.mark.parametrize(("low", "best", "high"), [(4, 2, 8), (1, 9, 8), (0, 1, 1)])
def test_profile_must_ascend(low: int, best: int, high: int) -> None:
    with pytest.raises(ValidationError):
        Profile(min=low, opt=best, max=high)
