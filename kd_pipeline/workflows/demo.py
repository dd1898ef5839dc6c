"""The demo: train a teacher on real handwritten digits, then a small student alone and distilled, on equal terms."""

import importlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import nn

from kd_pipeline._core.atomic_write import atomic_file, write_atomic
from kd_pipeline._core.optional import require
from kd_pipeline._core.progress import progress_bar, speed_text
from kd_pipeline._core.text import counted
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings

__all__ = ["run_demo", "write_digits"]

_TEACHER_WIDTH, _STUDENT_WIDTH = 32, 8
_FILES = f"{__package__}.demo_files"
_CONFIG, _LOOP = "digits.yaml", "distill.py"
_VALIDATION_STEP = 5
"""Every fifth image of each class is kept for validation."""


def run_demo(overrides: Sequence[str] = (), *, report: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Write the data, train teacher and students, and return the contents of `<run_dir>/summary.json`.

    The loop and its config are copied to `run_dir`, to be edited; copies that are there already stay as they are.

    Args:
        overrides: of `configs/digits.yaml`.
        report: called with a line before each part.

    Raises:
        ConfigError: an override is wrong.
        MissingPackageError: an extra is missing.
    """
    with resources.as_file(resources.files(_FILES) / _CONFIG) as path:
        config = load_config(path, overrides)
    run_dir = config.run_dir or Path("runs/demo")
    loop = importlib.import_module(f"{_FILES}.{Path(_LOOP).stem}")
    # Images this small are not worth several threads, which would mostly wait for each other and for DALI's.
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_train, num_val = write_digits(Path("data/digits"))
    networks: dict[str, nn.Module] = {}

    def train(name: str, width: int, teacher: Teacher | None) -> float:
        num_epochs = config.train.epochs
        report(f"training the {name}: {num_train:,} images, {counted(num_epochs, 'epoch')}")
        began = time.perf_counter()
        networks[name], images_per_s = _train(config, loop, width, teacher, name)
        report(f"  {time.perf_counter() - began:.1f} s, {speed_text(images_per_s)}")
        return images_per_s

    train("teacher", _TEACHER_WIDTH, None)
    report("exporting the teacher and opening it in its runtime")
    with closing(_open_teacher(networks["teacher"], config, run_dir)) as teacher:
        train("student alone", _STUDENT_WIDTH, None)
        images_per_s = train("student with its teacher", _STUDENT_WIDTH, teacher)
        report(f"evaluating all three on {num_val:,} images")
        scores = {name: _evaluate(config, loop, network, teacher) for name, network in networks.items()}
        grid = _draw_batch(config, teacher, run_dir / "train_batch.png")
        summary = {
            "teacher_top1": scores["teacher"][0],
            "student_alone_top1": scores["student alone"][0],
            "student_distilled_top1": scores["student with its teacher"][0],
            "agreement": scores["student with its teacher"][1],
            "agreement_alone": scores["student alone"][1],
            "images_per_s": images_per_s,
            "teacher_backend": teacher.backend,
            "teacher_precision": teacher.precision,
            "device": str(teacher.device),
            "seed": config.seed,
            "epochs": config.train.epochs,
            "num_train": num_train,
            "num_val": num_val,
            "seconds": time.perf_counter() - started,
            "grid": str(grid),
            "loop": str(_copy(_LOOP, run_dir)),
            "config": str(_copy(_CONFIG, run_dir)),
        }
    write_atomic(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def write_digits(root: Path) -> tuple[int, int]:
    """Write scikit-learn's 1,797 handwritten digits as 32x32 PNG files to `root`, unless they exist.

    Every fifth image of each class, in scikit-learn's order, goes to `val` and the rest to `train`.

    Returns:
        Number of training and of validation images.
    """
    digits = require("sklearn.datasets", extra="demo").load_digits()
    counts = {"train": 0, "val": 0}
    num_seen = [0] * 10
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if num_seen[label] % _VALIDATION_STEP == 0 else "train"
        num_seen[label] += 1
        counts[split] += 1
        path = root / split / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * 255 / 16).round().astype("uint8"))
            with atomic_file(path) as file:
                image.resize((32, 32), Image.Resampling.BICUBIC).save(file, format="PNG")
    return counts["train"], counts["val"]


def _train(config: Config, loop: ModuleType, width: int, teacher: Teacher | None, name: str) -> tuple[nn.Module, float]:
    """A network trained by the loop of demo_files/distill.py, and its images per second."""
    torch.manual_seed(config.seed)
    with KDDataLoader.from_config(config, "train", teacher=teacher) as loader:
        network = small_resnet(len(loader.classes or ()), width=width).to(loader.device)
        num_images = config.train.epochs * len(loader) * loader.batch_size
        num_done = 0
        started = time.perf_counter()
        with progress_bar(name) as report:

            def advance(images: int, loss: float) -> None:
                nonlocal num_done
                num_done += images
                report(num_done, num_images)

            loop.fit(network, loader, config.train, config.distill, advance)
        return network, num_images / (time.perf_counter() - started)


def _open_teacher(network: nn.Module, config: Config, run_dir: Path) -> Teacher:
    """The trained teacher in the backend that fits the device: as an ONNX file on a CPU, as a module on a GPU."""
    settings = config.teacher or TeacherSettings()
    shape = config.data.split("train").transform.image_shape
    device = next(network.parameters()).device
    classes = tuple(str(digit) for digit in range(10))
    path = export_onnx(network, run_dir / "teacher.onnx", image_shape=shape, classes=classes)
    if device.type == "cpu":
        return open_teacher(settings.model_copy(update={"onnx": path}), image_shape=shape)
    return open_teacher(settings.model_copy(update={"onnx": None}), module=network, image_shape=shape, device=device)


def _evaluate(config: Config, loop: ModuleType, network: nn.Module, teacher: Teacher) -> tuple[float, float]:
    """Top-1 on the validation images, and agreement with the teacher's top-1."""
    with KDDataLoader.from_config(config, "val", teacher=teacher) as loader:
        scores: tuple[float, float] = loop.evaluate(network, loader)
        return scores


def _draw_batch(config: Config, teacher: Teacher, path: Path) -> Path:
    """The first training batch as teacher and student get it."""
    with KDDataLoader.from_config(config, "train", teacher=teacher) as loader:
        return save_grid(next(iter(loader)), path, transform=loader.transform, classes=loader.classes)


def _copy(name: str, folder: Path) -> Path:
    """A copy in `folder` of a file of the demo, or what the user has made of an earlier one."""
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (resources.files(_FILES) / name).read_bytes())
    return path
