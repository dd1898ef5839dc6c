"""Networks and data for whole runs that take about a second, in the tests' own process."""

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_pipeline.config.config import Config
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.workflows._train import Outcome, train

Weights = dict[str, Tensor]

NUM_TRAIN, NUM_VAL = 96, 40
TRAIN = {"preset": "train", "size": 8, "area": [0.5, 1.0], "flip": 0.0}
EVAL = {"preset": "eval", "size": 8, "resize": 8}


def plain(num_classes: int = 10, width: int = 8) -> nn.Module:
    """Without BatchNorm, so that an image's gradient does not depend on its neighbors."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, num_classes)
    )


def normed(num_classes: int = 10, width: int = 8) -> nn.Module:
    """The same with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, num_classes),
    )


class Putting(nn.Module):
    """Uses an operation whose result may differ from run to run."""

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.zeros(2).put_(torch.tensor([0]), torch.tensor([0.0]))[0]


def putting(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(plain(num_classes), Putting())


computed_in: set[torch.dtype] = set()
"""In which `watched` networks have computed while they were trained."""


def watched(num_classes: int = 10) -> nn.Module:
    net = plain(num_classes)

    def watch(layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training:
            computed_in.add(output.dtype)

    net[0].register_forward_hook(watch)
    return net


class Clock:
    """Seconds that pass only where a `Timed` network lets them."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


CLOCK = Clock()


class Timed(nn.Sequential):
    """A `plain` network that takes so many seconds of `CLOCK` for a batch, in training by turns."""

    def __init__(self, num_classes: int, in_training_s: Iterable[float], in_eval_s: float) -> None:
        super().__init__(*plain(num_classes))
        self.in_training_s, self.in_eval_s = cycle(in_training_s), in_eval_s

    def forward(self, images: Tensor) -> Tensor:
        CLOCK.now_s += next(self.in_training_s) if self.training else self.in_eval_s
        return super().forward(images)


def timed_student(num_classes: int = 10) -> nn.Module:
    return Timed(num_classes, (1, 3), 100)


def timed_teacher(num_classes: int = 10) -> nn.Module:
    return Timed(num_classes, (), 3)


def write_digits(folder: Path) -> None:
    """`train.npz` and `val.npz` of 8x8 images, and a teacher that nobody has taught, `teacher.onnx`."""
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
        teacher = plain().eval()
    export_onnx(teacher, folder / "teacher.onnx", image_shape=(3, 8, 8))
    torch.save(teacher.state_dict(), folder / "teacher.pt")


def split(folder: Path, name: str, transform: Mapping[str, Any]) -> dict[str, Any]:
    """The images in `name.npz`."""
    return {"source": {"kind": "arrays", "images": folder / f"{name}.npz"}, "transform": transform}


def settings(folder: Path, run: str, **changes: Any) -> Config:
    """A run of two epochs on the digits in `folder`; `changes` replace keys, `train__clip=1.0` one within another."""
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
        "student": {"factory": "tests.training.nets:plain"},
        "probe": None,
        "train": {
            "epochs": 2,
            "optimizer": {"name": "sgd", "lr": 0.05},
            "schedule": {"kind": "constant"},
            "log_every_steps": 1,
            "loggers": ["csv"],
        },
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = found
        for key in path:
            place = place[key]
        place[last] = value
    return Config.model_validate(found)


def run(folder: Path, name: str, **changes: Any) -> Outcome:
    """Do it."""
    return train(settings(folder, name, **changes), plugins=[__name__])


def weights(folder: Path) -> Weights:
    """The student as a run has left it after its last step."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("student."): tensor for name, tensor in state.items() if name.startswith("student.")}


def distance(first: Weights, second: Weights) -> float:
    """The norm of the difference."""
    assert first.keys() == second.keys()
    return float(torch.stack([(first[name] - second[name]).double().norm() for name in first]).norm())


def logged(folder: Path) -> list[dict[str, float]]:
    """The lines of `metrics.csv`."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def result(folder: Path) -> dict[str, Any]:
    """What `result.json` says."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found
