"""From an ONNX file to an engine that is whole, checked and described, or to one clear error and no engine."""

import importlib.util
import json
import resource
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError
from torch import Tensor, nn

from kd_pipeline.cli import main
from kd_pipeline.errors import EngineError, MissingPackageError, TeacherError
from kd_pipeline.onnx.export import InputAdapter, export_onnx
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.manifest import Profile, manifest_path, read_engine, read_manifest
from kd_pipeline.teachers.tensorrt.parity import Samples, exam_path
from kd_pipeline.teachers.tensorrt.settings import BuildSettings
from tests.networks import CLASSES, IMAGE_SHAPE, NUM_CLASSES, ConvNet, LogitsOnly, random_images
from tests.teachers.onnx_models import linear_model

PROFILES = (Profile(min=1, opt=4, max=8),)
SAMPLES = Samples(random_images(64), "the test")


def settings_for(onnx: Path, **changes: object) -> BuildSettings:
    return BuildSettings(onnx=onnx, **{"runtime": "tensorrt_rtx", "profiles": PROFILES, "precision": "fp16", **changes})


@pytest.fixture(scope="module")
def built(exported: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine in float16; do not change it."""
    return build_engine(settings_for(exported(0)), save_engine=tmp_path_factory.mktemp("built") / "teacher.engine")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of an engine and what belongs to it."""
    for path in (built, manifest_path(built), exam_path(built)):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / built.name


class Missed(Exception):
    """The engine that is there was not taken."""


def why_missed(settings: BuildSettings, engine: Path) -> str:
    """Why `engine` is not what `settings` ask for; the build goes no further."""

    def stop(line: str) -> None:
        raise Missed(line)

    with pytest.raises(Missed, match=r"^building again, because ") as missed:
        build_engine(settings, save_engine=engine, report=stop)
    return str(missed.value)


def files_in(folder: Path) -> set[str]:
    """What lies there for a user to see."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_the_manifest_says_what_was_built(exported: Callable[[int], Path], tmp_path: Path, precision: str) -> None:
    engine = tmp_path / "teacher.engine"
    settings = settings_for(exported(0), precision=precision)
    assert build_engine(settings, save_engine=engine, samples=lambda: SAMPLES) == engine
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
    assert least <= parity.cosine <= 1 + 1e-9
    assert (parity.cosine > 1 - 1e-9) == (precision == "fp32")


def test_the_rebuild_command_of_a_manifest_builds_the_same_recipe(
    exported: Callable[[int], Path], tmp_path: Path
) -> None:
    engine, other = tmp_path / "teacher.engine", tmp_path / "my classes.json"
    other.write_text(json.dumps([f"kind {number}" for number in range(NUM_CLASSES)]))
    settings = settings_for(
        exported(0),
        precision="bf16",
        half_io=True,
        profiles=(*PROFILES, Profile(min=2, opt=16, max=32)),
        input_adapter=InputAdapter(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=32, from_mean=(0.1, 0.2, 0.3)),
        image_size=48,
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
    assert reports == [f"{engine} is there already"]
    engine.unlink()
    manifest_path(engine).unlink()
    assert main(words) == 0
    assert read_manifest(engine).key == manifest.key
    assert str(read_manifest(engine).image) == "[N, 3, 48, 48] float16"


def test_an_engine_that_is_there_is_not_built_again(copy: Path, exported: Callable[[int], Path]) -> None:
    before = copy.stat()
    reports: list[str] = []
    build_engine(settings_for(exported(0)), save_engine=copy, report=reports.append)
    assert reports == [f"{copy} is there already"]
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
def test_another_wish_is_a_miss_that_names_the_field_and_both_values(
    copy: Path, exported: Callable[[int], Path], field: str, changes: dict[str, object]
) -> None:
    reason = why_missed(settings_for(exported(0), **changes), copy)
    assert f"{copy} is another one: {field}: found " in reason and ", wanted " in reason


def test_other_weights_in_the_external_data_alone_are_a_miss(tmp_path: Path) -> None:
    file, engine = tmp_path / "teacher.onnx", tmp_path / "teacher.engine"
    onnx.save(linear_model(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    build_engine(settings_for(file), save_engine=engine)
    before, graph = read_manifest(engine), file.read_bytes()
    weights = np.fromfile(tmp_path / "weights.bin", np.float32)
    (2 * weights).tofile(tmp_path / "weights.bin")
    assert file.read_bytes() == graph
    assert f"onnx_sha256: found {json.dumps(before.onnx_sha256)}" in why_missed(settings_for(file), engine)


@pytest.mark.parametrize("damage", ["engine", "manifest", "exam", "no manifest", "no exam"])
def test_a_damaged_engine_is_built_again_and_the_report_says_why(
    copy: Path, exported: Callable[[int], Path], damage: str
) -> None:
    path = {"engine": copy, "manifest": manifest_path(copy), "exam": exam_path(copy)}[damage.removeprefix("no ")]
    if damage.startswith("no"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert path.name in why_missed(settings_for(exported(0)), copy)


def test_the_cache_keeps_an_engine_for_each_recipe(
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
    assert reports == [f"{first} is there already"]


def test_extra_outputs_become_outputs_and_count_in_the_comparison(tmp_path: Path) -> None:
    file = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    relu = next(node.output[0] for node in onnx.load(file).graph.node if node.op_type == "Relu")
    engine = build_engine(settings_for(file, outputs=(relu,)), save_engine=tmp_path / "teacher.engine")
    manifest = read_manifest(engine)
    assert str(manifest.outputs[relu]) == "[N, 16, 16, 16] float32"
    assert set(np.load(exam_path(engine))) == {"images", "logits", relu}
    with pytest.raises(EngineError, match="computes no tensor 'relo'"):
        build_engine(settings_for(file, outputs=("relo",)), save_engine=engine)


class Overflows(nn.Module):
    """A network whose values leave the range of float16 in the middle and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * 1e6 * 1e-6)["logits"]


