"""Runs that learn the class of each pixel, from batches of the user's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from kd_pipeline import BatchLoader
from kd_pipeline.config.config import Config
from kd_pipeline.report.metrics_rows import read_metrics
from kd_pipeline.workflows._train import TrainResult, train
from tests.networks import PixelNet
from tests.shapes import CLASSES, shape_tensors

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

ROWS = 16


def batches(num_images: int = 64, seed: int = 0, size: int = 32, **options: Any) -> BatchLoader:
    images, masks = shape_tensors(num_images, size, seed)
    pairs = list(zip(images.split(ROWS), masks.split(ROWS), strict=True))
    return BatchLoader(pairs, classes=CLASSES, device="cpu", **options)


def run(
    folder: Path, changes: dict[str, Any] | None = None, distill: dict[str, Any] | None = None, **objects: Any
) -> TrainResult:
    settings = {
        "epochs": 2,
        "optimizer": {"lr": 0.01},
        "log_every_steps": 1,
        "loggers": ["csv"],
        "compare_with_teacher": True,
        "export": {"onnx": False},
    }
    config = Config.model_validate({
        "run_dir": folder, "distill": distill or {}, "train": settings | (changes or {}), "probe": None
    })  # fmt: skip
    given = {
        "student": PixelNet(4, width=4),
        "teacher": PixelNet(4, width=8, seed=1),
        "train_batches": batches(),
        "validation": batches(32, seed=1),
    }
    return train(config, **(given | objects))


def test_run_ends_with_metrics_of_pixels(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    found = result.evaluations["val"]
    assert 0 < found.miou < found.pixel_accuracy < 1 and found.agreement is not None and found.teacher.miou is not None
    assert found.top1 is None and found.classes == CLASSES and len(found.class_iou) == 4
    columns = {name for _, row in read_metrics(tmp_path / "run" / "metrics.csv") for name in row}
    assert {"val/miou", "val/pixel_accuracy", "val/loss", "val/agreement", "train/pixel_accuracy"} <= columns
    assert "train/top1" not in columns and "val/top1" not in columns
    assert "mIoU" in result.lines[0] and "pixels" in result.lines[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["val"]["miou"] == found.miou
    assert (tmp_path / "run" / "confusion_val.png").is_file()
