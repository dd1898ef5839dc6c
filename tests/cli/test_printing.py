"""Class names, file names and messages of strangers reach the terminal without control characters, on one line each."""

import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline._core.terminal_log import PrintableFormatter
from kd_pipeline._core.text import printable
from kd_pipeline.cli import main
from kd_pipeline.cli.printing import print_message, print_result
from kd_pipeline.errors import DataError
from kd_pipeline.workflows import doctor

FAKE = "roof 99.9 %"
CLASSES = ("\x1b]0;owned\x07dog", f"cat\n{FAKE}", "\u202ebird\u2028")
CONFIG = """
run_dir: {0}/run
data:
  batch_size: 4
  device: cpu
  num_threads: 1
  on_bad_sample: substitute
  max_bad_fraction: 0.5
  train:
    source: {{kind: image_folder, root: {0}/images}}
    transform: {{preset: train, size: 16}}
  val:
    source: {{kind: image_folder, root: {0}/images}}
    transform: {{preset: eval, size: 16}}
stage: teacher
teacher: {{model: {{builtin: small_resnet, num_classes: 3, kwargs: {{width: 4}}}}}}
student: {{builtin: small_resnet, kwargs: {{width: 4}}}}
train: {{epochs: 1, loggers: [csv]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `run.yaml` and images whose names and class names are hostile."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (20, 20, 3), np.uint8) // (label + 1)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}\x1b[31m.png")
    for bad in (b"0\x1b[2J\n%s.jpg" % FAKE.encode(), b"0caf\xe9.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path / "images" / CLASSES[0]) + b"/" + bad)).write_bytes(b"\xff\xd8")
    (tmp_path / "run.yaml").write_text(CONFIG.format(tmp_path), encoding="utf-8")
    return tmp_path


def check_printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, if it is harmless."""
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert printable(text, keep="\n") == text
        assert not [line for line in text.splitlines() if line.startswith(FAKE)]
    return shown.out + shown.err


def test_check_prints_hostile_names_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", str(folder / "run.yaml")]) == 1
    shown = check_printed(capsys)
    assert rf"0\x1b[2J\n{FAKE}.jpg (2 bytes): " in shown and r"0caf\udce9.jpg" in shown


@pytest.mark.slow
def test_train_record_and_eval_print_hostile_names_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["-c", str(folder / "run.yaml")]
    assert main(["train", *common]) == 0
    assert re.search("^val +teacher ", check_printed(capsys), re.MULTILINE)
    assert main(["record", *common, "stage=distill"]) == 0
    check_printed(capsys)
    run = folder / "run\x1b[2J"
    (folder / "run" / "teacher").rename(run)
    assert main(["eval", *common, str(run), "--no-teacher"]) == 0
    assert r"run\x1b[2J" in check_printed(capsys)


@pytest.mark.parametrize("command", ["check", "train", "record", "eval"])
def test_errors_print_hostile_names_as_text(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"{folder}/\x1b]0;owned\x07\n{FAKE}\udce9"
    assert main([command, "-c", f"{root}.yaml"]) == 1
    assert r"\x1b]0;owned\x07" in check_printed(capsys)


def test_split_name_is_printable(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress bars and loggers show it as it is."""
    split = "{source: {kind: image_folder, root: images}, transform: {preset: eval, size: 16}}"
    override = f'data.more={{"night\\n{FAKE}\\e[2J": {split}}}'
    assert main(["check", "-c", str(folder / "run.yaml"), override]) == 1
    assert rf"more has a split 'night\n{FAKE}\x1b[2J'; give it a name of printable" in check_printed(capsys)


def test_unknown_argument_is_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", f"--\x1b]0;owned\x07\n{FAKE}"])
    assert r"unrecognized arguments: --\x1b]0;owned\x07\n" in check_printed(capsys)


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_message_starts_no_line_of_its_own(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DataError("first\nsecond\x1b[2J\x9b2J\r\u2028\udce9 third")

    monkeypatch.setattr(doctor, "diagnose", fail)
    assert main(["doctor", *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].endswith("first") and lines[-1] == r"  second\x1b[2J\x9b2J\r\u2028\udce9 third"


def test_log_lines_are_text() -> None:
    record = logging.LogRecord("kd_pipeline", logging.WARNING, "", 0, "class %s", ("a\x1b[2J\nWARNING b",), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == "WARNING class a\\x1b[2J\n  WARNING b"


def test_terminal_without_unicode_shows_escapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        print_result("café\udce9\x07")
        print_message("café\na")
    assert (tmp_path / "out").read_text() == "caf\\xe9\\udce9\\x07\ncaf\\xe9\n  a\n"


def test_a_reader_that_has_seen_enough_ends_the_command_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            print_result("more than anybody reads")
        assert ended.value.code == 141
        stdout.write("what is flushed at the end goes nowhere")
