"""The command line: one message per error, no traceback without --debug, and the exit statuses."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_pipeline import __version__, cli
from kd_pipeline.errors import DataError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kd_pipeline", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.strip()) == (0, __version__)


def test_help_lists_commands() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in (
        "demo",
        "check",
        "distill",
        "train",
        "record",
        "eval",
        "predict",
        "export",
        "build-engine",
        "tune",
        "bench",
        "doctor",
    ):
        assert command in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.1, 0.5, 1.0])
def test_interrupted_imports_end_without_a_word(wait_s: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kd_pipeline", "check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None and process.stderr.readline().startswith("kd-pipeline")
    time.sleep(wait_s)  # torch takes longer than that
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (output, error) == ("", "")
    assert process.returncode == -signal.SIGINT  # 130 in a shell


def test_help_is_light() -> None:
    code = "import sys; from kd_pipeline.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "'kd_pipeline.cli'" in result.stdout
    assert not any(f"'{module}'" in result.stdout for module in ("torch", "nvidia.dali", "lightning", "onnx"))


def test_invalid_override_is_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "train.epoch=1"]) == 1
    _, error = capsys.readouterr().err.splitlines()
    assert error.startswith("kd-pipeline: ") and "train.epoch" in error and "epochs" in error


def test_debug_shows_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "train.epoch=1", "--debug"]) == 1
    _, first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("  kd_pipeline.errors.ConfigError: override 'train.epoch=1': train.epoch: unknown key")


def test_bench_names_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert cli.main(["bench", "step", "--root", str(root), "--out", str(tmp_path / "out.json")]) == 1
    assert str(root) in capsys.readouterr().err


def test_bench_names_option_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--repeats", "0"]) == 1
    assert "--repeats" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_teacher_writes_table_json_and_plot(
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
        (["--precisions", "bf16", "fp64"], "--precisions: "),
        (["--compile-at", "3"], "are not among the batch_sizes [1, 8, 32, 64]"),
        (["--onnx", "none.onnx"], "none.onnx: there is no such file"),
    ],
)
def test_invalid_bench_teacher_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert cli.main(["bench", "teacher", *arguments, "--out", str(tmp_path / "out.json")]) == 1
    assert words in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(overrides: object, report: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_pipeline.workflows.demo.run_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_first_line_comes_before_heavy_imports(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from kd_pipeline.cli import main\n"
        "class Torch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': sys.exit('torch')\n"
        "sys.meta_path.insert(0, Torch())\n"
        "main(['train', '-c', 'my run.yaml', 'stage=all'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines() == [f"kd-pipeline {__version__}: train -c 'my run.yaml' stage=all", "torch"]


@pytest.mark.parametrize(
    ("variable", "rank", "num_lines"), [("RANK", "0", 2), ("RANK", "1", 1), ("SLURM_PROCID", "3", 1)]
)
def test_one_rank_prints_first_line(
    variable: str, rank: str, num_lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, rank)
    assert cli.main(["train", "-c", "missing.yaml"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == num_lines


def test_data_error_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(overrides: object, report: object) -> None:
        raise DataError("no such folder: /data")

    monkeypatch.setattr("kd_pipeline.workflows.demo.run_demo", failing)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["kd-pipeline: no such folder: /data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "kd-pipeline: error: no command 'trian'; did you mean 'train'?"),
        (["bench", "stpe"], "no command 'stpe'; did you mean 'step'?"),
        (["train", "my.yaml"], "the following arguments are required: -c/--config; did you mean -c my.yaml?"),
        (["train", "-c", "a.yaml", "--fresch"], "unrecognized arguments: --fresch; did you mean '--fresh'?"),
        (["tune", "-c", "a.yaml", "--allow", "train.precison"], "'train.precison' is no choice; did you mean"),
        (["doctor", "--jsn=1"], "unrecognized arguments: --jsn=1; did you mean '--json'?"),
    ],
)
def test_misspelled_arguments_get_advice(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_every_command_says_what_it_does_and_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    commands = re.findall(r"^    ([a-z-]+)(?:\s|$)", listed, re.MULTILINE)
    assert {"train", "init", "config", "doctor"} <= {*commands}
    for command in commands:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        usage, _, rest = capsys.readouterr().out.partition("\n\n")
        assert usage.startswith("usage:") and rest[0].isupper() and rest.partition("\n\n")[0].endswith("."), command
    with pytest.raises(SystemExit):
        cli.main(["init", "--help"])
    assert "(default: my.yaml)" in " ".join(capsys.readouterr().out.split())
