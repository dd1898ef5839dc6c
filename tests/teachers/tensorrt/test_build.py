"""Building from an ONNX file gives a complete, checked and described engine, or one clear error and no engine."""

import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError
from torch import Tensor, nn

from kd_pipeline.cli import main
from kd_pipeline.errors import EngineError, MissingPackageError, TeacherError
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.parity import CalibrationSet
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.manifest import Profile, manifest_path, read_engine, read_manifest
from kd_pipeline.teachers.tensorrt.parity import parity_path
from kd_pipeline.teachers.tensorrt.settings import BuildSettings
from tests.networks import CLASSES, IMAGE_SHAPE, NUM_CLASSES, ConvNet, LogitsOnly, random_images
from tests.teachers.onnx_models import linear_model
from tests.teachers.tensorrt.special_files import SPECIAL_FILES

PROFILES = (Profile(min=1, opt=4, max=8),)
IMAGES = CalibrationSet(random_images(64), "the test")


def settings_for(onnx: Path, **changes: object) -> BuildSettings:
    return BuildSettings(onnx=onnx, **{"runtime": "tensorrt_rtx", "profiles": PROFILES, "precision": "fp16", **changes})


@pytest.fixture(scope="module")
def built(exported: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine in fp16, shared by the tests; do not change it."""
    return build_engine(settings_for(exported(0)), save_engine=tmp_path_factory.mktemp("built") / "teacher.engine")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of an engine and its files."""
    for path in (built, manifest_path(built), parity_path(built)):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / built.name


class Rebuilt(Exception):
    """An existing engine is built again."""


def why_rebuilt(settings: BuildSettings, engine: Path) -> str:
    """The reason for which `engine` is built again with `settings`; the build stops there."""

    def stop(line: str) -> None:
        raise Rebuilt(line)

    with pytest.raises(Rebuilt, match=r"^building again, because ") as rebuilt:
        build_engine(settings, save_engine=engine, report=stop)
    return str(rebuilt.value)


def files_in(folder: Path) -> set[str]:
    """Names of all files but locks."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_manifest_describes_engine(exported: Callable[[int], Path], tmp_path: Path, precision: str) -> None:
    engine = tmp_path / "teacher.engine"
    settings = settings_for(exported(0), precision=precision)
    assert build_engine(settings, save_engine=engine, calibration_set=lambda: IMAGES) == engine
    assert files_in(tmp_path) == {"teacher.engine", "teacher.engine.json", "teacher.engine.parity.npz"}
    found = read_engine(engine)
    manifest = found.manifest
    assert manifest is not None
    assert (manifest.precision, manifest.profiles, manifest.classes) == (precision, PROFILES, CLASSES)
    assert (manifest.runtime, manifest.gpu, manifest.compute_capability) == ("tensorrt_rtx", "any", ("any",))
    assert manifest.engine_bytes == len(found.content) > 1000
    assert str(manifest.image) == "[N, 3, 32, 32] float32"
    assert {name: str(output) for name, output in manifest.outputs.items()} == {
        "logits": "[N, 10] float32",
        "features": "[N, 32, 8, 8] float32",
    }
    parity = manifest.parity
    assert (parity.images, parity.num_images) == ("the test", 64)
    assert parity.batch_sizes == (1, 4, 8)
    least = 0.999 if precision in ("fp32", "fp16", "bf16") else 0.99
    assert parity.outputs.keys() == manifest.outputs.keys()
    for name, found_parity in parity.outputs.items():
        assert least <= found_parity.cosine <= 1 + 1e-9
        assert (found_parity.cosine > 1 - 1e-9) == (precision == "fp32")
        assert (found_parity.position_cosine is None) == (found_parity.kl is not None) == (name == "logits")


def test_command_in_manifest_builds_same_recipe(exported: Callable[[int], Path], tmp_path: Path) -> None:
    engine, other = tmp_path / "teacher.engine", tmp_path / "my classes.json"
    other.write_text(json.dumps([f"kind {number}" for number in range(NUM_CLASSES)]))
    settings = settings_for(
        exported(0),
        precision="bf16",
        half_io=True,
        profiles=(*PROFILES, Profile(min=2, opt=16, max=32)),
        input_adapter=InputAdapter(
            mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=(32, 32), from_mean=(0.1, 0.2, 0.3)
        ),
        image_size=(48, 40),
        classes=other,
        workspace=64,
        builder_optimization_level=1,
        compute_capability=("8.9", "12.0"),
    )
    build_engine(settings, save_engine=engine)
    manifest = read_manifest(engine)
    command, *words = shlex.split(manifest.command)
    assert command == "kd-pipeline"
    reports: list[str] = []
    build_engine(settings, save_engine=engine, report=reports.append)
    assert reports == [f"{engine} already exists"]
    engine.unlink()
    manifest_path(engine).unlink()
    assert main(words) == 0
    assert read_manifest(engine).key == manifest.key
    assert str(read_manifest(engine).image) == "[N, 3, 48, 40] float16"


def test_existing_engine_is_not_rebuilt(copy: Path, exported: Callable[[int], Path]) -> None:
    before = copy.stat()
    reports: list[str] = []
    build_engine(settings_for(exported(0)), save_engine=copy, report=reports.append)
    assert reports == [f"{copy} already exists"]
    assert (copy.stat().st_mtime_ns, copy.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("precision", {"precision": "bf16"}),
        ("half_io", {"half_io": True}),
        ("profiles", {"profiles": (Profile(min=1, opt=4, max=9),)}),
        ("classes", {"classes": CLASSES[::-1]}),
        ("input_adapter", {"input_adapter": InputAdapter(mean=(0.5,) * 3, std=(0.5,) * 3)}),
        ("compute_capability", {"compute_capability": ("8.9",)}),
        ("workspace", {"workspace": 64}),
        ("builder_optimization_level", {"builder_optimization_level": 0}),
    ],
)
def test_changed_setting_rebuilds_and_names_field(
    copy: Path, exported: Callable[[int], Path], field: str, changes: dict[str, object]
) -> None:
    reason = why_rebuilt(settings_for(exported(0), **changes), copy)
    assert f"{copy} is different: {field}: found " in reason and ", wanted " in reason


def test_changed_external_weights_rebuild(tmp_path: Path) -> None:
    file, engine = tmp_path / "teacher.onnx", tmp_path / "teacher.engine"
    onnx.save(linear_model(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    build_engine(settings_for(file), save_engine=engine)
    before, graph = read_manifest(engine), file.read_bytes()
    weights = np.fromfile(tmp_path / "weights.bin", np.float32)
    (2 * weights).tofile(tmp_path / "weights.bin")
    assert file.read_bytes() == graph
    assert f"onnx_sha256: found {json.dumps(before.onnx_sha256)}" in why_rebuilt(settings_for(file), engine)


@pytest.mark.parametrize("damage", ["engine", "manifest", "parity", "no manifest", "no parity"])
def test_damaged_engine_is_rebuilt_with_reason(copy: Path, exported: Callable[[int], Path], damage: str) -> None:
    path = {"engine": copy, "manifest": manifest_path(copy), "parity": parity_path(copy)}[damage.removeprefix("no ")]
    if damage.startswith("no"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert path.name in why_rebuilt(settings_for(exported(0)), copy)


@pytest.mark.slow
def test_cache_has_one_engine_per_recipe(
    exported: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build_engine(settings_for(exported(0)))
    assert first.parent == tmp_path / "kd_pipeline" / "engines"
    assert first.parent.stat().st_mode & 0o077 == 0
    assert build_engine(settings_for(exported(0), precision="fp32")) != first
    assert build_engine(settings_for(exported(1))) != first
    reports: list[str] = []
    assert build_engine(settings_for(exported(0)), report=reports.append) == first
    assert reports == [f"{first} already exists"]


@pytest.mark.slow
def test_extra_outputs_are_built_and_compared(tmp_path: Path) -> None:
    file = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    relu = next(node.output[0] for node in onnx.load(file).graph.node if node.op_type == "Relu")
    engine = build_engine(settings_for(file, outputs=(relu,)), save_engine=tmp_path / "teacher.engine")
    manifest = read_manifest(engine)
    assert str(manifest.outputs[relu]) == "[N, 16, 16, 16] float32"
    assert set(np.load(parity_path(engine))) == {"images", "output.logits", f"output.{relu}"}
    with pytest.raises(EngineError, match="computes no tensor 'relo'"):
        build_engine(settings_for(file, outputs=("relo",)), save_engine=engine)


class Overflows(nn.Module):
    """A network whose values exceed the range of float16 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * 1e6 * 1e-6)["logits"]


