"""`metrics.csv` has every metric once, before and after a restart."""

import csv
from pathlib import Path

from kd_pipeline.training.metrics_csv import MetricsFile


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]


def log(metrics: MetricsFile, step: int, **values: float) -> None:
    metrics.log_metrics(values, step)
    metrics.save()


def test_row_per_step_and_column_per_metric(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    log(metrics, 5, loss=1.5)
    log(metrics, 10, loss=1.25)
    log(metrics, 10, top1=0.5)
    log(metrics, 15, loss=1.0)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "5", "loss": "1.5"},
        {"step": "10", "loss": "1.25", "top1": "0.5"},
        {"step": "15", "loss": "1.0"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_resume_drops_later_rows(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.csv")
    for step in (5, 10, 15):
        log(first, step, loss=float(step))
    second = MetricsFile(tmp_path / "metrics.csv")
    second.resume(10)
    log(second, 15, loss=-1.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.csv")] == [
        ("5", "5.0"),
        ("10", "10.0"),
        ("15", "-1.0"),
    ]


def test_new_row_is_appended(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    log(metrics, 1, loss=1.0)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    log(metrics, 2, loss=2.0)
    assert (tmp_path / "metrics.csv").stat().st_ino == inode
    assert len(rows(tmp_path / "metrics.csv")) == 2


def test_resume_without_file(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.resume(100)
    log(metrics, 1, loss=1.0)
    assert rows(tmp_path / "metrics.csv") == [{"step": "1", "loss": "1.0"}]