def test_values_beyond_float16_stay_in_float32_and_the_manifest_names_the_nodes(tmp_path: Path) -> None:
    file = export_onnx(Overflows(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    manifest = read_manifest(build_engine(settings_for(file), save_engine=tmp_path / "teacher.engine"))
    assert 1 <= len(manifest.kept_float32) <= 3
    assert manifest.parity.cosine > 0.9999


class Fragile(nn.Module):
    """A network that stands on differences which half precision cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images * 1e-3 + 100 - 100) * 1e3)["logits"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_teacher_whose_answers_change_makes_no_engine(tmp_path: Path, precision: str) -> None:
    file = export_onnx(Fragile(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    engine = tmp_path / "engines" / "teacher.engine"
    with pytest.raises(EngineError, match=f"the {precision} teacher's answers in batches of 1 are too far"):
        build_engine(settings_for(file, precision=precision), save_engine=engine)
    assert files_in(engine.parent) == set()
    assert build_engine(settings_for(file, precision="fp32"), save_engine=engine) == engine


def test_int8_without_images_says_how_to_give_them(exported: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"int8 takes its ranges from real images, and there are none.*--calibrate"):
        build_engine(settings_for(exported(0), precision="int8"), save_engine=tmp_path / "teacher.engine")


def test_images_of_another_size_are_refused_with_both(exported: Callable[[int], Path], tmp_path: Path) -> None:
    samples = Samples(random_images(4, shape=(3, 48, 48)), "the test")
    with pytest.raises(EngineError, match=r"takes images \[3, 32, 32\], and the test gives \[3, 48, 48\]"):
        build_engine(settings_for(exported(0)), save_engine=tmp_path / "a.engine", samples=lambda: samples)
    with pytest.raises(EngineError, match="takes images of 32 x 32, wanted are 48 x 48"):
        build_engine(settings_for(exported(0), image_size=48), save_engine=tmp_path / "a.engine")


def test_a_file_for_any_size_needs_one(tmp_path: Path) -> None:
    file = tmp_path / "teacher.onnx"
    onnx.save(linear_model(inputs=(("images", TensorProto.FLOAT, ["N", 3, "H", "W"]),)), file)
    with pytest.raises(EngineError, match="takes images of any size, and an engine takes one; say which with image_si"):
        build_engine(settings_for(file), save_engine=tmp_path / "a.engine")
    engine = build_engine(settings_for(file, image_size=16), save_engine=tmp_path / "a.engine")
    assert str(read_manifest(engine).image) == "[N, 3, 16, 16] float32"


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
            "a static batch of 4; a teacher needs a dynamic one",
        ),
        (linear_model(weights=TensorProto.FLOAT16).SerializeToString(), "holds fp16 weights; give the float32 file"),
    ],
    ids=["empty", "garbage", "truncated", "custom op", "static batch", "half precision"],
)
def test_a_bad_file_ends_in_one_clear_error_and_no_engine(
    tmp_path: Path, content: bytes, message: str, precision: str
) -> None:
    file, folder = tmp_path / "teacher.onnx", tmp_path / "engines"
    file.write_bytes(content)
    with pytest.raises(TeacherError, match=message):
        build_engine(settings_for(file, precision=precision), save_engine=folder / "teacher.engine")
    assert not folder.exists() or files_in(folder) == set()


def test_a_miss_ends_with_a_new_engine_in_the_place_of_the_old_one(copy: Path, exported: Callable[[int], Path]) -> None:
    build_engine(settings_for(exported(1)), save_engine=copy)
    (old, new) = (exported(seed) for seed in (0, 1))
    assert read_engine(copy).manifest is not None
    assert read_manifest(copy).onnx == str(new.resolve()) != str(old.resolve())


@pytest.mark.parametrize("name", ["teacher.onnx", "weights.pt", "classes.json", "teacher"])
def test_an_engine_never_takes_the_name_of_another_kind_of_file(
    exported: Callable[[int], Path], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"of the user")
    with pytest.raises(EngineError, match=rf"would go to {path}; call it {path.stem}.engine"):
        build_engine(settings_for(exported(0)), save_engine=path)
    assert (files_in(tmp_path), path.read_bytes()) == ({name}, b"of the user")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder, which is a folder; name a file in it"),
        ("file/teacher.engine", "file cannot be read or written: File exists"),
        (f"{'long' * 63}.engine", "cannot be read or written: File name too long"),
    ],
)
def test_a_place_that_takes_no_engine_is_one_clear_error(
    exported: Callable[[int], Path], tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=message):
        build_engine(settings_for(exported(0)), save_engine=tmp_path / name)
    assert files_in(tmp_path) == {"folder", "file"}


@pytest.mark.parametrize("num_bytes", [60_000, 700_000], ids=["at the conversion", "at the engine's papers"])
def test_a_disk_without_room_is_one_clear_error_and_leaves_nothing(
    exported: Callable[[int], Path], tmp_path: Path, num_bytes: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with pytest.raises(EngineError, match="File too large"):
            build_engine(settings_for(exported(0)), save_engine=tmp_path / "teacher.engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == set()


def test_a_timing_cache_lies_in_a_folder_that_is_made_and_is_no_folder_itself(
    exported: Callable[[int], Path], tmp_path: Path
) -> None:
    engine = tmp_path / "teacher.engine"
    with pytest.raises(EngineError, match=r"timing_cache: .* is a folder; name a file in it"):
        build_engine(settings_for(exported(0), timing_cache=tmp_path), save_engine=engine)
    build_engine(settings_for(exported(0), timing_cache=tmp_path / "new" / "timings"), save_engine=engine)
    assert files_in(tmp_path / "new") == {"timings"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_external_weights_cut_short_are_one_clear_error(
    exported: Callable[[int], Path], tmp_path: Path, precision: str
) -> None:
    file, weights = tmp_path / "teacher.onnx", tmp_path / "weights.bin"
    onnx.save(onnx.load(exported(0)), file, save_as_external_data=True, location="weights.bin")
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(TeacherError, match=f"ONNX Runtime cannot load {file}"):
        build_engine(
            settings_for(file, precision=precision), save_engine=tmp_path / "teacher.engine", samples=lambda: SAMPLES
        )
    assert files_in(tmp_path) == {"teacher.onnx", "weights.bin"}


def test_a_file_that_changes_during_the_build_makes_no_engine(exported: Callable[[int], Path], tmp_path: Path) -> None:
    file = tmp_path / "teacher.onnx"
    shutil.copy(exported(0), file)

    def change(line: str) -> None:
        if line.startswith("comparing"):
            shutil.copy(exported(1), file)

    with pytest.raises(EngineError, match=f"{file} was changed during the build"):
        build_engine(settings_for(file, precision="fp32"), save_engine=tmp_path / "teacher.engine", report=change)
    assert files_in(tmp_path) == {"teacher.onnx"}


def test_a_cache_that_cannot_be_made_is_one_clear_error(
    exported: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot be read or written: Not a directory; .* save_engine"):
        build_engine(settings_for(exported(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware_compatible": True}, "tensorrt_rtx does not know --hardware-compatible"),
        ({"compute_capability": ("9.9",)}, r"builds for no compute capability 9.9; it knows .*8\.9.*12\.0"),
    ],
)
def test_what_rtx_cannot_build_says_what_it_can(
    exported: Callable[[int], Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_engine(settings_for(exported(0), **changes), save_engine=tmp_path / "teacher.engine")
    assert files_in(tmp_path) == set()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_tensorrt_that_is_not_installed_names_what_to_install(exported: Callable[[int], Path], tmp_path: Path) -> None:
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
        ({"input_adapter": {"mean": (123, 116, 103), "std": (58, 57, 57)}}, "less than or equal to 1"),
    ],
)
def test_settings_that_make_no_engine_are_refused_when_they_are_written(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        settings_for(Path("teacher.onnx"), **changes)
