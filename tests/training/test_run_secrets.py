"""What a run writes does not hold secrets, and is for this user alone where it could."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from kd_pipeline.cli import main
from kd_pipeline.config.config import load_config
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.run_lock import LOCK
from kd_pipeline.workflows.exported import open_model_file
from tests.training import tiny_run

SECRETS = ("s3cr3t-key", "s3cr3t-typed", "s3cr3t-user", "s3cr3t-query")
PRIVATE = ("config.yaml", "environment.json", "evidence.jsonl", "history.jsonl", LOCK, "train.log")
SHARED = ("metrics.csv", "result.json", "exported/model.json", "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def run(digits: Path) -> Path:
    """A run with secrets in its config and its command, in a process where files are for all by default."""
    command = ["kd-pipeline", "train", "--token", SECRETS[1], f"student.kwargs.api_key={SECRETS[0]}"]
    uri = f"https://{SECRETS[2]}@host/?api_key={SECRETS[3]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, f"student.kwargs.uri={uri}"])
        before = os.umask(0o022)
        try:
            return start(digits, api_key=SECRETS[0], uri=uri)
        finally:
            os.umask(before)


def start(digits: Path, **kwargs: str) -> Path:
    student = {"factory": "tests.training.networks:with_key", "kwargs": kwargs}
    loggers = ["csv", "tensorboard"]
    return tiny_run.run(digits, "secrets", student=student, train__epochs=1, train__loggers=loggers).folder


@pytest.mark.slow
def test_no_file_holds_a_secret(run: Path) -> None:
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {file.relative_to(run).as_posix() for file in files} > {*PRIVATE, *SHARED}
    for file in files:
        content = file.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], file
    assert "--token '***' 'student.kwargs.api_key=***' 'student.kwargs.uri=https://***@host/?api_key=***'" in (
        (run / "train.log").read_text()
    )


@pytest.mark.slow
def test_only_the_owner_reads_what_may_hold_one(run: Path) -> None:
    modes = {name: stat.S_IMODE((run / name).stat().st_mode) for name in (*PRIVATE, *SHARED)}
    assert modes == dict.fromkeys(PRIVATE, 0o600) | dict.fromkeys(SHARED, 0o644)


@pytest.mark.slow
def test_run_with_the_secret_resumes(run: Path, digits: Path) -> None:
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    start(digits, api_key="a new key", uri=f"https://another@host/?api_key={SECRETS[3]}")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.slow
def test_hidden_value_is_not_used_in_its_place(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = r"student.kwargs.api_key, student.kwargs.uri: the value is \*\*\*"
    with pytest.raises(ConfigError, match=f"config.yaml: {names}.*or override the key on the command line"):
        load_config(run / "config.yaml")
    assert main(["check", "-c", str(run / "config.yaml")]) == 1
    assert "kd-pipeline: " in capsys.readouterr().err
    overrides = ["student.kwargs.api_key=typed", "student.kwargs.uri=typed"]
    student = load_config(run / "config.yaml", overrides).student
    assert student is not None and student.kwargs == {"api_key": "typed", "uri": "typed"}
    with pytest.raises(ConfigError, match=r"model.json: model.kwargs.api_key, .*: the value is \*\*\*"):
        open_model_file(run, image_shape=(3, 8, 8), device=torch.device("cpu"), plugins=["tests.training.networks"])
    description = run / "exported" / "model.json"
    text = description.read_text()
    description.write_text(text.replace("***", "put back"))
    open_model_file(run, image_shape=(3, 8, 8), device=torch.device("cpu"), plugins=["tests.training.networks"]).close()
    description.write_text(text)
