"""The table of predictions: what a row says, and which rows of a large split it keeps."""

import csv
import io
import math

import pytest
import torch

from kd_pipeline.batch import KDBatch
from kd_pipeline.evaluation import predictions
from kd_pipeline.evaluation.predictions import COLUMNS, Predictions, to_csv


def batch_of(index: list[int], labels: list[int] | None, valid: list[bool] | None = None) -> KDBatch:
    size = len(index)
    return KDBatch(
        images=torch.zeros(size, 3, 2, 2),
        labels=None if labels is None else torch.tensor(labels),
        index=torch.tensor(index),
        valid=torch.ones(size, dtype=torch.bool) if valid is None else torch.tensor(valid),
    )


def test_row_by_hand() -> None:
    found = Predictions()
    logits = torch.tensor([[0.0, math.log(3.0)], [math.nan, 0.0], [5.0, 0.0]])
    teacher = torch.tensor([[math.log(4.0), 0.0], [0.0, 0.0], [0.0, 0.0]])
    found.add(batch_of([7, 2, 9], [0, 1, 1], [True, True, False]), logits, teacher)
    first, second = csv.DictReader(io.StringIO(to_csv(found.rows(), ["a,b", "c"], lambda index: f"{index}.png")))
    assert tuple(first) == COLUMNS
    assert first == {
        **{"index": "2", "path": "2.png", "label": "c", "student": "", "student_probability": "", "teacher": "a,b"},
        **{"teacher_probability": "0.5", "loss": "nan"},
    }
    assert (second["index"], second["student"], second["teacher"], second["label"]) == ("7", "c", "a,b", "a,b")
    assert float(second["student_probability"]) == pytest.approx(0.75)
    assert float(second["teacher_probability"]) == pytest.approx(0.8)
    assert float(second["loss"]) == pytest.approx(math.log(4.0), rel=1e-5)


def test_without_teacher_names_and_files() -> None:
    found = Predictions()
    found.add(batch_of([0], [1]), torch.tensor([[0.0, 0.0, 9.0]]), None)
    (row,) = csv.DictReader(io.StringIO(to_csv(found.rows(), None)))
    assert [row[name] for name in ("path", "label", "student", "teacher", "teacher_probability")] == [
        "",
        "1",
        "2",
        "",
        "",
    ]


def test_no_rows_without_labels_or_of_pixels() -> None:
    found = Predictions()
    found.add(batch_of([0], None), torch.zeros(1, 3), None)
    found.add(batch_of([0], [1]), torch.zeros(1, 3, 2, 2), None)
    assert found.rows() == []


@pytest.mark.parametrize("batch_size", [50, 7])
def test_large_split_keeps_worst_best_and_the_same_others(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    for name, value in (("MAX_ROWS", 60), ("_NUM_WORST", 10), ("_NUM_BEST", 10), ("_NUM_RANDOM", 20)):
        monkeypatch.setattr(predictions, name, value)
    found = Predictions()
    margin = torch.linspace(5.0, -5.0, 500)[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    for start in range(0, 500, batch_size):
        part = margin[start : start + batch_size]
        index = [*range(start, start + len(part))]
        found.add(batch_of(index, [0] * len(part)), torch.stack([part, torch.zeros_like(part)], dim=1), None)
        assert sum(map(len, found._blocks)) < 120 + batch_size
    kept = [row.index for row in found.rows()]
    hardest_first = margin.argsort().tolist()
    assert kept == sorted(set(kept)) and 30 < len(kept) <= 40
    assert set(hardest_first[:10]) | set(hardest_first[-10:]) <= set(kept)
    chosen = sorted(range(500), key=lambda index: index * 2654435761 % 2**32)[:20]
    assert set(kept) == {*hardest_first[:10], *hardest_first[-10:], *chosen}
