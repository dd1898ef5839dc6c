"""Runs on images with masks on a disk, as a config describes them."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd_pipeline.config.config import Config
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.networks import PixelNet
from tests.shapes import CLASSES, draw_shapes
from tests.streams import assert_same, run

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

PLUGINS = ["tests.networks"]
TEACHER = {"model": {"factory": "tests.networks:PixelNet", "kwargs": {"num_classes": 4}}}


def save(root: Path, num_images: int, seed: int) -> dict[str, Any]:
    """Shapes and their masks; returns the settings of the source."""
    images, masks = draw_shapes(num_images, 48, seed)
    for name, arrays in (("images", images), ("masks", masks)):
        (root / name).mkdir(parents=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(root / f"{name}/{number:02}.png")
    return {"kind": "image_folder", "root": root / "images", "masks": {"root": str(root / "masks")}}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Two splits; the names of classes are in the first."""
    train_source = save(tmp_path / "train", 48, 0) | {"classes": CLASSES}
    return {
        "batch_size": 16,
        "device": "cpu",
        "train": {"source": train_source, "transform": {"preset": "train", "size": 32, "area": [0.4, 1]}},
        "val": {"source": save(tmp_path / "val", 16, 1), "transform": {"preset": "eval", "size": 32}},
    }


def test_a_config_trains_on_masks(tmp_path: Path, data: dict[str, Any]) -> None:
    settings = {"epochs": 1, "loggers": ["csv"], "compare_with_teacher": False, "export": {"onnx": False}}
    config = Config.model_validate({"run_dir": tmp_path / "run", "data": data, "train": settings, "probe": None})
    result = train(config, student=PixelNet(4), teacher=PixelNet(4, seed=1))
    found = result.evaluations["val"]
    assert found.classes == CLASSES and found.miou is not None and found.num_samples == 16


def test_a_recording_is_replayed_beside_masks(tmp_path: Path, data: dict[str, Any]) -> None:
    data["train"]["last_batch"] = "keep"
    config = Config.model_validate({"seed": 5, "data": data, "teacher": TEACHER, "train": {"epochs": 2}})
    teacher = open_run_teacher(config, plugins=PLUGINS)
    with KDDataLoader.from_config(config, teacher=teacher) as loader:
        live = run(loader, 2)
    recording = record(config, RecordSettings(out=tmp_path / "recording"), plugins=PLUGINS)
    replaying = config.model_dump(exclude_unset=True) | {"teacher": {"path": recording}}
    with KDDataLoader.from_config(Config.model_validate(replaying)) as loader:
        replayed = run(loader, 2)
    assert "masks" in live[0] and live[0]["logits"].shape == (16, 4, 32, 32)
    assert_same(replayed, live)
