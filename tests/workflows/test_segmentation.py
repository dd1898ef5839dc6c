"""Runs that learn the class of each pixel, from batches of the user's own."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_pipeline import BatchLoader
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.report.metrics_rows import read_metrics
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._check import CheckSettings, check
from kd_pipeline.workflows._compare import compare_files
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows._train import TrainResult, train
from tests.forks import Command, free_port, torchrun_variables
from tests.networks import PixelNet
from tests.shapes import CLASSES, IGNORED, draw_shapes, shape_tensors

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

ROWS = 16


def batches(num_images: int = 64, seed: int = 0, size: int = 32, **options: Any) -> BatchLoader:
    images, masks = shape_tensors(num_images, size, seed)
    pairs = list(zip(images.split(ROWS), masks.split(ROWS), strict=True))
    return BatchLoader(pairs, classes=CLASSES, device="cpu", **options)


def run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    stage: str = "distill",
    **objects: Any,
) -> TrainResult:
    settings = {
        "epochs": 2,
        "optimizer": {"lr": 0.01},
        "log_every_steps": 1,
        "loggers": ["csv"],
        "compare_with_teacher": stage == "distill",
        "export": {"onnx": False},
    }
    config = Config.model_validate({
        "run_dir": folder, "stage": stage, "distill": distill or {}, "train": settings | (changes or {}), "probe": None
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
    for seed in (10, 12):
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


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Their last batches are padded; the metrics are those of the whole split in one process."""
    export = {"epochs": 2, "loggers": ["csv"], "export": {"onnx": False}, "compare_with_teacher": True}
    config = by_name(tmp_path, TIMM, TIMM, train=export)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    port = free_port()
    ranks = [
        Command(["train", "-c", "config.yaml"], tmp_path, {**os.environ, **torchrun_variables(rank, 2, port=port)})
        for rank in range(2)
    ]
    for process in ranks:
        output, error = process.communicate()
        assert process.returncode == 0, output + error
    found = json.loads((tmp_path / "run" / "result.json").read_text())["val"]
    compared = compare_files(config, [tmp_path / "run"])
    (teacher, student) = (row.evaluation for row in compared.rows)
    assert found["confusion"] == [list(row) for row in student.confusion]
    assert (found["num_samples"], found["miou"], found["agreement"]) == (12, student.miou, student.agreement)
    assert found["teacher"]["miou"] == teacher.miou
    assert found["loss"] == pytest.approx(student.loss)


@pytest.mark.slow
def test_recorded_teacher_is_the_live_one(tmp_path: Path) -> None:
    """Bit by bit, as its logits of the pixels are kept in float32."""
    train_settings = {"epochs": 2, "loggers": ["csv"], "export": {"onnx": False}}
    network = open_model(ModelSettings.model_validate(TIMM), num_classes=len(CLASSES))
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    teacher = TIMM | {"checkpoint": str(tmp_path / "teacher.safetensors")}
    config = by_name(tmp_path, TIMM, teacher, train=train_settings, distill={"temperature": 1.0})
    record(config, RecordSettings(epochs=2, dtype="float32", out=tmp_path / "recording"))
    train(config)
    recorded = config.model_copy(
        update={
            "run_dir": tmp_path / "replayed",
            "teacher": TeacherSettings(path=str(tmp_path / "recording")),
        }
    )
    train(recorded)
    live, replayed = (load_file(tmp_path / name / "exported" / "model.safetensors") for name in ("run", "replayed"))
    assert live.keys() == replayed.keys() and all(torch.equal(live[name], replayed[name]) for name in live)
    with pytest.raises(ConfigError, match="--top-k keeps the largest logits of an image"):
        record(config, RecordSettings(epochs=1, top_k=2, out=tmp_path / "other"))


def test_student_of_images_on_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[2, 4\].*the teacher \[any, 4, 32, 32\]"):
        run(tmp_path / "run", student=small_resnet(4, width=4))
    with pytest.raises(ConfigError, match="choose a network for segmentation"):
        run(tmp_path / "run", student=small_resnet(4, width=4), teacher=None, distill=None, stage="baseline")


def test_classifier_on_data_with_labels_and_masks(tmp_path: Path) -> None:
    """It learns from the labels, and is measured by them."""
    images, masks = shape_tensors(32)
    fields = {"images": images, "masks": masks, "labels": masks.flatten(1).remainder(4).amax(1)}
    batch = [{name: each[start : start + ROWS] for name, each in fields.items()} for start in (0, ROWS)]
    loader = BatchLoader(batch, classes=CLASSES, device="cpu")
    result = run(
        tmp_path / "run",
        student=small_resnet(4, width=4),
        teacher=None,
        stage="baseline",
        train_batches=loader,
        validation=loader,
    )
    assert result.evaluations["val"].top1 is not None and result.evaluations["val"].miou is None


def test_validation_images_without_masks(tmp_path: Path) -> None:
    """What needs no masks is measured: the loss with the teacher, and how often both agree."""
    images, _ = shape_tensors(32, seed=1)
    validation = BatchLoader([(each,) for each in images.split(ROWS)], classes=CLASSES, device="cpu")
    found = run(tmp_path / "run", validation=validation).evaluations["val"]
    assert found.miou is None and found.agreement is not None and found.loss is not None
    assert found.loss == pytest.approx(0.9 * found.metrics["distill"])
    assert not (tmp_path / "run" / "predictions_val.png").exists()


@pytest.mark.slow
def test_mixed_precision_ema_and_accumulation(tmp_path: Path) -> None:
    changes = {"precision": "bf16-mixed", "ema": {"decay": 0.9}, "accumulate": 2, "channels_last": True}
    distill = {
        "skip_ignored": True,
        "label_smoothing": 0.1,
        "features": [{"loss": "channel_wise", "skip_ignored": True}],
    }
    found = run(tmp_path / "run", changes, distill).evaluations["val"]
    assert found.num_bad_rows == 0 and 0 < found.miou < 1
    columns = {name for _, row in read_metrics(tmp_path / "run" / "metrics.csv") for name in row}
    assert {"train/task", "train/distill", "train/channel_wise", "train/pixel_accuracy"} <= columns


@pytest.mark.slow
def test_student_sees_a_smaller_view(tmp_path: Path) -> None:
    """Which follows the images, so the masks fit: the logits are enlarged to them. One of its own window is refused."""
    data = write_arrays(tmp_path)
    for split in ("train", "val"):
        data[split]["views"] = {"small": {"follow": "images", "size": 32}}
    student = TIMM | {"view": "small"}
    found = train(by_name(tmp_path, student, TIMM, data=data)).evaluations["val"]
    assert found.num_samples == 12 and found.miou is not None and found.agreement is not None
    assert (tmp_path / "run" / "predictions_val.png").is_file()
    data["train"]["views"] = {"small": {"preset": "train", "size": 32}}
    own = by_name(tmp_path, student, TIMM, data=data, run_dir=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"data.train: masks show what `images` shows, and the view 'small'"):
        train(own)
