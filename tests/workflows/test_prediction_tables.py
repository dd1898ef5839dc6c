"""`predictions_<split>.csv` of a loader: files and class names of its source."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.evaluation.predictions import Predictions
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows.prediction_tables import prediction_tables, write_tables
from tests.streams import EVAL


def test_rows_name_files_and_classes(photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collected = Predictions(num_images=3)
    source = ImageFolder(photo_folder)
    with KDDataLoader(source, EVAL, batch_size=16, shuffle=False, device="cpu", num_threads=1) as loader:
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        found = evaluate(network, loader, predictions=collected)
        tables = prediction_tables({"val": collected, "train": collected}, {"val": loader}.__getitem__)
    write_tables(tmp_path, tables)
    with (tmp_path / "predictions_val.csv").open(newline="", encoding="utf-8") as stream:
        rows = [*csv.DictReader(stream)]
    assert [int(row["index"]) for row in rows] == [*range(37)]
    assert all(Path(row["path"]).is_file() and Path(row["path"]).parent.name == row["label"] for row in rows)
    assert sum(row["student"] == row["label"] for row in rows) / 37 == found.top1
    assert sum(float(row["loss"]) for row in rows) / 37 == pytest.approx(found.loss, rel=1e-5)
    by_loss = [int(row["index"]) for row in sorted(rows, key=lambda row: float(row["loss"]))]
    assert [index for index, _ in collected.easiest] == by_loss[:3]
    assert [index for index, _ in collected.hardest] == by_loss[:-4:-1]
    with KDDataLoader(source, EVAL, batch_size=37, shuffle=False, device="cpu", num_threads=1) as loader:
        batch = loader.peek()
    for index, image in [*collected.easiest, *collected.hardest]:
        assert torch.equal(image, batch.images[index])
    assert {path.name for path in tmp_path.iterdir()} == {"predictions_val.csv", "samples_val.png"}
    write_tables(tmp_path / "missing", tables)
    assert "the predictions for val were not written: No such file or directory" in caplog.messages
