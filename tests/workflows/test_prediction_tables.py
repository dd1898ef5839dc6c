"""`predictions_<split>.csv` of a loader: files and class names of its source."""

import csv
from pathlib import Path

import pytest
from torch import nn

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.evaluation.predictions import Predictions
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows.prediction_tables import prediction_tables, write_tables
from tests.streams import EVAL


def test_rows_name_files_and_classes(photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collected = Predictions()
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
    assert {path.name for path in tmp_path.iterdir()} == {"predictions_val.csv"}
    write_tables(tmp_path / "missing", tables)
    assert "predictions_val.csv was not written: No such file or directory" in caplog.messages
