"""`kd-pipeline predict`."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
    model = open_model_file(run, image_shape=(3, 32, 32), device=torch.device("cpu")).model
    wanted = list(predict(model, find_images([sky]), EVAL, device="cpu"))
    assert [line["image"] for line in lines] == [each.image for each in wanted]
    for line, each, text in zip(lines, wanted, printed, strict=True):
        assert [(top["label"], top["probability"]) for top in line["top"]] == each.top(2)
        (label, probability), _ = each.top(2)
        name = ("flower", "roof", "sky")[label]
        assert line["top"][0]["class"] == name and text.startswith(f"{each.image}: {name} {probability:.1%}, ")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_reader_that_has_seen_enough_ends_it_without_an_error(
    options: list[str], run: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(run), str(photo_folder / "sky"), "--device", "cpu", *options])
        assert ended.value.code == 141


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


def test_names_reach_the_terminal_as_plain_text(
    run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a file nor a class can write a line of its own, or give the terminal an order."""
    folder = shutil.copytree(run, tmp_path / "run")
    (exported,) = folder.rglob("model.json")
    exported.write_text(exported.read_text().replace('"flower"', '"\\u001b]0;x\\u0007"').replace('"sky"', '"a\\nb"'))
    good = next((photo_folder / "sky").iterdir())
    names = [b"\x1b[31mgood.jpg", b"no\xff\nimage.jpg", b"\xc2\x9bbad.jpg"]
    paths = [os.fsencode(tmp_path) + b"/" + name for name in names]
    shutil.copy(good, paths[0])
    for path in paths[1:]:
        Path(os.fsdecode(path)).write_bytes(b"no image")
    arguments = ["predict", str(folder), *map(os.fsdecode, paths), "--device", "cpu"]
    out = tmp_path / "out.jsonl"
    assert main([*arguments, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert text.replace("\n", "").isprintable()
    assert len(printed.out.splitlines()) == 1
    assert r"\x1b[31mgood.jpg: " in printed.out and r"\x1b]0;x\x07 " in printed.out and r"a\nb " in printed.out
    assert r"no\udcff\nimage.jpg cannot be read" in printed.err and r"\x9bbad.jpg cannot be read" in printed.err
    assert main([*arguments, "--json"]) == 1
    lines = capsys.readouterr().out
    assert lines.replace("\n", "").isprintable() and out.read_text() == lines
    found = [json.loads(line) for line in lines.splitlines()]
    assert [os.fsencode(line["image"]) for line in found] == paths
    assert {top["class"] for top in found[0]["top"]} == {"\x1b]0;x\x07", "roof", "a\nb"}


def test_out_is_a_file_and_no_link(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "link": "this is a link",
        "pipe": "this is a pipe",
        "none/out": "No such file",
        ".": "directory",
    }.items():
        arguments = ["predict", str(run), str(tmp_path / "a.jpg"), "--out", str(tmp_path / name), "--device", "cpu"]
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "cannot be written: " in error and reason in error and len(error.splitlines()) == 1
    assert (tmp_path / "victim").read_text() == "kept"


def test_what_is_no_file_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    reasons = {
        str(tmp_path / "pipe.jpg"): "this is a pipe and no file",
        str(tmp_path / "link.jpg"): "this is a pipe and no file",
        "/dev/zero": "this is a device and no file",
        str(tmp_path / "loop.jpg"): "it cannot be opened: Too many levels of symbolic links",
        str(tmp_path / ("x" * 300)): "it cannot be opened: File name too long",
        str(tmp_path / "pipe.jpg" / "below.jpg"): "the file does not exist",
    }
    assert main(["predict", str(run), *reasons, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    for name, reason in reasons.items():
        assert f"kd-pipeline: {name} cannot be read: {reason}" in error
    assert "6 of 6 images cannot be read" in error


def test_classes_of_pixels(photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their shares of each image, and files with their numbers."""
    settings = ModelSettings(timm="test_resnet", head="segmentation", num_classes=3)
    torch.manual_seed(2)
    export_student(
        open_model(settings).eval(),
        settings,
        tmp_path / "exported",
        classes=("flower", "roof", "sky"),
        transform=EvalTransform(size=[32, 48], resize=48),
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(onnx=False),
    )
    files = [*find_images([photo_folder / "sky"])[:3], *find_images([photo_folder / "sky"])[:1]]
    masks = tmp_path / "masks"
    assert main(["predict", str(tmp_path), *files, "--masks", str(masks), "--json", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({line["mask"] for line in lines}) == 4 and lines[3]["mask"] == f"{masks / Path(files[0]).stem}_2.png"
    for line in lines:
        with Image.open(line["mask"]) as picture:
            found = np.asarray(picture)
        assert found.shape == (32, 48) and "top" not in line
        for each in line["pixels"]:
            assert each["share"] == pytest.approx((found == each["label"]).mean())
            assert each["class"] == ("flower", "roof", "sky")[each["label"]]
        assert sum(each["share"] for each in line["pixels"]) == pytest.approx(1)
    assert main(["predict", str(tmp_path), files[0], "--device", "cpu"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("% of the pixels")


def test_masks_of_a_classifier_are_refused(
    run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image, *_) = find_images([photo_folder / "sky"])
    assert main(["predict", str(run), image, "--masks", str(tmp_path), "--device", "cpu"]) == 1
    assert "classifies whole images and not their pixels; leave it out" in capsys.readouterr().err
