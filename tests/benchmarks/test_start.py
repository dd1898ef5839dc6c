"""The start-up benchmark sees the first line of a run before its first step."""

import json
from pathlib import Path

import pytest

from benchmarks import start
from benchmarks.checkouts import ROOT


@pytest.mark.slow
def test_first_line_comes_before_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["--repeats", "1", "--out", str(tmp_path / "start.json")])
    results = json.loads((tmp_path / "start.json").read_text())["results"]
    assert [result["stage"] for result in results] == ["baseline", "distill"]
    out = capsys.readouterr().out
    for result in results:
        ((first_line_s,), (imports_done_s,), (first_step_s,)) = (result[name] for name in start.Start._fields)
        assert 0 < first_line_s < imports_done_s < first_step_s
        assert f"{result['stage']}: first line {first_line_s:.2f} s" in out


@pytest.mark.slow
def test_run_that_does_not_train_shows_its_output(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"does not train:\n[^$]*data/digits"):
        start.start_once(ROOT, tmp_path, "baseline", tmp_path / "run")
