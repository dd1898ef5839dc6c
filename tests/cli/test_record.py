"""`kd-pipeline record`."""

import os
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.cli import main
from kd_pipeline.cli import record as command
from kd_pipeline.workflows import _record as workflow
from tests.recordings import assert_same_files, manifest_of, num_epochs_of, part_of, set_column
from tests.training.tiny_run import settings, write_digits


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_digits(tmp_path)
    path = tmp_path / "digits.yaml"
    path.write_text(settings(tmp_path, "run").model_dump_json(exclude_none=True), encoding="utf-8")
    return path


def test_options_and_overrides_reach_recording(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "here"
    options = ["--top-k", "3", "--dtype", "float16", "--epochs", "3", "--out", str(out)]
    assert main(["record", "-c", str(config), *options, "seed=4"]) == 0
    manifest = manifest_of(out)
    logits = manifest.outputs["logits"]
    assert (logits.top_k, logits.dtype, num_epochs_of(out)) == (3, "float16", 3)
    assert manifest.stream["seed"] == 4
    printed = capsys.readouterr()
    assert f"96 images x 3 epochs, 22 bytes each, 6.34 kB in all: train with teacher: {{path: {out}}}" in printed.out
    assert "epoch 3 of 3: 100.0% recorded, " in printed.err and "images/s, 0:00:00 left" in printed.err


def test_plan_is_shown_before_the_progress(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "-c", str(config), "--epochs", "1"]) == 0
    _, opening, *lines = capsys.readouterr().err.splitlines()
    assert opening == "opening the images and the teacher"
    assert (
        lines[0].startswith("recording 96 images x 1 epoch in ")
        and ": 4.61 kB in all (4.61 kB per epoch); " in lines[0]
    )
    assert lines[1:3] == ["  logits [10] float32: 40 bytes per image", "  training reads 48 kB/s at 1,000 images/s"]
    assert lines[-2].startswith("epoch 1 of 1: 100.0% recorded") and lines[-1].startswith("recorded in ")


def test_dry_run_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["record", "-c", str(config), "--out", str(tmp_path / "here"), "--dry-run"]
    # Overrides may follow `--outputs`.
    assert main([*arguments, "--outputs", "logits", "seed=4", "--top-k", "3"]) == 0
    assert "logits [10] float32, the 3 largest: 22 bytes per image" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert main(arguments) == 1
    assert "the recording needs 9.22 kB more" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_defaults_to_epochs_and_folder_of_training(config: Path, tmp_path: Path) -> None:
    assert main(["record", "-c", str(config)]) == 0
    assert num_epochs_of(tmp_path / "run" / "recording") == 2
    assert main(["train", "-c", str(config), f"teacher={{path: {tmp_path / 'run' / 'recording'}}}"]) == 1  # a factory
    plugin = ["--plugin", "tests.training.networks"]
    assert main(["train", "-c", str(config), *plugin, f"teacher={{path: {tmp_path / 'run' / 'recording'}}}"]) == 0


def test_missing_parts_are_said_and_joined(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "_MAX_PART_ROWS", 48)
    arguments = ["record", "-c", str(config), "--out", str(tmp_path / "here")]
    assert main([*arguments, "--join"]) == 1
    assert "holds no recording" in capsys.readouterr().err
    assert main([*arguments, "--part", "1/4"]) == 0
    printed = capsys.readouterr()
    assert "this process records part 1/4 (--part 1/4)" in printed.err
    assert "epoch 2: positions 48-95, part 4/4 has them" in printed.out
    assert "with --part 2/4, and with --part 3/4, and with --part 4/4" in printed.out
    assert main([*arguments, "--join"]) == 1
    for part in ("2/4", "3/4", "4/4"):
        assert main([*arguments, "--part", part]) == 0
    assert main([*arguments, "--join", "--verify", "--license", "CC-BY-4.0"]) == 0
    printed = capsys.readouterr()
    assert f"4 parts in {tmp_path}/here are as they were recorded" in printed.out and "x 2 epochs" in printed.out
    assert "license: CC-BY-4.0" in (tmp_path / "here" / "README.md").read_text()


def test_flipped_byte_is_found_on_demand(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["record", "-c", str(config), "--out", str(tmp_path / "here")]
    assert main(arguments) == 0
    path = part_of(tmp_path / "here", epoch=1)
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    assert main([*arguments, "--verify"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} has the sha256 " in error and "copy this file again, or delete it and run the command" in error
    path.unlink()
    assert main(arguments) == 0 and main([*arguments, "--verify"]) == 0


def test_resumes_after_ctrl_c(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "_COMMIT_INTERVAL_S", -1.0)
    left = [3]

    def stopped(progress: workflow.Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    assert main(["record", "-c", str(config), "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(command, "_show", stopped)
    arguments = ["record", "-c", str(config), "--out", str(tmp_path / "stopped")]
    capsys.readouterr()
    assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "kd-pipeline: stopped"
    assert not num_epochs_of(tmp_path / "stopped") and list(tmp_path.glob("stopped/working/*-000000048-*.piece"))
    assert main(arguments) == 0
    assert_same_files(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "all rights: mine"], "--license: String should match pattern"),
        (["--part", "5/4"], "--part is 5/4, and the last of 4 is 4/4"),
        (["--out", "s3:/bucket/x"], "--out: s3://bucket/x has lost a slash"),
        (["--top-k", "0"], "--top-k: Input should be greater than or equal to 1, got '0'"),
        (["--epochs", "many"], "--epochs: Input should be a valid integer"),
        (["--grid", "0"], "--grid: Input should be greater than or equal to 1, got '0'"),
        (["--outputs", "x", "seed=4"], "--outputs: the teacher has no output called 'x'"),
        (["--top-k", "10"], "--top-k must be below the number of classes, got 10 of 10"),
        (["teacher=null"], "there is no teacher to record"),
    ],
    ids=str,
)
def test_invalid_value_names_option(
    config: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["record", "-c", str(config), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_file_outside_is_not_written_through_a_link(config: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "here", tmp_path / "victim.txt"
    victim.write_text("precious" * 1000)
    out.mkdir()
    (out / "SHA256SUMS").symlink_to(victim)
    assert main(["record", "-c", str(config), "--out", str(out), "--epochs", "1"]) == 0
    assert not (out / "SHA256SUMS").is_symlink() and victim.read_text() == "precious" * 1000


def test_hostile_recording_ends_a_training_in_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "here"
    assert main(["record", "-c", str(config), "--out", str(out), "--top-k", "2"]) == 0
    arguments = ["train", "-c", str(config), "--plugin", "tests.training.networks", f"teacher={{path: {out}}}"]
    set_column(out, "logits.classes", np.full((2, 96, 2), 30_000))
    capsys.readouterr()
    assert main(arguments) == 1
    assert "it has the class 30000 of 10; copy or record it again" in capsys.readouterr().err.splitlines()[-1]
    for path in (part_of(out, epoch=0), part_of(out, epoch=1)):
        path.unlink()
        os.mkfifo(path)
    assert main(arguments) == 1
    assert ".bin cannot be read: this is a pipe and no file; copy" in capsys.readouterr().err
    (out / "manifest.json").write_text("[" * 100_000)
    assert main(arguments) == 1
    assert "it is nested too deeply" in capsys.readouterr().err.splitlines()[-1]


def test_link_as_manifest_is_replaced(config: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.json"
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "manifest.json").symlink_to(victim)
    assert main(["record", "-c", str(config), "--out", str(tmp_path / "here")]) == 0
    assert not victim.exists() and not (tmp_path / "here" / "manifest.json").is_symlink()
