"""A result goes into a file of its own: what cannot be one is refused before the work."""

import os
from pathlib import Path

import pytest

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline.errors import ConfigError


def test_folder_is_made_and_file_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    for text in ("1", "2"):
        prepare_output(out)
        write_output(out, text)
        assert out.read_text() == text


@pytest.mark.parametrize("kind", ["a folder", "a link", "a pipe"])
def test_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    out, victim = tmp_path / "out.json", tmp_path / "victim"
    victim.write_text("mine")
    {"a folder": out.mkdir, "a link": lambda: out.symlink_to(victim), "a pipe": lambda: os.mkfifo(out)}[kind]()
    with pytest.raises(ConfigError, match=f"out: {out} is {kind}; give the name of a JSON file"):
        prepare_output(out)
    assert victim.read_text() == "mine"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written: (Not a directory|File exists); choose another"):
        prepare_output(tmp_path / "file" / "out.json")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; choose another"):
        write_output(tmp_path / "file" / "out.json", "1")
