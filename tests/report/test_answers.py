"""Rows of predictions_val.csv, which may be a stranger's."""

from pathlib import Path

import pytest

from kd_pipeline.errors import DataError
from kd_pipeline.report.answers import Answer, read_answers

HEADER = "index,path,label,student,student_probability,teacher,teacher_probability,loss\n"


def read(folder: Path, text: str) -> list[Answer]:
    (folder / "predictions_val.csv").write_text(text, encoding="utf-8")
    return [*read_answers(folder / "predictions_val.csv")]


def test_rows_are_read_with_what_is_not_known(tmp_path: Path) -> None:
    text = f'{HEADER}0,"a, b.png",cat,dog,0.9,cat,0.8,2.3\n7,,,dog,0.5,,,\n8,,cat,cat,nan,,,inf\n'
    first, second, third = read(tmp_path, text)
    assert first == Answer(0, "a, b.png", "cat", "dog", 0.9, "cat", 0.8, 2.3)
    assert first.teacher_is_right and not first.student_is_right
    assert second == Answer(7, "", "", "dog", 0.5, "", None, None)
    assert not second.student_is_right and not second.teacher_is_right
    assert third.student_is_right and third.loss is None and third.student_probability is None


@pytest.mark.parametrize(
    "row", ["-1,,cat,dog,0.9,,,", "1e99,,cat,dog,0.9,,,", "0,,cat,dog,many,,,", "0", "0,,cat", "0," + "x" * 2**16]
)
def test_damage_is_one_error_with_its_line(row: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predictions_val\.csv") as error:
        read(tmp_path, f"{HEADER}0,,cat,cat,1,,,0\n{row}\n")
    assert len(str(error.value)) < 500


def test_another_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the predictions"):
        read(tmp_path, "a,b\n1,2\n")
