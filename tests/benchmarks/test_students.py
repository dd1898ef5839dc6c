"""The benchmark of several students: what is compared, and how the ratios are made."""

import json
from pathlib import Path

import pytest

from benchmarks.students import BenchStudentsSettings, StudentsResult, bench_students, main

SHORT = {
    "batch_size": 8,
    "size": 16,
    "widths": (4, 8),
    "teacher_width": 4,
    "num_batches": 2,
    "epochs": 1,
    "repeats": 2,
}


def test_ratio_is_to_shared_parts_once_and_students_each() -> None:
    costs = {"loader and teacher": [4.0, 5.0], "a": [5.0, 8.0], "b": [7.0, 9.0], "all students": [8.0, 18.0]}
    result = StudentsResult(costs, costs, {"device": "cpu"}, {"num_cores": 2})
    assert result.ratios(costs) == [8 / (4 + 1 + 3), 18 / (5 + 3 + 4)]
    assert "1.250 (1.000-1.500)" in result.table()


@pytest.mark.slow
def test_all_rows_are_measured(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    result = bench_students(BenchStudentsSettings(root=photographs, **SHORT, out=out))
    assert [*result.wall_s] == [*result.cpu_s] == ["loader and teacher", "width 4", "width 8", "all students"]
    assert all(len(each) == 2 for each in result.wall_s.values())
    found = json.loads(out.read_text())
    assert found["ratios"]["cpu_time"]["repeats"] == result.ratios(result.cpu_s)
    assert found["settings"]["widths"] == [4, 8]


def test_wrong_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeats", "0"]) == 1
    assert "--repeats" in capsys.readouterr().err
