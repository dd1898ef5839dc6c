"""The command line: errors in one message, no traceback unless asked for, exit codes that mean something."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd_pipeline import __version__, cli
from kd_pipeline.errors import DataError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kd_pipeline", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_version_is_the_package_s() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.strip()) == (0, __version__)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("demo", "check", "train", "record", "eval", "predict", "build-engine", "bench", "doctor"):
        assert command in result.stdout


def test_a_wrong_override_is_one_message_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "train.epoch=1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kd-pipeline: ") and "train.epoch" in error and "epochs" in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train\.epoch"):
        cli.main(["demo", "train.epoch=1", "--debug"])


def test_a_bench_of_a_folder_that_is_not_there_names_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert cli.main(["bench", "loader", "--root", str(root), "--out", str(tmp_path / "out.json")]) == 1
    assert str(root) in capsys.readouterr().err


def test_a_bench_setting_out_of_range_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "loader", "--batch-size", "0"]) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_bench_teacher_takes_a_network_by_name_and_writes_table_json_and_picture(
    capsys: pytest.CaptureFixture[str], photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "teacher.json"
    arguments = ["--builtin", "small_resnet", "--root", str(photo_folder), "--batch-sizes", "2", "--compile-at"]
    more = ["--num-images", "2", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    assert cli.main(["bench", "teacher", *arguments, *more]) == 0
    shown = capsys.readouterr()
    assert "openvino fp32" in shown.out and "not measured: tensorrt fp32, " in shown.out
    assert "exporting small_resnet" in shown.err
    assert out.exists() and out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--timm", "resnet18", "--builtin", "small_resnet"], "got timm and builtin"),
        (["--onnx", "a.onnx", "--pretrained"], "--pretrained is for a model by name, and a.onnx is a file"),
        (["--batch-sizes", "0"], "--batch-sizes: "),
        (["--compile-at", "3"], "are not among the batch_sizes [1, 8, 32, 64]"),
        (["--onnx", "none.onnx"], "none.onnx: there is no such file"),
    ],
)
def test_a_bench_of_no_teacher_or_two_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert cli.main(["bench", "teacher", *arguments, "--out", str(tmp_path / "out.json")]) == 1
    assert words in capsys.readouterr().err


def test_bench_scale_writes_a_table_and_json(
    capsys: pytest.CaptureFixture[str], photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scale.json"
    arguments = ["--root", str(photo_folder), "--sizes", "300", "--ranks", "--batch-size", "8", "--repeats", "1"]
    assert cli.main(["bench", "scale", *arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "300 entries, process 2 of 2" in shown.err and "resume 90% s" in shown.out
    assert out.exists()


def test_a_bench_of_no_entries_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "scale", "--sizes", "0"]) == 1
    assert "--sizes" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(overrides: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_pipeline.workflows.demo.run_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_data_error_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(overrides: object) -> None:
        raise DataError("no such folder: /data")

    monkeypatch.setattr("kd_pipeline.workflows.demo.run_demo", failing)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "kd-pipeline: no such folder: /data\n"
