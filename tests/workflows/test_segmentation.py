"""Runs that learn the class of each pixel, from batches of the user's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline import BatchLoader
from kd_pipeline.config.config import Config
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.report.metrics_rows import read_metrics
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._check import CheckSettings, check
from kd_pipeline.workflows._compare import compare_files
from kd_pipeline.workflows._train import TrainResult, train
from tests.networks import PixelNet
from tests.shapes import CLASSES, IGNORED, draw_shapes, shape_tensors

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


def write_arrays(folder: Path, num_images: int = 12, size: int = 64) -> dict[str, Any]:
    """The section `data` of a config, with images and masks in files."""
    found: dict[str, Any] = {"batch_size": 4, "device": "cpu"}
    for split, preset in (
        ("train", {"preset": "train", "area": [0.5, 1.0]}),
        ("val", {"preset": "eval", "resize": size}),
    ):
        images, masks = draw_shapes(num_images, size, seed=len(split))
        np.save(folder / f"{split}.npy", images)
        np.save(folder / f"{split}_masks.npy", masks)
        source = {"kind": "arrays", "images": str(folder / f"{split}.npy"), "classes": list(CLASSES)}
        source["masks"] = {"path": str(folder / f"{split}_masks.npy")}
        found[split] = {"source": source, "transform": preset | {"size": size}}
    return found


def by_name(folder: Path, student: dict[str, Any], teacher: dict[str, Any], **changes: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": folder / "run",
            "data": write_arrays(folder),
            "student": student,
            "teacher": {"model": teacher | {"pretrained": False, "num_classes": len(CLASSES)}},
            "train": {
                "epochs": 1,
                "compare_with_teacher": True,
                "log_every_steps": 1,
                "loggers": ["csv"],
                "export": {"onnx": False},
            },
        }
        | changes
    )


TIMM = {"timm": "test_resnet", "head": "segmentation"}
LRASPP = {"torchvision": "lraspp_mobilenet_v3_large"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "distill"),
    [
        (TIMM, LRASPP, {}),
        (LRASPP, {"torchvision": "deeplabv3_resnet50"}, {"loss": "hard_label", "skip_ignored": True}),
        (
            {"torchvision": "fcn_resnet50"},
            TIMM,
            {"loss": None, "task_weight": 1.0, "features": [{"loss": "channel_wise", "skip_ignored": True}]},
        ),
    ],
    ids=["timm from lraspp", "lraspp from deeplabv3", "fcn from timm"],
)
def test_networks_by_name(student: dict, teacher: dict, distill: dict, tmp_path: Path) -> None:
    config = by_name(tmp_path, student, teacher, distill=distill)
    checked = check(config, CheckSettings(out=tmp_path / "check"))
    assert [finding for finding in checked.findings if finding.severity == "error"] == []
    found = train(config).evaluations["val"]
    assert found.num_samples == 12 and 0 <= found.miou <= 1 and found.agreement is not None
    assert (tmp_path / "run" / "predictions_val.png").is_file()


@pytest.mark.slow
def test_teacher_is_trained_then_exported_and_teaches(tmp_path: Path) -> None:
    """`stage: all`, whose student, as an ONNX file, teaches the next one by another runtime, and is compared."""
    export = {"epochs": 1, "loggers": ["csv"], "export": {"onnx": True}}
    config = by_name(tmp_path, TIMM, TIMM | {"kwargs": {"head_width": 32}}, stage="all", train=export)
    train(config)
    onnx = tmp_path / "run" / "exported" / "model.onnx"
    changes = {"run_dir": tmp_path / "second", "teacher": TeacherSettings(onnx=onnx), "stage": "distill"}
    second = config.model_copy(update=changes)
    found = train(second).evaluations["val"]
    assert found.teacher.miou is not None
    compared = compare_files(second, [tmp_path / "second", onnx])
    assert [row.evaluation.miou is not None for row in compared.rows] == [True, True, True]
    assert "mIoU" in compared.table()
