"""`kd-pipeline export`: each kind of model becomes a file that returns what the module does."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.cli import main
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.models.features import with_features
from kd_pipeline.models.input_adapter import InputAdapter, InputAdapterLayer
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows.exported import export_student

NETWORK = {"builtin": "small_resnet", "num_classes": 3, "kwargs": {"width": 4}}
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG = """
run_dir: runs/mine
data:
  batch_size: 8
  train:
    source: {{kind: image_folder, root: {root}}}
    transform: {{preset: train, size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
teacher: {teacher}
student: {{builtin: small_resnet, kwargs: {{width: 4}}}}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint() -> nn.Module:
    """A network whose weights are in `teacher.pt`."""
    torch.manual_seed(3)
    network = open_model(ModelSettings(**NETWORK)).eval()  # type: ignore[arg-type]
    torch.save(network.state_dict(), "teacher.pt")
    return network


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; read only."""
    settings = ModelSettings(**NETWORK)  # type: ignore[arg-type]
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("finished")
    export_student(
        open_model(settings).eval(),
        settings,
        folder / "exported",
        classes=("flower", "roof", "sky"),
        transform=EvalTransform(size=32),
        calibration_set=None,  # type: ignore[arg-type]
        export=ExportSettings(onnx=False),
    )
    return folder


def config(root: Path, teacher: str) -> str:
    Path("my.yaml").write_text(CONFIG.format(root=root, teacher=teacher))
    return "my.yaml"


def outputs_of(path: str, images: Tensor = IMAGES) -> dict[str, Tensor]:
    teacher = OnnxRuntimeTeacher(Path(path), precision=read_onnx(Path(path)).precision)
    return {name: output.clone() for name, output in teacher(images).items()}


@torch.no_grad()
def assert_same(path: str, module: nn.Module) -> None:
    torch.testing.assert_close(outputs_of(path)["logits"], module(IMAGES), rtol=1e-4, atol=1e-4)


def export(*arguments: str) -> int:
    return main(["export", *arguments])


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert export(*arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.slow
def test_network_by_name_with_a_checkpoint(checkpoint: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    factory = ["--factory", f"{__name__}:narrow", "--checkpoint", "teacher.pt"]
    assert export(*factory, "--image-size", "32", "-o", "made/teacher.onnx") == 0
    assert_same("made/teacher.onnx", checkpoint)
    printed = capsys.readouterr()
    for line in (
        "file     made/teacher.onnx, 0.",
        f"{sum(map(Tensor.numel, checkpoint.parameters())):,} parameters in fp32",
        "input    images [N, 3, 32, 32] float32",
        "output   logits [N, 3] float32",
        "check    equal to the module on 8 images (generated), in batches of 1, 3, 8",
        "use      teacher: {onnx: made/teacher.onnx}",
        "kd-pipeline build-engine --onnx made/teacher.onnx",
    ):
        assert line in printed.out
    assert "random weights" not in printed.err and "written in " in printed.err


def narrow() -> nn.Module:
    return open_model(ModelSettings(**NETWORK))  # type: ignore[arg-type]


@pytest.mark.slow
def test_random_weights_are_the_same_in_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert export("--builtin", "small_resnet", "--num-classes", "3", "--size", "32", "-o", f"{name}.onnx") == 0
    assert "small_resnet has random weights" in capsys.readouterr().err
    torch.testing.assert_close(outputs_of("one.onnx"), outputs_of("two.onnx"), rtol=0, atol=0)


@pytest.mark.slow
def test_network_without_a_head_and_layers_of_its_own() -> None:
    assert export("--timm", "test_resnet", "--num-classes", "0", "--size", "32x48") == 0
    file = read_onnx(Path("test_resnet.onnx"))
    assert file.outputs.keys() == {"pooled", "spatial"} and file.images.shape == (None, 3, 32, 48)
    assert export("--timm", "test_resnet", "--features", "layer2", "--size", "32", "-o", "layers.onnx") == 0
    torch.manual_seed(0)
    module = with_features(open_model(ModelSettings(timm="test_resnet")), ["layer2"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(outputs_of("layers.onnx"), dict(module(IMAGES)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_input_adapter_is_in_the_file(checkpoint: nn.Module) -> None:
    adapter = ["--input-mean", "0.5", "0.5", "0.5", "--input-std", "0.5", "0.5", "0.5", "--input-size", "16"]
    factory = ["--factory", f"{__name__}:narrow", "--checkpoint", "teacher.pt", "--image-size", "32"]
    assert export(*factory, *adapter, "-o", "teacher.onnx") == 0
    settings = InputAdapter(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=16)
    assert read_onnx(Path("teacher.onnx")).input_adapter == settings
    assert_same("teacher.onnx", nn.Sequential(InputAdapterLayer(settings), checkpoint))


@pytest.mark.slow
def test_half_precision_is_half_as_large(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(str(finished), "-o", "whole.onnx") == 0
    assert export(str(finished), "-o", "half.onnx", "--precision", "fp16") == 0
    whole, half = (read_onnx(Path(f"{name}.onnx")) for name in ("whole", "half"))
    assert (whole.precision, half.precision) == ("fp32", "fp16") and half.classes == whole.classes
    assert Path("half.onnx").stat().st_size < Path("whole.onnx").stat().st_size
    assert "check    top-1 as in float32 on 100.0 % of 64 images" in capsys.readouterr().out
    torch.testing.assert_close(outputs_of("half.onnx"), outputs_of("whole.onnx"), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_student_of_a_run(finished: Path, photo_folder: Path) -> None:
    network = open_model(ModelSettings(**NETWORK, checkpoint=finished / "exported" / "model.safetensors"))  # type: ignore[arg-type]
    assert export(str(finished), "-o", "run.onnx") == 0
    assert_same("run.onnx", network.eval())
    assert read_onnx(Path("run.onnx")).classes == ("flower", "roof", "sky")
    shutil.copytree(finished, "runs/mine")
    assert export("-c", config(photo_folder, "null"), "--part", "student", "--calibrate", "my.yaml") == 0
    assert_same("my_student.onnx", network.eval())


@pytest.mark.slow
def test_teacher_of_a_config(checkpoint: nn.Module, photo_folder: Path) -> None:
    network = "model: {builtin: small_resnet, num_classes: 3, kwargs: {width: 4}, checkpoint: teacher.pt}"
    path = config(photo_folder, f"{{{network}, input_adapter: {{mean: [0, 0, 0], std: [1, 1, 1]}}}}")
    assert export("-c", path) == 0
    adapter = InputAdapter(mean=(0, 0, 0), std=(1, 1, 1), from_mean=(0.5, 0.5, 0.5), from_std=(0.5, 0.5, 0.5))
    assert_same("my_teacher.onnx", nn.Sequential(InputAdapterLayer(adapter), checkpoint))
    assert read_onnx(Path("my_teacher.onnx")).input_adapter == adapter
    path = config(photo_folder, f"{{members: {{one: {{{network}}}, two: {{{network}}}}}}}")
    assert export("-c", path, "--member", "two") == 0
    assert_same("my_two.onnx", checkpoint)


@pytest.mark.slow
def test_existing_file_is_kept_without_force(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("model.onnx")
    file.write_text("mine")
    found = message(capsys, str(finished), "-o", "model.onnx")
    assert "model.onnx already exists; give another name with --out, or replace it with --force" in found
    assert file.read_text() == "mine"
    assert export(str(finished), "-o", "model.onnx", "--force") == 0
    assert read_onnx(file).outputs.keys() == {"logits"}


def test_link_and_folder_are_no_targets(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("elsewhere", "link.onnx")
    assert "link.onnx is a link" in message(capsys, str(finished), "-o", "link.onnx", "--force")
    assert "is a folder" in message(capsys, str(finished), "-o", ".", "--force")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of the folder of a run, -c CONFIG, --timm, --torchvision, --builtin, --factory, got none"),
        (["--timm", "resnet18", "--builtin", "small_resnet"], "got --timm and --builtin"),
        (["--features", "layer2", "mine"], "got none of them; --features takes every word up to the next option"),
        (["--timm", "resnet81"], "timm has no network called 'resnet81'; did you mean"),
        (["--timm", "test_resnet", "--checkpoint", "gone.pt"], "gone.pt"),
        (["--timm", "test_resnet", "--checkpoint", "teacher.pt"], "teacher.pt does not fit"),
        (["--timm", "test_resnet", "--part", "teacher"], "--part is for a model of a config"),
        (["--timm", "test_resnet", "--input-mean", "0.5", "0.5", "0.5"], "--input-mean and --input-std belong"),
        (["teacher.pt"], "teacher.pt is a checkpoint, which holds weights without the network; name the network too"),
        (["nowhere"], "nowhere is not the folder of a run; give such a folder"),
        (["."], "is not the folder of a finished run"),
        (["nowhere", "--checkpoint", "teacher.pt"], "--checkpoint is for a model by name"),
    ],
)
def test_bad_names_and_checkpoints_are_one_message(
    arguments: list[str], words: str, checkpoint: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in message(capsys, *arguments)
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize(
    ("teacher", "arguments", "words"),
    [
        ("null", [], "the config has no teacher"),
        ("{onnx: teacher.onnx}", [], "is a file already: teacher.onnx"),
        ("{path: recording}", [], "which holds no network"),
        ("{model: {builtin: small_resnet}}", [], "teacher.model has no weights"),
        ("{model: {builtin: small_resnet, pretrained: false}}", ["--member", "one"], "--member one is for several"),
        ("{members: {one: {onnx: 1.onnx}, two: {onnx: 2.onnx}}}", [], "export one at a time with --member one or two"),
        ("{members: {one: {onnx: 1.onnx}}}", ["--member", "ono"], "got 'ono'; did you mean 'one'?"),
        ("null", ["--part", "student"], "is not trained yet: runs/mine has no folder exported; train it first"),
    ],
)
def test_config_without_such_a_network_is_one_message(
    teacher: str, arguments: list[str], words: str, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in message(capsys, "-c", config(photo_folder, teacher), *arguments)


def test_classes_must_fit(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.json").write_text(json.dumps(["cat", "dog"]))
    assert "3 logits and got 2 class names" in message(capsys, str(finished), "--classes", "names.json")
