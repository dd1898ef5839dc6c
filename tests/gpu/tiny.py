"""Tiny runs on a GPU, or on the CPU to compare with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_pipeline.config.config import Config
from kd_pipeline.workflows._train import TrainResult, train
from tests import own_ops
from tests.training import networks
from tests.training.tiny_run import settings

PLUGINS = [networks.__name__, own_ops.__name__]


def run_on(device: str, digits: Path, folder: Path, **changes: Any) -> TrainResult:
    return train(config_on(device, digits, folder, **changes), plugins=PLUGINS)


def config_on(device: str, digits: Path, folder: Path, **changes: Any) -> Config:
    teacher = {
        "model": {"factory": "tests.training.networks:plain", "checkpoint": digits / "teacher.pt"},
        "precision": "fp32",
        "compile": False,
    }
    changes = {"data__device": device, "teacher": teacher, "train__export": {"onnx": False}, **changes}
    return settings(digits, str(folder), **changes)


def norm_of_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Relative to the norm of `second`."""
    difference, whole = (
        torch.stack([tensor.double().norm() for tensor in tensors]).norm()
        for tensors in ([first[name].double() - second[name].double() for name in second], second.values())
    )
    return float(difference / whole)
