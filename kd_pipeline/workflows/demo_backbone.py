"""The backbone demo: a teacher that knows five digits; a student learns its features from all ten, without labels."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn
from torch.nn.functional import normalize

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.settings import Settings
from kd_pipeline.config.config import Config
from kd_pipeline.config.reader import read_values
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.evaluation.frozen import Features, extract_features, knn_top1, linear_top1
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.report.neighbors import save_neighbors
from kd_pipeline.workflows._distill import distill
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.demo import write_digits
from kd_pipeline.workflows.exported import WEIGHTS

__all__ = ["run_backbone_demo"]

_DATA = Path("data/digits")
_SIZE = 32
_TEACHER_WIDTH, _STUDENT_WIDTH = 32, 4
_TAUGHT = range(5)
"""The digits whose labels the teacher learns."""
_NUM_NEIGHBORS = 5
_TITLES = {"teacher": "teacher", "start": "student at the start", "student": "student distilled"}
"""In the picture."""
_TRANSFORM = {"preset": "train", "size": _SIZE, "area": [0.5, 1.0], "flip": 0.0}
_TRAIN = {
    "optimizer": {"name": "adamw", "lr": 1e-2},
    "schedule": {"kind": "cosine", "warmup_epochs": 1},
    "num_threads": 1,  # for so small a network, more threads cost more time than they save
    "loggers": ["csv"],
    "export": {"onnx": False},
}


class _DemoSettings(Settings):
    """What can be changed about the demo."""

    seed: int = Field(default=17, ge=0, lt=2**64)
    run_dir: Path = Path("runs/demo_backbone")
    epochs: int = Field(default=20, ge=2)
    """Of the student."""
    teacher_epochs: int = Field(default=8, ge=2)


def run_backbone_demo(
    overrides: Sequence[str] = (), *, report: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """Write the data, train teacher and student, and return the contents of `<run_dir>/summary.json`.

    Args:
        overrides: of `seed`, `run_dir`, `epochs` and `teacher_epochs`, each `key=value`.
        report: called with a line before each part.

    Raises:
        ConfigError: an override is wrong.
        MissingPackageError: an extra is missing.
    """
    settings = read_values(_DemoSettings, {}, overrides, name="demo backbone")
    started = time.perf_counter()
    num_train, num_val = write_digits(_DATA)
    report(f"a teacher learns the labels of the digits 0 to {_TAUGHT[-1]}")
    weights = _train_teacher(settings)
    report(f"a student learns the teacher's features from {num_train} images of all ten digits, without labels")
    student = _distill(settings, weights)
    report("k-NN and linear probe on the features of all ten digits")
    networks = _networks(settings.seed, weights, student)
    features = {name: _features(network) for name, network in networks.items()}
    summary = {
        **{f"{name}_knn_top1": knn_top1(*found) for name, found in features.items()},
        **{f"{name}_linear_top1": linear_top1(*found) for name, found in features.items()},
        "seed": settings.seed,
        "epochs": settings.epochs,
        "num_train": num_train,
        "num_val": num_val,
        "seconds": time.perf_counter() - started,
        "student": str(student),
        "neighbors": str(_draw_neighbors(features, settings.run_dir / "neighbors.png")),
    }
    write_atomic(settings.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _train_teacher(settings: _DemoSettings) -> Path:
    """The weights of a classifier of five digits."""
    run_dir = settings.run_dir / "teacher"
    splits = {
        "train": {"source": _taught("train", run_dir), "transform": _TRANSFORM},
        "val": {"source": _taught("val", run_dir), "transform": {"preset": "eval", "size": _SIZE, "resize": _SIZE}},
    }
    values = {
        "seed": settings.seed,
        "run_dir": str(run_dir),
        "stage": "baseline",
        "data": {"batch_size": 64, **splits},
        "student": {"builtin": "small_resnet", "kwargs": {"width": _TEACHER_WIDTH}},
        "train": {**_TRAIN, "epochs": settings.teacher_epochs},
    }
    config = read_values(Config, values, name="demo backbone")
    return train(config, fresh=True).folder / "exported" / WEIGHTS


def _taught(split: str, folder: Path) -> dict[str, Any]:
    """The source of the digits whose labels the teacher learns."""
    paths = [path for digit in _TAUGHT for path in sorted((_DATA / split / str(digit)).glob("*.png"))]
    rows = "".join(f"{path.relative_to(_DATA)},{path.parent.name}\n" for path in paths)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{split}.csv", rows)
    return {"kind": "file_list", "path": str(folder / f"{split}.csv"), "root": str(_DATA)}


def _distill(settings: _DemoSettings, teacher: Path) -> Path:
    """The weights of the student."""
    transform = {name: value for name, value in _TRANSFORM.items() if name != "preset"}
    # Digits are gray, and neither mirrored nor cropped to a seventh.
    transform |= {"brightness": 0.2, "contrast": 0.2, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
    values = {
        "seed": settings.seed,
        "data.batch_size": 64,
        "data.val.transform.resize": _SIZE,
        "teacher.model.kwargs.width": _TEACHER_WIDTH,
        "student.kwargs.width": _STUDENT_WIDTH,
        "train.precision": "32-true",
        **{f"data.train.transform.{name}": value for name, value in transform.items()},
        **{f"train.{key}": value for key, value in _TRAIN.items()},
    }
    run = distill(
        "builtin:small_resnet",
        "builtin:small_resnet",
        _DATA / "train",
        epochs=settings.epochs,
        out=settings.run_dir / "student",
        teacher_weights=teacher,
        overrides=[f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()],
        fresh=True,
    )
    return run.folder / "exported" / WEIGHTS


def _networks(seed: int, teacher: Path, student: Path) -> dict[str, nn.Module]:
    """The networks to compare, without their heads; the random one is the student as its run began."""
    wide, narrow = (
        {"builtin": "small_resnet", "num_classes": 0, "kwargs": {"width": width}}
        for width in (_TEACHER_WIDTH, _STUDENT_WIDTH)
    )
    torch.manual_seed(seed % 2**63)
    start = open_model(ModelSettings(**narrow))
    return {
        "teacher": open_model(ModelSettings(**wide, checkpoint=teacher)),
        "start": start,
        "student": open_model(ModelSettings(**narrow, checkpoint=student)),
    }


def _features(network: nn.Module) -> tuple[Features, Features]:
    """Features of the labeled images: those for training are the bank, those for validation the queries."""
    bank, queries = (_features_of(network, split) for split in ("train", "val"))
    return bank, queries


def _features_of(network: nn.Module, split: str) -> Features:
    transform = EvalTransform(size=_SIZE, resize=_SIZE)
    source = ImageFolder(_DATA / split)
    with KDDataLoader(source, transform, batch_size=128, shuffle=False, device="cpu") as loader:
        return extract_features(network, loader)


def _draw_neighbors(features: dict[str, tuple[Features, Features]], path: Path) -> Path:
    """For one image of each digit, its nearest neighbors."""
    bank, queries = ImageFolder(_DATA / "train"), ImageFolder(_DATA / "val")
    labels = next(iter(features.values()))[1].labels
    rows = torch.tensor([int((labels == digit).nonzero()[0]) for digit in labels.unique()])  # type: ignore[no-untyped-call]
    neighbors = {}
    for name, (known, asked) in features.items():
        cosine_QN = normalize(asked.features[rows], dim=1) @ normalize(known.features, dim=1).T
        nearest_QK = cosine_QN.topk(_NUM_NEIGHBORS, dim=1).indices
        images = np.stack([_read(bank, known.index[nearest_K]) for nearest_K in nearest_QK])
        is_alike_QK = known.labels[nearest_QK] == labels[rows][:, None]
        neighbors[_TITLES[name]] = images, is_alike_QK.numpy()
    return save_neighbors(_read(queries, features["teacher"][1].index[rows]), neighbors, path)


def _read(source: ImageFolder, index: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The images at these positions of the dataset, `[N, H, W, 3]`."""
    return np.stack([np.asarray(Image.open(source.name(row)).convert("RGB")) for row in index.tolist()])
