"""The list of runs: id, status, result and order, of whole folders and of a stranger's."""

import json
from pathlib import Path

import pytest

from kd_pipeline.cli import main
from kd_pipeline.errors import DataError
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_list import list_runs


def start(path: Path, time: str, outcome: str | None = "trained") -> RunFolder:
    """A folder in which a run was started at `time`, and ended as `outcome` says."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    folder.record_start(lambda: 3, stage="distill")
    if outcome is not None:
        folder.record_end(outcome)
    lines = [json.loads(line) for line in folder.history.read_text().splitlines()]
    folder.history.write_text("".join(json.dumps({**line, "time": time}) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    done = start(root / "done", "2026-01-02 10:00:00+00:00")
    done.write_result({"test": {"top1": 0.1, "metrics": {}}, "val": {"top1": 0.9132, "loss": 0.5, "metrics": {}}})
    done.record_results("digest", 3, [])
    start(root / "sweep" / "killed", "2026-01-03 10:00:00+00:00", outcome=None)
    start(root / "failed" / "teacher", "2026-01-01 10:00:00+00:00", "DataError: \x1b[31mno images")
    start(root / "done" / "earlier" / "1", "2026-01-04 10:00:00+00:00")
    (root / "photos").mkdir()
    return root


def test_newest_first_with_status_and_result(runs: Path) -> None:
    with RunFolder(runs / "failed" / "teacher").session("train"):
        found = list_runs(runs)
        assert found[2].status == "running"
    found = list_runs(runs)
    assert [each.path.relative_to(runs).as_posix() for each in found] == ["sweep/killed", "done", "failed/teacher"]
    assert [each.status for each in found[:2]] == ["killed", "finished"]
    assert found[2].status.startswith("DataError") and "\x1b" not in found[2].status
    assert [each.metric for each in found] == ["", "val/top1 91.3%", ""]
    assert len({each.run_id for each in found}) == 3


def test_id_stays_when_a_run_resumes(runs: Path) -> None:
    before = RunFolder(runs / "done").run_id
    again = RunFolder(runs / "done")
    again.record_start(lambda: 3, stage="distill")
    assert [each.run_id for each in list_runs(runs) if each.path == runs / "done"] == [before]
    assert [event.get("run") for event in again.events() if event["event"] == "start"] == [before, before]


def test_command_prints_a_table_or_the_latest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["id", "folder", "stage", "started", "status", "result"]
    assert len(lines) == 3 and str(runs / "sweep" / "killed") in lines[0] and "2026-01-03 10:00" in lines[0]
    assert main(["runs", str(runs), "--latest"]) == 0
    assert capsys.readouterr().out == f"{runs / 'sweep' / 'killed'}\n"
    assert main(["runs", str(runs / "photos")]) == 1
    assert "photos holds no run; name the folder in which the run_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"val": 3}', b'{"val": {"metrics": [], "top1": "x"}}', b"\xff", b"[" * 100_000]
)
def test_result_of_a_stranger_is_left_out(runs: Path, content: bytes) -> None:
    (runs / "done" / "result.json").write_bytes(content)
    assert [each.metric for each in list_runs(runs)] == ["", "", ""]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing cannot be listed: No such file or directory; name a folder"):
        list_runs(tmp_path / "missing")