@pytest.mark.slow
def test_overflowing_nodes_stay_float32(tmp_path: Path) -> None:
    file = export_onnx(Overflows(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    manifest = read_manifest(build_engine(settings_for(file), save_engine=tmp_path / "teacher.engine"))
    assert 1 <= len(manifest.kept_float32) <= 3
    assert manifest.parity.outputs["logits"].cosine > 0.9999


class Fragile(nn.Module):
    """A network that needs differences that half precision cannot represent."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images * 1e-3 + 100 - 100) * 1e3)["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_failed_parity_makes_no_engine(tmp_path: Path, precision: str) -> None:
    file = export_onnx(Fragile(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    engine = tmp_path / "engines" / "teacher.engine"
    with pytest.raises(EngineError, match=f"the {precision} teacher's outputs in batches of 1 are too far"):
        build_engine(settings_for(file, precision=precision), save_engine=engine)
    assert files_in(engine.parent) == set()
    assert build_engine(settings_for(file, precision="fp32"), save_engine=engine) == engine


def test_int8_needs_calibration_images(exported: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"int8 takes its ranges from real images, and there are none.*--calibrate"):
        build_engine(settings_for(exported(0), precision="int8"), save_engine=tmp_path / "teacher.engine")


def test_wrong_image_size_is_refused(exported: Callable[[int], Path], tmp_path: Path) -> None:
    images = CalibrationSet(random_images(4, shape=(3, 48, 48)), "the test")
    with pytest.raises(EngineError, match=r"takes images \[3, 32, 32\], and the test gives \[3, 48, 48\]"):
        build_engine(settings_for(exported(0)), save_engine=tmp_path / "a.engine", calibration_set=lambda: images)
    with pytest.raises(EngineError, match="takes images of 32 x 32, wanted 48 x 48"):
        build_engine(settings_for(exported(0), image_size=48), save_engine=tmp_path / "a.engine")


def test_open_image_size_must_be_set(tmp_path: Path) -> None:
    file = tmp_path / "teacher.onnx"
    onnx.save(linear_model(inputs=(("images", TensorProto.FLOAT, ["N", 3, "H", "W"]),)), file)
    with pytest.raises(EngineError, match="takes images of any size, and an engine takes one; set it with image_si"):
        build_engine(settings_for(file), save_engine=tmp_path / "a.engine")
    for size, shape in ((16, "16, 16"), ((16, 24), "16, 24")):
        engine = build_engine(settings_for(file, image_size=size), save_engine=tmp_path / f"{shape}.engine")
        assert str(read_manifest(engine).image) == f"[N, 3, {shape}] float32"


def custom_op_model() -> onnx.ModelProto:
    model = linear_model()
    model.graph.node[0].domain = "my.ops"
    model.graph.node[0].op_type = "Frobnicate"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable ONNX file|holds no ONNX graph"),
        (b"garbage" * 100, "is not a readable ONNX file"),
        (linear_model().SerializeToString()[:-40], "teacher.onnx"),
        (custom_op_model().SerializeToString(), "Frobnicate"),
        (
            linear_model(
                inputs=(("images", TensorProto.FLOAT, [4, 3, 8, 8]),), outputs=(("logits", TensorProto.FLOAT, [4, 5]),)
            ).SerializeToString(),
            "a static batch of 4; export",
        ),
        (linear_model(weights=TensorProto.FLOAT16).SerializeToString(), "holds fp16 weights; give the float32 file"),
    ],
    ids=["empty", "garbage", "truncated", "custom op", "static batch", "half precision"],
)
def test_bad_onnx_file_makes_no_engine(tmp_path: Path, content: bytes, message: str, precision: str) -> None:
    file, folder = tmp_path / "teacher.onnx", tmp_path / "engines"
    file.write_bytes(content)
    with pytest.raises(TeacherError, match=message):
        build_engine(settings_for(file, precision=precision), save_engine=folder / "teacher.engine")
    assert not folder.exists() or files_in(folder) == set()


def test_rebuild_replaces_engine(copy: Path, exported: Callable[[int], Path]) -> None:
    build_engine(settings_for(exported(1)), save_engine=copy)
    (old, new) = (exported(seed) for seed in (0, 1))
    assert read_engine(copy).manifest is not None
    assert read_manifest(copy).onnx == str(new.resolve()) != str(old.resolve())


@pytest.mark.parametrize("name", ["teacher.onnx", "weights.pt", "classes.json", "teacher"])
def test_only_engine_suffixes_are_written(exported: Callable[[int], Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"of the user")
    with pytest.raises(EngineError, match=rf"would go to {path}; call it {path.stem}.engine"):
        build_engine(settings_for(exported(0)), save_engine=path)
    assert (files_in(tmp_path), path.read_bytes()) == ({name}, b"of the user")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "folder.engine",
            "folder.engine, which is a directory; delete it, or choose a different file with save_engine",
        ),
        ("file/teacher.engine", "file cannot be read or written: File exists"),
        (f"{'long' * 63}.engine", "cannot be read or written: File name too long"),
    ],
)
def test_unwritable_path_is_engine_error(
    exported: Callable[[int], Path], tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder.engine").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=message):
        build_engine(settings_for(exported(0)), save_engine=tmp_path / name)
    assert files_in(tmp_path) == {"folder.engine", "file"}


@pytest.mark.parametrize("num_bytes", [60_000, 700_000], ids=["conversion", "engine files"])
def test_full_disk_leaves_nothing(exported: Callable[[int], Path], tmp_path: Path, num_bytes: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with pytest.raises(EngineError, match="File too large"):
            build_engine(settings_for(exported(0)), save_engine=tmp_path / "teacher.engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == set()


@pytest.fixture
def group_umask() -> Iterator[None]:
    """Files and folders that are created can be written by the group, as Debian and Red Hat have it."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_build_is_trusted_and_imports_nothing_from_here(
    group_umask: None, exported: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a downloaded folder as the working directory, and a umask that lets the group write."""
    here = tmp_path / "downloaded"
    here.mkdir()
    (here / "json.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w'); raise SystemExit(7)")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    engine = tmp_path / "new" / "folder" / "teacher.engine"
    settings = settings_for(exported(0), timing_cache=tmp_path / "timings" / "of this GPU")
    assert build_engine(settings, save_engine=engine) == engine
    assert not (tmp_path / "marker").exists()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if here not in path.parents}
    assert modes == {
        "downloaded": 0o775,
        "new": 0o755,
        "folder": 0o755,
        "teacher.engine": 0o644,
        "teacher.engine.json": 0o644,
        "teacher.engine.parity.npz": 0o644,
        ".teacher.engine.lock": 0o600,
        "timings": 0o755,
        "of this GPU": 0o600,
    }
    reports: list[str] = []
    build_engine(settings, save_engine=engine, report=reports.append)
    assert reports == [f"{engine} already exists"]


@pytest.mark.parametrize("loose", ["shared", "shared/mine"])
def test_place_where_engine_would_be_refused_gets_none(
    exported: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], loose: str
) -> None:
    (tmp_path / "shared" / "mine").mkdir(parents=True)
    (tmp_path / loose).chmod(0o775)
    engine = tmp_path / "shared" / "mine" / "new" / "teacher.engine"
    arguments = ["build-engine", "--onnx", str(exported(0)), "--batch", "1", "4", "8", "--save-engine", str(engine)]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"kd-pipeline: the engine would go to {engine}, and would be refused when it is opened: ")
    assert f"group may write to {tmp_path / loose}; if nobody did, chmod g-w {tmp_path / loose};" in error
    assert "--save-engine" in error
    assert not list((tmp_path / "shared" / "mine").iterdir())
    with pytest.raises(EngineError, match="would be refused when it is opened"):
        build_engine(settings_for(exported(0)), save_engine=engine)


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["teacher.engine", "teacher.engine.json", "teacher.engine.parity.npz", "timings"])
def test_nothing_but_files_is_replaced(
    exported: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 bytes
    SPECIAL_FILES[kind](Path(name))
    arguments = ["--onnx", str(exported(0)), "--save-engine", "teacher.engine", "--timing-cache", "timings"]
    assert main(["build-engine", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"{name}, which is a (directory|pipe|socket|link); delete it, or choose a different file", error)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["link", "folder", "foreign folder"])
@pytest.mark.parametrize("name", [".teacher.engine.lock", ".teacher.engine.building"])
def test_what_lies_in_the_way_is_named_and_left_alone(
    exported: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "engines" / name
    victim.mkdir()
    (victim / "file").touch()
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(victim)
    else:
        path.mkdir()
    if kind == "foreign folder":  # which only its owner may delete
        monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    elif (name, kind) == (".teacher.engine.building", "folder"):  # of a build that was killed
        (path / "converted.onnx").touch()
        engine = build_engine(settings_for(exported(0)), save_engine=path.parent / "teacher.engine")
        assert read_engine(engine).manifest is not None and not path.exists()
        return
    with pytest.raises(EngineError, match=rf"{path} is not .* of yours.*; delete it, or choose .*--save-engine"):
        build_engine(settings_for(exported(0)), save_engine=path.parent / "teacher.engine")
    assert (victim / "file").exists() and path.exists()


def test_cache_that_others_can_write_gets_no_engine(
    exported: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kd_pipeline").mkdir()
    (tmp_path / "kd_pipeline").chmod(0o775)
    message = rf"group may write to {tmp_path}/kd_pipeline; if nobody did, chmod g-w .*XDG_CACHE_HOME.*--save-engine"
    with pytest.raises(EngineError, match=message):
        build_engine(settings_for(exported(0)))


def test_engine_that_others_could_write_is_built_again(copy: Path, exported: Callable[[int], Path]) -> None:
    copy.chmod(0o664)
    reason = why_rebuilt(settings_for(exported(0)), copy)
    assert f"{copy} is not trusted: group may write to {copy}" in reason
    assert "--trust-engine" not in reason  # which is no option of build-engine


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_truncated_external_weights_are_refused(
    exported: Callable[[int], Path], tmp_path: Path, precision: str
) -> None:
    file, weights = tmp_path / "teacher.onnx", tmp_path / "weights.bin"
    onnx.save(onnx.load(exported(0)), file, save_as_external_data=True, location="weights.bin")
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(TeacherError, match=f"{file} has weights in 'weights.bin', which cannot be read"):
        build_engine(
            settings_for(file, precision=precision),
            save_engine=tmp_path / "teacher.engine",
            calibration_set=lambda: IMAGES,
        )
    assert files_in(tmp_path) == {"teacher.onnx", "weights.bin"}


def test_onnx_changed_during_build_makes_no_engine(exported: Callable[[int], Path], tmp_path: Path) -> None:
    file = tmp_path / "teacher.onnx"
    shutil.copy(exported(0), file)

    def change(line: str) -> None:
        if line.startswith("comparing"):
            shutil.copy(exported(1), file)

    with pytest.raises(EngineError, match=f"{file} was changed during the build"):
        build_engine(settings_for(file, precision="fp32"), save_engine=tmp_path / "teacher.engine", report=change)
    assert files_in(tmp_path) == {"teacher.onnx"}


def test_unusable_cache_folder_is_engine_error(
    exported: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"file cannot be read or written: File exists; .* save_engine"):
        build_engine(settings_for(exported(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware_compatible": True}, "tensorrt_rtx has no --hardware-compatible"),
        ({"compute_capability": ("9.9",)}, r"cannot build for compute capability 9.9; it knows .*8\.9.*12\.0"),
    ],
)
def test_unsupported_rtx_options_are_refused(
    exported: Callable[[int], Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_engine(settings_for(exported(0), **changes), save_engine=tmp_path / "teacher.engine")
    assert files_in(tmp_path) == set()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_missing_tensorrt_says_what_to_install(exported: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"pip install 'kd_pipeline\[trt\]'"):
        build_engine(settings_for(exported(0), runtime="tensorrt"), save_engine=tmp_path / "teacher.engine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"half_io": True, "precision": "fp32"}, "half_io goes with fp16 and bf16, and the precision is fp32"),
        ({"outputs": ("a", "a")}, "outputs holds a name twice: a, a"),
        ({"profiles": ()}, "at least 1 item"),
        ({"builder_optimization_level": 6}, "less than or equal to 5"),
        ({"workspace": 1 << 43}, "less than 8796093022208"),
        ({"input_adapter": {"mean": (123, 116, 103), "std": (58, 57, 57)}}, "pixels are from 0 to 1 here; divide"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings_for(Path("teacher.onnx"), **changes)
