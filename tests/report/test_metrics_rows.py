"""`metrics.csv` of a stranger ends in one message, within bounds."""

import os
from pathlib import Path

import pytest

from kd_pipeline.errors import DataError
from kd_pipeline.report import metrics_rows
from kd_pipeline.report.metrics_rows import read_metrics


def test_rows_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,top1\n1,0.5,\n,7,\n3,nan,1e-3\n")
    (first, one), (second, two) = read_metrics(path)
    assert (first, one, second) == (1, {"loss": 0.5}, 3) and two["top1"] == 0.001


HOSTILE = {
    "a huge field": b'step,loss\n1,"' + b"1" * 200_000 + b'"\n',
    "a line without end": b"step,loss\n" + b"1" * (2**20 + 1),
    "a huge step": b"step,loss\n" + b"9" * 5000 + b",1\n",
    "a text": b"step,loss\n1,high\n",
    "too many cells": b"step,loss\n1,2,3,4\n",
    "no step": b"loss\n1\n",
    "bytes": b"step,loss\n1,\xff\n",
    "NUL": b"step,loss\n1,\0\n",
    "an infinite step": b"step,loss\ninf,1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=r"this is not the metrics.csv of a run \(.*\); move the file away") as caught:
        list(read_metrics(path))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(DataError, match="cannot be read: this is a pipe and no file"):
        list(read_metrics(tmp_path / "metrics.csv"))


def test_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="it has 1099511627776 bytes, and at most"):
        list(read_metrics(path))


@pytest.mark.parametrize("limit", ["_MAX_CELLS", "_MAX_NUMBERS"])
def test_numbers_and_cells_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,a,b,c\n" + "1,2,,,\n" * 100)
    monkeypatch.setattr(metrics_rows, limit, 200)
    with pytest.raises(DataError, match=r"line (42|52): .*more than"):
        list(read_metrics(path))
