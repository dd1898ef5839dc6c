"""The backbone demo: what a teacher of five digits knows reaches a student that sees all ten without labels."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.workflows.demo_backbone import run_backbone_demo

SHORT = ["epochs=10", "teacher_epochs=6"]


@pytest.mark.slow
def test_student_gets_the_features_of_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    summary = run_backbone_demo(["seed=1", "run_dir=runs/demo", *SHORT], report=lines.append)
    assert summary["student_knn_top1"] >= 0.9 * summary["teacher_knn_top1"]
    assert summary["student_knn_top1"] >= summary["start_knn_top1"] + 0.1
    assert summary["student_linear_top1"] >= summary["start_linear_top1"] + 0.1
    assert summary["teacher_knn_top1"] > 0.8
    assert json.loads(Path("runs/demo/summary.json").read_text()) == summary
    assert len(lines) == 3
    with Image.open(summary["neighbors"]) as picture:
        assert min(picture.size) > 400
    student = ModelSettings(builtin="small_resnet", num_classes=0, kwargs={"width": 4}, checkpoint=summary["student"])
    assert sum(parameter.numel() for parameter in open_model(student).parameters()) < 10_000


@pytest.mark.parametrize("override", ["epoch=3", "epochs=1", "seed=-1", "train.epochs=3"])
def test_wrong_override_is_named(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"override '{override}'"):
        run_backbone_demo([override])
    assert not any(tmp_path.iterdir())
