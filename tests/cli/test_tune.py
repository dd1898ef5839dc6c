"""`kd-pipeline tune`."""

import json
from pathlib import Path
from typing import Any

import pytest

from kd_pipeline.bench import tune as module
from kd_pipeline.bench.tune_result import TuneResult
from kd_pipeline.bench.tune_search import Race
from kd_pipeline.bench.tune_steps import Trial
from kd_pipeline.cli import main
from kd_pipeline.cli import tune as command
from kd_pipeline.config.config import load_config
from tests.training.tiny_run import settings, write_digits

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
FASTER = (("data.num_threads", 2), ("train.num_threads", 1))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_digits(folder)
    return folder


@pytest.fixture
def config(digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / "digits.yaml"
    text = settings(digits, "run").model_dump_json(exclude_none=True)
    path.write_text(f"# mine\n{text}\n", encoding="utf-8")
    return path


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the search; receives its arguments."""
    calls: list[Any] = []

    def tune(config: Any, settings: Any, **options: Any) -> TuneResult:
        calls.append((config, settings, options))
        rates = {Trial(): [10.0, 11.0, 10.0], Trial(FASTER): [15.0, 16.0, 15.5]}
        return TuneResult(FASTER, Race(rates, {}), {}, [], {}, 12.0, {})

    monkeypatch.setattr(module, "tune", tune)
    return calls


def test_settings_are_printed_to_paste(config: Path, found: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = config.read_bytes()
    arguments = ["--allow", "train.precision", "--allow", "teacher.int8", "--plugin", "tests.training.networks"]
    assert main(["tune", "-c", str(config), "--seconds", "600", *arguments, "seed=4"]) == 0
    printed = capsys.readouterr().out
    assert "1.50 times as fast with\n  data.num_threads=2 train.num_threads=1\n" in printed
    assert "--write" in printed and config.read_bytes() == before
    ((given, options, others),) = found
    assert given.seed == 4 and options.allow == ("train.precision", "teacher.int8") and options.seconds <= 600
    assert others["plugins"] == ["tests.training.networks"]


def test_written_where_asked(config: Path, found: list[Any], tmp_path: Path) -> None:
    before = config.read_text()
    assert main(["tune", "-c", str(config), "--write-to", str(tmp_path / "new" / "tuned.yaml")]) == 0
    assert config.read_text() == before
    assert main(["tune", "-c", str(config), "--write"]) == 0
    assert config.read_text() == (tmp_path / "new" / "tuned.yaml").read_text()
    tuned = load_config(config)
    assert (tuned.data.num_threads, tuned.train.num_threads) == (2, 1)
    assert config.read_text().startswith("# mine\n")


def test_target_is_looked_at_first(config: Path, found: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "-c", str(config), "--write-to", str(config.parent)]) == 1
    assert "give the name of a YAML file" in capsys.readouterr().err and not found


def test_error_is_one_message(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "-c", str(config), "teacher.onnx=none.onnx", "student={builtin: small_resnet}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kd-pipeline: ")]
    assert "none.onnx" in line


@pytest.mark.slow
def test_whole_search(
    digits: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plugin = tmp_path / "tune.json", ["--plugin", "tests.training.networks"]
    monkeypatch.setattr(command, "_age_s", lambda: 0.0)  # tests have been running for long
    assert main(["tune", "-c", str(config), *plugin, "--seconds", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "present settings" in printed.out and "interleaved rounds in " in printed.out
    assert "last comparison, images/s: " in printed.err
    assert json.loads(out.read_text())["final"]["images_per_s"][0]["median"] > 0
    assert not (digits / "run").exists()
