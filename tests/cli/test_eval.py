"""`kd-pipeline eval` puts models side by side, whatever they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_pipeline.cli import main
from kd_pipeline.engine import export_onnx
from kd_pipeline.models import ModelSettings, open_model
from kd_pipeline.training.export import export_student
from tests.models import IMAGE_SHAPE

CONFIG = """
data:
  batch_size: 8
  val:
    source: {{kind: image_folder, root: {root}}}
    transform: {{preset: eval, size: 32}}
"""


@pytest.fixture
def config(photo_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "photos.yaml"
    path.write_text(CONFIG.format(root=photo_folder), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is over."""
    settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    folder = tmp_path / "run"
    export_student(
        open_model(settings).eval(),
        settings,
        folder / "exported",
        image_shape=IMAGE_SHAPE,
        classes=("flower", "roof", "sky"),
        transform={},
    )
    return folder


def test_a_run_and_its_onnx_file_are_one_model(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    file = run / "exported" / "model.onnx"
    arguments = ["eval", "-c", str(config), str(run), str(file), "--teacher", str(file), "--metric", "CohenKappa"]
    assert main([*arguments, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures[str(run)]["num_samples"] == 37
    assert figures[str(run)]["top1"] == figures[str(file)]["top1"]
    assert figures[str(run)]["agreement"] == figures[str(file)]["agreement"] == 1
    assert str(run) in table and "ms/image" in table and "CohenKappa" in table


def test_a_teacher_may_be_the_folder_of_a_run(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "-c", str(config), str(run), "--teacher", str(run)]) == 0
    assert "100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.pt", "model.pt is neither the folder of a run nor an .onnx or .engine file"),
        (".", "is not the folder of a finished run: it has no exported/model.json"),
        ("nowhere.onnx", "nowhere.onnx: there is no such file"),
    ],
)
def test_what_is_no_model_is_one_message(
    config: Path, model: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    assert main(["eval", "-c", str(config), model]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_for_other_images_is_refused_with_both(
    config: Path, exported: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = open_model(ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4}))
    file = export_onnx(net, tmp_path / "large.onnx", image_shape=(3, 48, 48))
    assert main(["eval", "-c", str(config), str(file)]) == 1
    assert "48" in capsys.readouterr().err
    assert main(["eval", "-c", str(config), str(exported(0))]) == 1
    assert "class" in capsys.readouterr().err
