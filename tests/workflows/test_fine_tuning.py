"""From a teacher's features to a classifier: the trunk that a run without labels exports is fine-tuned with labels."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd_pipeline.config.config import Config
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.workflows._train import train
from tests.runs import write_data

in_this_process = pytest.mark.filterwarnings("ignore:::lightning")
TEACHER = {"timm": "test_vit", "num_classes": 0, "kwargs": {"img_size": 32}}


def config_of(folder: Path, run: str, **changes: Any) -> Config:
    def split(name: str, transform: dict[str, Any]) -> dict[str, Any]:
        source = {"kind": "arrays", "images": folder / f"{name}.npz"}
        return {"source": source, "transform": {"size": 32, **transform}}

    train_transform = {"preset": "train", "area": [0.5, 1.0], "flip": 0.0}
    return Config.model_validate(
        {
            "seed": 3,
            "run_dir": folder / run,
            "data": {
                "batch_size": 32,
                "num_threads": 1,
                "device": "cpu",
                "train": split("train", train_transform),
                "val": split("val", {"preset": "eval", "resize": 32}),
            },
            "teacher": {
                "backend": "pytorch",
                "precision": "fp32",
                "model": TEACHER | {"checkpoint": folder / "teacher.pt"},
            },
            "student": {"timm": "test_resnet", "num_classes": 0},
            "probe": None,
            "train": {"epochs": 1, "log_every_steps": 2, "loggers": ["csv"], "export": {"onnx": False}},
            **changes,
        }
    )


@pytest.mark.slow
@in_this_process
def test_backbone_is_fine_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    write_data(tmp_path)
    torch.manual_seed(0)
    torch.save(trunk_of(open_model(ModelSettings.model_validate(TEACHER))).state_dict(), tmp_path / "teacher.pt")
    distilling = config_of(tmp_path, "distilled")
    first = distilling.train.model_copy(update={"select_by": "val/loss", "select_mode": "min"})
    train(distilling.model_copy(update={"train": first}))
    weights = tmp_path / "distilled" / "exported" / "model.safetensors"
    backbone = load_file(weights)
    classifier = open_model(ModelSettings(timm="test_resnet", num_classes=10)).state_dict()
    assert classifier.keys() - backbone.keys() == {"fc.weight", "fc.bias"}

    frozen = {"epochs": 1, "loggers": ["csv"], "export": {"onnx": False}, "optimizer": {"name": "sgd", "lr": 1e-12}}
    student = {"timm": "test_resnet", "checkpoint": weights}
    tuning = config_of(tmp_path, "tuned", stage="baseline", student=student, train=frozen)
    caplog.clear()
    result = train(tuning)
    assert "model.safetensors has no head: initialized fc at random" in caplog.text
    assert result.evaluations["val"].top1 is not None
    state = load_checkpoint(result.folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert state["student.fc.weight"].shape[0] == 10
    for name, tensor in backbone.items():  # it began with these weights, and a step of this size changes none
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(state[f"student.{name}"], tensor, rtol=1e-5, atol=1e-6)
