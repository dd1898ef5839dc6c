"""`result.json` of a stranger ends in one message."""

import os
from pathlib import Path

import pytest

from kd_pipeline.errors import StateError
from kd_pipeline.workflows.results import read_evaluations

HOSTILE = {
    "nested": b"[" * 1_000_000,
    "a huge number": b'{"val": ' + b"9" * 5000 + b"}",
    "wrong types": b'{"val\\u001b": {"num_samples": "x"}}',
    "bytes": b"\xff{",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_results_are_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "result.json").write_bytes(HOSTILE[name])
    with pytest.raises(
        StateError, match=r"result.json cannot be read: it does not hold the results of a run"
    ) as caught:
        read_evaluations(tmp_path / "result.json")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_pipe_and_large_file_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    os.mkfifo(path)
    with pytest.raises(StateError, match="cannot be read: this is a pipe and no file"):
        read_evaluations(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StateError, match="cannot be read: it has 1099511627776 bytes"):
        read_evaluations(path)
