"""`tools/build_engine.py` as a user types it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from kd_pipeline.cli import main
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.tensorrt.manifest import read_engine, read_manifest
from kd_pipeline.teachers.tensorrt.parity import parity_path
from tests.networks import IMAGE_SHAPE, NUM_CLASSES, vit_backbone
from tests.teachers.onnx_models import linear_model

TOOL = Path(__file__).parents[2] / "tools" / "build_engine.py"


def build(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_timm_model_becomes_engine(tmp_path: Path) -> None:
    name, precision = "test_vit", "bf16"
    engine = tmp_path / f"{name}.{precision}.engine"
    result = build(tmp_path, "--timm", name, "--precision", precision, "--batch", 1, 32, 64)
    assert result.returncode == 0, result.stderr
    found = read_engine(engine)
    assert found.manifest is not None
    parity = found.manifest.parity.outputs["logits"]
    assert parity.cosine >= 0.999 and parity.top1_agreement >= 0.99
    assert [(each.min, each.opt, each.max) for each in found.manifest.profiles] == [(1, 32, 64)]
    assert str(found.manifest.outputs["logits"]) == "[N, 1000] float32"
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith(" "))
    assert lines["engine"] == str(engine)
    assert lines["precision"].startswith(precision)
    assert lines["images"] == "[N, 3, 160, 160] float32, 1 to 64 (best at 32) at a time"
    assert lines["parity"].startswith("to float32 on 64 images (")
    assert "logits: cosine " in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_network_without_a_head_becomes_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["build-engine", "--timm", "test_resnet", "--num-classes", "0", "--image-size", "64"]
    assert main([*arguments, "--precision", "fp16"]) == 0
    manifest = read_manifest(tmp_path / "test_resnet.fp16.engine")
    found = {name: str(output) for name, output in manifest.outputs.items()}
    assert found == {"pooled": "[N, 96] float32", "spatial": "[N, 96, 2, 2] float32"}
    assert manifest.parity.outputs.keys() == found.keys() and manifest.classes is None
    output = capsys.readouterr().out
    assert "pooled: cosine " in output and "spatial: cosine " in output and "of each position" in output
    assert "top-1" not in output


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_keep_their_prefix_in_an_engine(tmp_path: Path, precision: str) -> None:
    file = export_onnx(vit_backbone(), tmp_path / "vit.onnx", image_shape=IMAGE_SHAPE, max_batch=2)
    assert main(["build-engine", "--onnx", str(file), "--precision", precision]) == 0
    outputs = read_manifest(tmp_path / f"vit.{precision}.engine").outputs
    assert {name: output.num_prefix_tokens for name, output in outputs.items()} == {"pooled": None, "spatial": 3}


def test_classes_of_a_network_without_logits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, names = tmp_path / "map.onnx", tmp_path / "names.json"
    model = linear_model(outputs=[("spare", TensorProto.FLOAT, ["N", 5]), ("map", TensorProto.FLOAT, ["N", 3, 8, 8])])
    del model.graph.output[0]
    onnx.save(model, file)
    names.write_text(json.dumps(["cat", "dog"]))
    assert main(["build-engine", "--onnx", str(file), "--classes", str(names)]) == 1
    assert "map.onnx returns 'map' and no 'logits', which class names are for" in capsys.readouterr().err


@pytest.mark.slow
def test_int8_calibrates_on_config_images(photo_folder: Path, exported: Callable[[int], Path], tmp_path: Path) -> None:
    config = tmp_path / "photos.yaml"
    config.write_text(
        f"""
        data:
          batch_size: 8
          train:
            source: {{kind: image_folder, root: {photo_folder}}}
            transform: {{preset: train, size: 32}}
        """
    )
    engine = tmp_path / "teacher.engine"
    arguments = ("--onnx", exported(0), "--precision", "int8", "--calibrate", config, "--save-engine", engine)
    assert build(tmp_path, *arguments).returncode == 0
    manifest = read_manifest(engine)
    assert (manifest.parity.images, manifest.parity.num_images) == (f"the training split of {config}", 37)
    assert manifest.calibration_sha256 is not None
    assert f"--calibrate {config}" in manifest.command
    again = build(tmp_path, *arguments)
    assert f"{engine} already exists" in again.stderr


def test_accepts_trtexec_spellings(exported: Callable[[int], Path], tmp_path: Path) -> None:
    engine = tmp_path / "teacher.engine"
    shapes = [f"--{name}Shapes=images:{batch}x3x32x32" for name, batch in (("min", 2), ("opt", 4), ("max", 6))]
    assert main(["build-engine", f"--onnx={exported(0)}", f"--saveEngine={engine}", *shapes]) == 0
    (profile,) = read_manifest(engine).profiles
    assert (profile.min, profile.opt, profile.max) == (2, 4, 6)


def test_engine_that_others_could_write_is_replaced(
    exported: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "teacher.engine"
    engine.write_bytes(b"their code")
    engine.chmod(0o666)
    assert main(["build-engine", "--onnx", str(exported(0)), "--save-engine", str(engine)]) == 0
    error = capsys.readouterr().err
    assert f"building again, because {engine} is not trusted: group and others may write to {engine}" in error
    assert read_engine(engine).content != b"their code" and engine.stat().st_mode & 0o022 == 0


def test_engine_defaults_to_models_folder(exported: Callable[[int], Path], tmp_path: Path) -> None:
    file = tmp_path / "my.teacher.onnx"
    file.write_bytes(exported(0).read_bytes())
    assert main(["build-engine", "--onnx", str(file)]) == 0
    assert (tmp_path / "my.teacher.fp32.engine").exists() and parity_path(tmp_path / "my.teacher.fp32.engine").exists()


@pytest.mark.slow
def test_factory_name_allows_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = tmp_path / "own.engine"
    arguments = ["--factory", "tests.networks:LogitsOnly", "--image-size", "32", "--save-engine", str(engine)]
    assert main(["build-engine", *arguments, "--classes", "names.json"]) == 1
    assert "names.json" in capsys.readouterr().err
    Path("names.json").write_text(json.dumps([f"kind {number}" for number in range(NUM_CLASSES)]))
    assert main(["build-engine", *arguments, "--classes", "names.json"]) == 0
    assert read_manifest(engine).classes == tuple(f"kind {number}" for number in range(NUM_CLASSES))
    assert (tmp_path / "own.onnx").exists()


@pytest.mark.slow
def test_export_keeps_different_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["build-engine", "--factory", "tests.networks:LogitsOnly", "--image-size", "32"]
    onnx.save(linear_model(), "own.onnx")
    before = Path("own.onnx").read_bytes()
    assert main([*arguments, "--save-engine", "own.engine"]) == 1
    assert "own.onnx already exists and is not the export of tests.networks:LogitsOnly" in capsys.readouterr().err
    assert Path("own.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["own.onnx"]
    assert main([*arguments, "--save-engine", "new.engine"]) == 0
    assert main([*arguments, "--save-engine", "new.engine"]) == 0
    assert "new.engine already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--workspace", "0"], ["--calibrate", "no.yaml"], ["--precision", "int8"], ["--batch", "4", "2", "8"]]
)
def test_options_are_checked_before_export(
    wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build-engine", "--factory", "tests.networks:LogitsOnly", "--image-size", "32", *wrong]) == 1
    assert "exporting" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_is_checked_before_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o775)
    assert main(["build-engine", "--factory", "tests.networks:LogitsOnly", "--image-size", "32"]) == 1
    error = capsys.readouterr().err
    assert "exporting" not in error and f"group may write to {tmp_path}" in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --onnx, --timm, --torchvision, --builtin, --factory, got none of them"),
        (["--onnx", "FILE", "--timm", "resnet18"], "got --onnx and --timm"),
        (["--onnx", "FILE", "--pretrained"], "--pretrained is for a model by name"),
        (["--onnx", "FILE", "--num-classes", "0"], "--num-classes is for a model by name"),
        (["--timm", "resnet18", "--num-classes", "0", "--classes", "names.json"], "which --num-classes 0 leaves out"),
        (["--onnx", "nowhere.onnx"], "nowhere.onnx: there is no such file"),
        (["--onnx", "FILE", "--batch", "4", "2", "8"], "a profile needs min <= opt <= max, got 4, 2, 8"),
        (["--onnx", "FILE", "--batch", "0", "2", "8"], "--batch: Input should be greater than or equal to 1, got 0"),
        (["--onnx", "FILE", "--input-mean", *"000", "--input-std", *"110"], "--input-std: Input should be greater"),
        (["--onnx", "FILE", "--from-mean", *"000"], "--from-mean and --from-std go with --input-mean and --input-std"),
        (["--onnx", "FILE", "--max-shapes", "images:8x3x8x8"], "give --min-shapes, --opt-shapes and --max-shapes tog"),
        (["--onnx", "FILE", *["--min-shapes", "a:1x3x8x8"], *["--opt-shapes", "a:1x3x8x8"], *["--max-shapes", "a:8"]],
         "is called 'images', and the shape a:1x3x8x8 is for 'a'"),
        (["--onnx", "FILE", *["--min-shapes", "1x3x8x8"], *["--opt-shapes", "x"], *["--max-shapes", "y"]],
         "a shape is NAME:NxCxHxW, such as images:1x3x224x224, got 1x3x8x8"),
        (["--onnx", "FILE", "--input-mean", "0.5", "0.5", "0.5"], "--input-mean and --input-std belong together"),
        (["--onnx", "FILE", "--image-size", "16"], "takes images of 8 x 8, wanted 16 x 16"),
        (["--onnx", "FILE", "--half-io"], "half_io goes with fp16 and bf16, and the precision is fp32"),
        (["--onnx", "FILE", "--builder-optimization-level", "9"], "--builder-optimization-level: Input should be less"),
        (["--onnx", "FILE", "--outputs", "polled"], "did you mean 'pooled'"),
        (["--onnx", "FILE", "--precision", "int8"], "int8 takes its ranges from real images; give --calibrate"),
        (["--onnx", "FILE", "--precision", "int8", "--calibrate", "no.yaml"], "no.yaml"),
        (["--timm", "resnet81"], "did you mean 'resnet18'"),
        (["--factory", "nowhere:f"], "nowhere"),
    ],
)  # fmt: skip
def test_invalid_option_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(linear_model(), "teacher.onnx")
    assert main(["build-engine", *("teacher.onnx" if word == "FILE" else word for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("kd-pipeline: ") and message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.engine"))
