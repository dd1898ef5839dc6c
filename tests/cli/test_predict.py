"""`kd-pipeline predict`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd_pipeline.cli import main
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.evaluation._predict import find_images, predict
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows.exported import export_student, open_model_file

EVAL = EvalTransform(size=32, resize=48)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; do not change it."""
    settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(2)
    export_student(
        open_model(settings).eval(),
        settings,
        folder / "exported",
        classes=("flower", "roof", "sky"),
        transform=EVAL,
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(),
    )
    return folder


def test_prints_a_line_per_image(
    run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.jsonl"
    sky = photo_folder / "sky"
    assert main(["predict", str(run), str(sky), "--top", "2", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    model = open_model_file(run, size=32, device=torch.device("cpu")).model
    wanted = list(predict(model, find_images([sky]), EVAL, device="cpu"))
    assert [line["image"] for line in lines] == [each.image for each in wanted]
    for line, each, text in zip(lines, wanted, printed, strict=True):
        assert [(top["label"], top["probability"]) for top in line["top"]] == each.top(2)
        (label, probability), _ = each.top(2)
        name = ("flower", "roof", "sky")[label]
        assert line["top"][0]["class"] == name and text.startswith(f"{each.image}: {name} {probability:.1%}, ")


def test_run_and_its_onnx_file_agree(run: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = []
    for model in (run, run / "exported" / "model.onnx"):
        assert main(["predict", str(model), str(photo_folder), "--top", "1", "--json", "--device", "cpu"]) == 0
        predictions.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(predictions[0]) == 37
    for first, second in zip(*predictions, strict=True):
        assert first["image"] == second["image"] and first["top"][0]["class"] == second["top"][0]["class"]
        assert first["top"][0]["probability"] == pytest.approx(second["top"][0]["probability"], abs=1e-4)


def test_unreadable_image_is_named_and_skipped(
    run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    good = next((photo_folder / "sky").iterdir())
    arguments = [str(tmp_path / "bad.jpg"), str(good), str(tmp_path / "nowhere.png")]
    assert main(["predict", str(run), *arguments, "--json", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["image"] for line in lines] == arguments
    assert "problem" in lines[0] and "top" in lines[1] and lines[2]["problem"] == "the file does not exist"
    assert f"{tmp_path / 'bad.jpg'} cannot be read" in printed.err and "2 of 3 images cannot be read" in printed.err
    assert "Traceback" not in printed.err


def test_lone_file_takes_transform_of_config(
    exported: Callable[[int], Path], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sky = str(photo_folder / "sky")
    assert main(["predict", str(exported(0)), sky, "--device", "cpu"]) == 1
    assert "does not describe the preprocessing of its images; give the config" in capsys.readouterr().err
    config = tmp_path / "photos.yaml"
    source = f"{{kind: image_folder, root: {photo_folder}}}"
    config.write_text(
        f"data:\n  batch_size: 4\n  train: {{source: {source}, transform: {{preset: train, size: 32}}}}\n"
        f"  val: {{source: {source}, transform: {{preset: eval, size: 32}}}}\n"
    )
    assert main(["predict", str(exported(0)), sky, "-c", str(config), "--device", "cpu"]) == 0
    assert "class " in capsys.readouterr().out
    assert main(["predict", str(exported(0)), sky, "-c", str(config), "--split", "train", "--device", "cpu"]) == 1
    assert "the split train has a random transform" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt", "."], "model.pt is neither the folder of a run nor an .onnx or .engine file"),
        ([".", "."], "is not the folder of a finished run"),
        (["nowhere.onnx", "a.jpg", "--top", "0"], "--top: at least one class, got 0"),
    ],
)
def test_invalid_argument_is_one_message(
    run: Path,
    photo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(photo_folder)
    assert main(["predict", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
