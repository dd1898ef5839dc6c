"""Whole runs that take about a second, in the test's own process, and what they leave in their folders."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from kd_pipeline.config.config import Config
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.workflows import results
from kd_pipeline.workflows._train import TrainResult, train
from tests.training import networks

Weights = dict[str, Tensor]

NUM_TRAIN, NUM_VAL = 96, 40
WITH_ONNX = {"train__export": {"onnx": True}}
"""For `settings`, whose runs otherwise export no ONNX file: that takes longer than their training."""
TRAIN = {"preset": "train", "size": 8, "area": [0.5, 1.0], "flip": 0.0}
EVAL = {"preset": "eval", "size": 8, "resize": 8}


def write_digits(folder: Path) -> None:
    """Write `train.npz` and `val.npz` with images of 8x8, and `teacher.onnx`, an untrained teacher."""
    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    end = NUM_TRAIN + NUM_VAL
    np.savez(folder / "train.npz", images=images[:NUM_TRAIN], labels=digits.target[:NUM_TRAIN])
    np.savez(folder / "val.npz", images=images[NUM_TRAIN:end], labels=digits.target[NUM_TRAIN:end])
    np.savez(folder / "unlabeled.npz", images=images[:NUM_TRAIN])
    for size in (19, 67):
        np.savez(folder / f"odd{size}.npz", images=images[:size], labels=digits.target[:size])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        teacher = networks.plain().eval()
    export_onnx(teacher, folder / "teacher.onnx", image_shape=(3, 8, 8))
    torch.save(teacher.state_dict(), folder / "teacher.pt")


def split(folder: Path, name: str, transform: Mapping[str, Any]) -> dict[str, Any]:
    """The images in `name.npz`."""
    return {"source": {"kind": "arrays", "images": folder / f"{name}.npz"}, "transform": {**transform}}


def settings(folder: Path, run: str, **changes: Any) -> Config:
    """A run of two epochs on the digits in `folder`; `changes` replace keys, nested ones as `train__clip=1.0`."""
    found: dict[str, Any] = {
        "seed": 3,
        "run_dir": folder / run,
        "data": {
            "batch_size": 16,
            "num_threads": 1,
            "device": "cpu",
            "train": split(folder, "train", TRAIN),
            "val": split(folder, "val", EVAL),
        },
        "teacher": {"onnx": folder / "teacher.onnx", "backend": "onnxruntime"},
        "student": {"factory": "tests.training.networks:plain"},
        "probe": None,
        "train": {
            "epochs": 2,
            "optimizer": {"name": "sgd", "lr": 0.05},
            "schedule": {"kind": "constant"},
            "log_every_steps": 1,
            "loggers": ["csv"],
            "export": {"onnx": False},
        },
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = found
        for key in path:
            place = place[key]
        place[last] = value
    return Config.model_validate(found)


def run(folder: Path, name: str, **changes: Any) -> TrainResult:
    return train_without_plots(settings(folder, name, **changes))


def train_without_plots(config: Config) -> TrainResult:
    """Train; to draw what came of it would take as long again."""
    with mock.patch.object(results, "_plot"):
        return train(config, plugins=[networks.__name__])


def weights(folder: Path) -> Weights:
    """The student after the last step of a run."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("student."): tensor for name, tensor in state.items() if name.startswith("student.")}


def distance(first: Weights, second: Weights) -> float:
    """The norm of the difference."""
    assert first.keys() == second.keys()
    return float(torch.stack([(first[name] - second[name]).double().norm() for name in first]).norm())


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.csv`."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def result(folder: Path) -> dict[str, Any]:
    """The contents of `result.json`."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found
