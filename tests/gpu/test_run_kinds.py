"""Runs on a GPU of kinds that take other ways there: pixels, several students, proofs and reports of a run."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from kd_pipeline.config.config import Config
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.training.hardware_counters import GpuCounters
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.reporting.report import write_report
from kd_pipeline.workflows.verification.verify import VerifySettings, verify
from tests import networks as larger
from tests.gpu.tiny import PLUGINS, config_on, norm_of_difference, run_on
from tests.shapes import CLASSES, draw_shapes
from tests.training import networks
from tests.training.tiny_run import logged, weights, write_digits

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]

DEVICE = "cuda"
NETWORKS = networks.__name__
PIXEL_NET = f"{larger.__name__}:PixelNet"
SIZE = 32


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a teacher; tests may add runs."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section `data` of a config, with masks that have ignored pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    torch.save(larger.PixelNet(len(CLASSES)).state_dict(), folder / "teacher.pt")
    found: dict[str, Any] = {"batch_size": 8, "device": DEVICE, "num_threads": 2}
    for split, transform in (
        ("train", {"preset": "train", "area": [0.5, 1.0], "affine": {"rotate": 20}}),
        ("val", {"preset": "eval", "resize": SIZE}),
    ):
        images, masks = draw_shapes(24, SIZE, seed=len(split))
        np.save(folder / f"{split}.npy", images)
        np.save(folder / f"{split}_masks.npy", masks)
        source = {"kind": "arrays", "images": folder / f"{split}.npy", "classes": CLASSES}
        found[split] = {"source": {**source, "masks": {"path": folder / f"{split}_masks.npy"}}}
        found[split]["transform"] = {**transform, "size": SIZE}
    return found


@pytest.fixture
def algorithms_restored() -> Iterator[None]:
    """A deterministic run changes those of the process."""
    yield
    torch.use_deterministic_algorithms(False)


CHANNELS = {"loss": "channel_wise", "options": {"over": "channels"}, "skip_ignored": True}
OF_PIXELS: dict[str, dict[str, Any]] = {
    "pixels": {"distill": {"loss": "soft_target", "skip_ignored": True}},
    "bf16": {"train": {"precision": "bf16-mixed", "compare_with_teacher": True}},
    "compiled": {"train": {"compile": True}, "distill": {"loss": None, "task_weight": 1.0, "features": [CHANNELS]}},
    "deterministic": {"train": {"deterministic": True}, "distill": {"loss": "dkd", "label_smoothing": 0.1}},
}


@pytest.mark.usefixtures("algorithms_restored")
@pytest.mark.parametrize("changes", OF_PIXELS.values(), ids=OF_PIXELS)
def test_segmentation_learns(shapes: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"epochs": 2, "log_every_steps": 1, "loggers": ["csv"], "export": {"onnx": False}}
    checkpoint = Path(shapes["train"]["source"]["images"]).with_name("teacher.pt")
    teacher = {"model": {"factory": PIXEL_NET, "checkpoint": checkpoint}, "backend": "pytorch"}
    config = Config.model_validate({
        "run_dir": tmp_path / "run",
        "data": shapes,
        "student": {"factory": PIXEL_NET, "num_classes": len(CLASSES), "kwargs": {"width": 4}},
        "teacher": {**teacher, "compile": False, "precision": "fp32"},
        "distill": changes.get("distill", {}),
        "probe": None,
        "train": {**settings, "optimizer": {"lr": 0.02}, **changes.get("train", {})},
    })  # fmt: skip
    found = train(config, plugins=[larger.__name__]).evaluations["val"]
    assert found.miou is not None and 0 < found.miou < 1 and found.agreement is not None
    rows = [row for row in logged(tmp_path / "run") if "train/loss" in row]
    assert rows[-1]["train/task"] < rows[0]["train/task"]
    assert (tmp_path / "run" / "predictions_val.png").is_file()


@pytest.mark.usefixtures("algorithms_restored")
def test_head_of_timm_is_deterministic(shapes: dict[str, Any], tmp_path: Path) -> None:
    """Its decoder enlarges maps, for which torch has another way then."""
    pytest.importorskip("timm")
    settings = {"epochs": 1, "deterministic": True, "loggers": ["csv"], "export": {"onnx": False}}
    config = Config.model_validate({
        "run_dir": tmp_path / "run",
        "stage": "baseline",
        "data": shapes,
        "student": {"timm": "test_resnet", "head": "segmentation"},
        "train": settings,
    })  # fmt: skip
    assert train(config).evaluations["val"].miou is not None


def test_three_students_train_in_turn(digits: Path, tmp_path: Path) -> None:
    students = {
        "average": {"factory": f"{NETWORKS}:plain", "train": {"ema": {"decay": 0.9, "warmup": "exponential"}}},
        "power": {
            "factory": f"{NETWORKS}:with_batchnorm",
            "kwargs": {"width": 16},
            "train": {"ema": {"decay": 0.9, "warmup": "power"}, "optimizer": {"name": "adamw", "lr": 0.01}},
            "distill": {"loss": "dkd", "features": [{"loss": "relational", "queue_size": 32}]},
        },
        "best": {"factory": f"{NETWORKS}:with_dropout", "train": {"average_best": 2, "accumulate": 2}},
    }
    config = config_on(DEVICE, digits, tmp_path / "run", student=None, students=students, train__compile=True)
    found = train(config, plugins=PLUGINS)
    assert not found.failures
    for name in students:
        rows = logged(tmp_path / "run" / name)
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert [row["val/top1"] for row in rows if "val/top1" in row]
    kept = [read_checkpoint(path) for path in (tmp_path / "run" / "best" / "checkpoints" / "top").glob("*.pt")]
    mean = read_checkpoint(tmp_path / "run" / "best" / "checkpoints" / "best_student.pt")
    for name in (each for each in mean if mean[each].is_floating_point()):
        expected = torch.stack([state[name].double().cpu() for state in kept]).mean(0)
        torch.testing.assert_close(mean[name].double().cpu(), expected)


def test_optimizer_starts_with_the_state_of_another_run(digits: Path, tmp_path: Path) -> None:
    optimizer = {"name": "adamw", "lr": 0.01}
    first = run_on(DEVICE, digits, tmp_path / "first", train__optimizer=optimizer, train__epochs=1)
    state = {"state_from": first.folder / "checkpoints" / "last.ckpt"}
    second = run_on(DEVICE, digits, tmp_path / "second", train__optimizer={**optimizer, **state}, train__epochs=1)
    assert 0 < norm_of_difference(weights(second.folder), weights(first.folder)) < 1


@pytest.fixture(scope="module")
def finished(digits: Path) -> Path:
    changes = {"student": {"factory": f"{NETWORKS}:with_dropout"}, "train__ema": {"decay": 0.5}}
    return run_on(DEVICE, digits, digits / "finished", **changes).folder


def test_run_verifies(finished: Path) -> None:
    """At least within rounding; a run with deterministic algorithms does so bit for bit."""
    report = verify(finished, VerifySettings(full=True), plugins=PLUGINS, report=lambda line: None)
    assert report.holds, report.verdict
    assert report.num_replayed == report.num_steps


def test_report_tells_of_the_gpu(finished: Path, tmp_path: Path) -> None:
    page = write_report([finished], tmp_path / "report.html", plugins=PLUGINS, report=lambda line: None).read_text()
    assert "Time and cost" in page and "Finished" in page
    assert torch.cuda.get_device_name() in page


def test_use_of_the_gpu_is_logged(finished: Path) -> None:
    """As far as the GPU has counters: one in parts (MIG) has none."""
    rows = [row for row in logged(finished) if "train/cpu_cores" in row]
    assert all(row["train/device_memory_gib"] > 0 for row in rows)
    counters = GpuCounters(torch.device(DEVICE))
    if counters.use() is not None:
        assert all(0 <= row["train/device_use"] <= 1 for row in rows)
    if counters.kilojoules() is not None:
        energy = [row["train/gpu_energy_kj"] for row in rows]
        assert energy == sorted(energy) and energy[-1] > 0


def test_energy_is_that_of_a_gpu_at_work() -> None:
    device = torch.device(DEVICE)
    counters, started = GpuCounters(device), time.perf_counter()
    if counters.kilojoules() is None:
        pytest.skip("the GPU has no counter of energy")
    numbers, use = torch.rand(4096, 4096, device=device), 0.0
    while (seconds := time.perf_counter() - started) < 1.5:
        numbers = torch.tanh(numbers @ numbers)
        torch.cuda.synchronize(device)
        use = max(use, counters.use() or 0.0)
    kilojoules = counters.kilojoules()
    assert kilojoules is not None
    watts = 1000 * kilojoules / seconds
    assert 10 < watts < 3000
    assert use > 0
