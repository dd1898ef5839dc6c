"""The benchmark of the end sees the results before the last line, and that before the end of the process."""

from pathlib import Path

import pytest

from benchmarks import end
from benchmarks.checkouts import ROOT
from kd_pipeline.workflows.demo import write_digits


@pytest.mark.slow
def test_lines_come_in_order(tmp_path: Path) -> None:
    write_digits(tmp_path / "data" / "digits")
    found = end.end_once(ROOT, tmp_path, "run")
    assert 0 < found.result_s < found.last_line_s < found.exit_s


@pytest.mark.slow
def test_run_that_does_not_train_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not train: status 1"):
        end.end_once(ROOT, tmp_path, "run")
