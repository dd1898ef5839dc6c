"""Runs that learn the class of each pixel, from batches of the user's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline import BatchLoader
from kd_pipeline.config.config import Config
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.report.metrics_rows import read_metrics
from kd_pipeline.workflows._train import TrainResult, train
from tests.networks import PixelNet
from tests.shapes import CLASSES, IGNORED, shape_tensors

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
    assert (tmp_path / "run" / "predictions_val.png").is_file()


@pytest.mark.slow
def test_unet_gains_from_its_teacher(tmp_path: Path) -> None:
    """A student with the class of one pixel in a hundred, alone and with a teacher that has learned from all."""
    images, masks = shape_tensors(512)
    generator = torch.Generator().manual_seed(3)
    few = masks[:128].masked_fill(torch.rand(128, 32, 32, generator=generator) > 0.01, IGNORED)
    held_out = batches(96, seed=9)

    def fit(name: str, student: PixelNet, pixels: Tensor, rows: int, epochs: int, **distill: Any) -> float:
        pairs = list(zip(images[: len(pixels)].split(rows), pixels.split(rows), strict=True))
        config = Config.model_validate({
            "run_dir": tmp_path / name,
            "stage": "distill" if distill else "baseline",
            "distill": distill,
            "train": {
                "epochs": epochs,
                "optimizer": {"lr": 0.02},
                "schedule": {"warmup_epochs": epochs / 4},
                "num_threads": 1,
                "loggers": ["csv"],
                "export": {"onnx": False},
            },
            "probe": None,
        })  # fmt: skip
        loader = BatchLoader(pairs, classes=CLASSES, device="cpu")
        train(config, student=student, teacher=teacher if distill else None, train_batches=loader)
        found = evaluate(student, held_out).miou
        assert found is not None
        return found

    teacher = PixelNet(4, width=16, seed=1)
    taught = fit("teacher", teacher, masks, 16, 14)
    teacher.eval()
    for seed in (10, 11):
        alone = fit(f"alone{seed}", PixelNet(4, seed=seed), few, 8, 12)
        distilled = fit(f"with{seed}", PixelNet(4, seed=seed), few, 8, 12, temperature=1.0, distill_weight=1.0)
        assert alone + 0.02 < distilled < taught
