"""`kd-pipeline check`."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd_pipeline.cli import main
from tests.corpus import photo_of


@pytest.fixture
def folder(photos: Any, tmp_path: Path) -> Path:
    """A folder with `run.yaml` and photographs of two classes."""
    for number in range(20):
        path = tmp_path / "images" / ("flower" if number < 12 else "roof") / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo_of(photos)[number:]).save(path)
    (tmp_path / "run.yaml").write_text(
        f"""
run_dir: {tmp_path}/run
data:
  batch_size: 4
  device: cpu
  train:
    source: {{kind: image_folder, root: {tmp_path}/images}}
    transform: {{preset: train, size: 32}}
"""
    )
    return tmp_path


def test_sound_config_exits_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", str(folder / "run.yaml")]) == 0
    titles, train, picture, verdict = capsys.readouterr().out.splitlines()
    assert titles.split() == ["split", "images", "decoded", "unreadable", "classes", "of", "each", "images/s"]
    assert train.split()[:6] == ["train", "20", "20", "0", "2", "8-12"]
    assert picture.endswith("run/check/train_batch.png") and verdict == "no problems"
    assert json.loads((folder / "run" / "check" / "check.json").read_text())["problems"] == []


def test_unreadable_files_exit_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        (folder / "images" / "roof" / f"broken_{number:02}.jpg").write_bytes(b"\xff\xd8" if number else b"")
    assert main(["check", "-c", str(folder / "run.yaml")]) == 1
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("train: ")]
    assert "broken_00.jpg (0 bytes): the file is empty" in named[0]
    assert len(named) == 11 and named[-1] == "train: and 2 more"
    table = lines[lines.index("       where       what was found, and what to do") + 1 :]
    assert table[0].startswith("error  data.train  12 of 32 images cannot be read, and the first one ends a run")
    assert table[-2:] == ["", "1 problem: a training would stop, or be wrong"]


def test_every_part_has_its_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.new("RGB", (60, 50), (9, 9, 9)).save(folder / "images" / "roof" / f"uniform_{number}.png")
    overrides = [
        f"data.val={{source: {{kind: image_folder, root: {folder}/gone}}, transform: {{preset: eval, size: 32}}}}",
        "data.val.transform.mean=[0.5, 0.5, 0.5]",
        f"teacher={{onnx: {folder}/gone.onnx}}",
        f"student={{builtin: small_resnet, checkpoint: {folder}/gone.pt}}",
    ]
    assert main(["check", "-c", str(folder / "run.yaml"), *overrides]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    table = lines[lines.index("       where       what was found, and what to do") + 1 : -2]
    assert [line.split()[1] for line in table if line.startswith("error")] == [
        "config",
        "data.train",
        "data.val",
        "teacher",
        "student",
    ]
    assert max(map(len, table)) <= 120 and "Traceback" not in printed.err
    text = " ".join(" ".join(table).split())
    for part in ("a single color in 3 of 23 images: sample 20", "gray 9", "gone.onnx", "gone.pt"):
        assert part in text
    assert lines[-1] == "5 problems: a training would stop, or be wrong"
    report = json.loads((folder / "run" / "check" / "check.json").read_text())
    assert [row["where"] for row in report["findings"]] == ["config", "data.train", "data.val", "teacher", "student"]
    assert len(report["splits"][0]["uniform"]) == 3


def test_notes_alone_exit_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images" / "roof" / "notes.xyz").write_text("not an image")
    assert main(["check", "-c", str(folder / "run.yaml")]) == 0
    captured = capsys.readouterr()
    assert "note   data.train  " in captured.out and captured.out.splitlines()[-1] == "no problems"
    assert "notes.xyz" not in captured.err  # a warning of the library stands in the table only


def test_options_and_overrides_reach_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", "5", "--out", str(folder / "findings"), "data.batch_size=2"]
    assert main(["check", "-c", str(folder / "run.yaml"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:3] == ["20", "6"]
    assert (folder / "findings" / "train_batch.png").is_file() and not (folder / "run").exists()


def test_invalid_value_names_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", str(folder / "run.yaml"), "--images", "few"]) == 1
    assert "--images" in capsys.readouterr().err
