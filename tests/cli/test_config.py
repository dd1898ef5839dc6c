"""`kd-pipeline config` prints what a run would have, and `kd-pipeline init` writes a config that it reads."""

import json
from pathlib import Path

import pytest

from kd_pipeline.cli import main
from kd_pipeline.config.config import load_config
from kd_pipeline.config.schema import config_schema


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_resolved_config_is_the_same_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "base.yaml").write_text("train: {epochs: 7}\nseed: 3\n")
    (folder / "my.yaml").write_text("extends: base.yaml\ndata: {batch_size: 8}\n")
    text = output(capsys, "config", "-c", "my.yaml", "seed=5")
    assert "extends" not in text and "epochs: 7" in text and "seed: 5" in text and "warmup_epochs: 0.0" in text
    (folder / "whole.yaml").write_text(text)
    assert load_config("whole.yaml") == load_config("my.yaml", ["seed=5"])


def test_secrets_are_hidden(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my.yaml").write_text("student: {factory: 'a:b', kwargs: {api_key: abc123}}\n")
    text = output(capsys, "config", "-c", "my.yaml")
    assert "abc123" not in text and "api_key: '***'" in text


def test_schema_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(output(capsys, "config", "--schema")) == config_schema()
    assert output(capsys, "config", "--schema", "--out", "schema.json") == ""
    assert json.loads((folder / "schema.json").read_text()) == config_schema()


def test_init_writes_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "init", "-o", "sub/first one.yaml")
    assert "kd-pipeline check -c 'sub/first one.yaml'" in text and "kd-pipeline train -c" in text
    before = (folder / "sub" / "first one.yaml").read_text()
    assert main(["init", "-o", "sub/first one.yaml"]) == 1
    assert "replaces no file; choose another name with -o" in capsys.readouterr().err
    assert (folder / "sub" / "first one.yaml").read_text() == before
    assert str(load_config("sub/first one.yaml").run_dir) == "runs/first one"


def test_init_of_a_missing_folder_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err and not list(folder.iterdir())
